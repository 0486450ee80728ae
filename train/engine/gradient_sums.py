"""Sums gradients over ranks, where DeepSpeed averages them by default.

The loss is divided by the tokens of the whole step, so the gradient is a sum over rows and ranks. Averaging, undone by
a factor in the loss, would round every gradient where the number of ranks is no power of two, at ZeRO-2 in bf16. Below
ZeRO-3 DeepSpeed's key `gradient_allreduce_op` sums. At ZeRO-3 DeepSpeed 0.19.8 refuses that key and divides before its
reduce-scatter, so two private methods are replaced on the instance.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from train.config.schema import ConfigError

_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
"""Reduces the gradients of a bucket and returns this rank's partitions."""
_AVERAGED_OVER = "_gradient_averaging_world_size"
"""The number of ranks that gradients are divided by where a bucket is all-reduced (`reduce_scatter: false`)."""


def sum_gradients(engine: Any) -> None:
    """Makes an engine sum gradients over ranks at ZeRO-3, and checks that it does so at the other stages.

    Args:
        engine: DeepSpeed's, with `gradient_allreduce_op: sum` below ZeRO-3.

    Raises:
        ConfigError: the installed DeepSpeed has no such key, or no such method.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        can_sum = not getattr(engine, "gradient_average", True)
    else:
        can_sum = hasattr(optimizer, _SCATTER) and hasattr(optimizer, _AVERAGED_OVER)

        def scatter(parameters: Sequence[nn.Parameter], data_type: torch.dtype) -> list[torch.Tensor]:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            partitions = reduce_scatter_sums(gradients, data_type, optimizer.dp_process_group)
            return [partition.to(optimizer.gradient_accumulation_dtype) for partition in partitions]

        setattr(optimizer, _SCATTER, scatter)
        setattr(optimizer, _AVERAGED_OVER, lambda _parameters, _num_ranks: 1)
    if not can_sum:
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} cannot sum gradients over ranks (train/engine/gradient_sums.py); "
            "install the version of constraints.txt with ./scripts/setup.sh"
        )


def reduce_scatter_sums(
    gradients: Sequence[torch.Tensor], data_type: torch.dtype, group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Sums each gradient over the ranks and returns this rank's partition of each, with one collective.

    As in DeepSpeed, partition r of n elements over R ranks has the elements from r * ceil(n / R) on, without padding.

    Args:
        gradients: whole, with the same shapes on every rank.
        data_type: of the communication and of the result.
        group: of the ranks.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [-(-gradient.numel() // num_ranks) for gradient in gradients]
    messages = gradients[0].new_empty((num_ranks, sum(sizes)), dtype=data_type)
    offset = 0
    for gradient, size in zip(gradients, sizes, strict=True):
        padding = size * num_ranks - gradient.numel()
        padded = nn.functional.pad(gradient.flatten(), (0, padding)) if padding else gradient
        messages[:, offset : offset + size].copy_(padded.view(num_ranks, size))
        offset += size
    sums = messages.new_empty(offset)
    dist.reduce_scatter_tensor(sums, messages.flatten(), group=group)
    partitions = sums.split(sizes)
    return [
        partition[: max(0, min(size, gradient.numel() - rank * size))]
        for partition, size, gradient in zip(partitions, sizes, gradients, strict=True)
    ]
