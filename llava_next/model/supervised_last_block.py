"""Runs parts of the last decoder block at supervised positions only.

Keys and values are needed at every position, but queries, the output projection and the MLP only where the loss reads
the output. This saves most of the block's activations and its largest products (one 32nd of the FLOPs of a 7B model,
one sixth of a model with six layers); loss and gradients are unchanged.
"""

from functools import partial
from typing import Any

import torch
from torch import nn


class _Targets:
    """The positions at which the block currently runs, shared by its hooks.

    Attributes:
        positions: int64 [L], or None outside of such a call.
        blank: zeros [T, 1] of the dtype of the hidden states.
    """

    positions: torch.Tensor | None = None
    blank: torch.Tensor | None = None


def run_at_targets(block: nn.Module) -> None:
    """Registers hooks that run modules of a decoder block only at the positions in its argument `targets`.

    These are q_proj and o_proj of `self_attn`, and `mlp`; modules with other names run at all positions. Without the
    argument the block is unchanged. With hooks, the modules can still be partitioned, compiled, adapted or replaced.

    Args:
        block: its forward pass takes `targets`, int64 [L] in ascending order.
    """
    targets = _Targets()
    block.register_forward_pre_hook(partial(_set_targets, targets), with_kwargs=True)
    attention = getattr(block, "self_attn", None)
    mlp = getattr(block, "mlp", None)
    modules = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    if hasattr(mlp, "down_proj"):  # a mixture of experts can return more than hidden states
        modules.append(mlp)
    for module in modules:
        if module is not None:
            module.register_forward_pre_hook(partial(_select_positions, targets))
            module.register_forward_hook(partial(_scatter_output, targets))
    if modules[1] is not None:
        attention.reads_targets_only = True  # type: ignore[union-attr, assignment]


def _set_targets(targets: _Targets, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    states = args[0] if args else kwargs["hidden_states"]
    targets.positions = kwargs.get("targets")
    targets.blank = None if targets.positions is None else states.new_zeros(states.shape[1], 1)


def _select_positions(targets: _Targets, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return None if targets.positions is None else (args[0].index_select(1, targets.positions), *args[1:])


def _scatter_output(targets: _Targets, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    if targets.positions is None or targets.blank is None:
        return output
    # index_copy would save a copy of its source for the backward pass.
    return targets.blank.expand(-1, output.shape[-1]).index_put((targets.positions,), output[0])[None]
