"""Whether ranks that should hold the same hold the same: weights and buffers by a checksum, the start by its outcome.

Gradients are averaged over ranks, so one rank with another value trains all of them on it, and no loss shows it.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from train.distributed.world import World, all_gather_objects


class ReplicaError(RuntimeError):
    """Ranks differ where they must not; names them, and what differs."""


def tensor_sums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A checksum of each tensor: the sum of its values' bits read as integers, int64 [n], on the host.

    One pass on the tensor's device. One changed value always changes it; exchanged values do not.
    """
    sums = [_bits(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    return flat.view(types[tensor.element_size()])


def compare_sums(names: Sequence[str], sums: torch.Tensor, world: World, source: torch.Tensor | None = None) -> None:
    """Compares every rank's `tensor_sums` with rank 0's. Every rank must call it.

    Args:
        names: of the tensors.
        sums: of what this rank holds.
        source: what is compared with, read on rank 0; its `sums` if not given.

    Raises:
        ReplicaError: on every rank, with the ranks that differ and the first tensor.
    """
    every = all_gather_objects(world, (sums.tolist(), None if source is None else source.tolist()))
    expected = every[0][1] or every[0][0]
    differing = {
        rank: [name for name, found, right in zip(names, held, expected, strict=True) if found != right]
        for rank, (held, _) in enumerate(every)
    }
    wrong = {rank: found for rank, found in differing.items() if found}
    if wrong:
        first = next(iter(wrong.values()))
        raise ReplicaError(
            f"rank(s) {', '.join(map(str, wrong))} hold other values than rank 0 had: {first[0]} is the first of "
            f"{len(first)} tensor(s) of {len(names)}; start again, and if the same rank differs again leave its node "
            "out (its memory, GPU or network changes data), rank 0's if all others differ"
        )


def check_replicas(model: nn.Module, world: World) -> None:
    """Compares all buffers, and the parameters that no rank holds a mere share of. Every rank must call it.

    Raises:
        ReplicaError: on every rank.
    """
    if world.size == 1:
        return
    whole = [(name, each) for name, each in model.named_parameters() if not hasattr(each, "ds_id")]
    held = dict([*whole, *model.named_buffers()])
    compare_sums(list(held), tensor_sums(held.values()), world)


def compare_starts(outcome: Mapping[str, object], world: World) -> None:
    """Compares what each rank is about to do. Every rank must call it.

    Args:
        outcome: by what it is called in the message.

    Raises:
        ReplicaError: on every rank, with both values and the ranks.
    """
    every = all_gather_objects(world, {key: str(value) for key, value in outcome.items()})
    for key, right in every[0].items():
        ranks = [rank for rank, of_rank in enumerate(every) if of_rank[key] != right]
        if ranks:
            raise ReplicaError(
                f"{key}: rank(s) {', '.join(map(str, ranks))} have {every[ranks[0]][key]}, rank 0 has {right}; every "
                "rank reads the same folders, so one of them is not shared by all nodes or lags behind: start again, "
                "and compare the folder on both nodes if it recurs"
            )
