"""The language model's last block, where nothing is read but the states that predict supervised tokens.

Keys and values are needed at every position; queries, the output projection and the MLP at supervised positions alone.
There they run, and what they give is put back among zeros, which no loss reads: the same loss and gradients, without a
block's largest products (a 32nd of a 7B's, a sixth of a model of six layers) and most of its activations.

Owns which modules these are; attention itself is attention.py's, what is saved flops.py's.
"""

from functools import partial
from typing import Any

import torch
from torch import nn


class _Targets:
    """The row that the block is at work on: its supervised positions, int64 [L], and zeros [T, 1] of its type."""

    positions: torch.Tensor | None = None
    blank: torch.Tensor | None = None


def run_at_targets(block: nn.Module) -> None:
    """Lets the parts of a decoder block that stand under their usual names run at supervised positions only, whenever
    the block is given `targets` (int64 [L], ascending); parts under other names go on to run everywhere.

    Hooks, so that the parts may be divided, compiled, adapted or replaced by fused ones at any time.
    """
    at = _Targets()
    block.register_forward_pre_hook(partial(_enter, at), with_kwargs=True)
    attention = getattr(block, "self_attn", None)
    mlp = getattr(block, "mlp", None)
    parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    if hasattr(mlp, "down_proj"):  # not one of experts, which may return more than states
        parts.append(mlp)
    for part in parts:
        if part is not None:
            part.register_forward_pre_hook(partial(_take, at))
            part.register_forward_hook(partial(_put_back, at))
    if parts[1] is not None:
        attention.reads_targets_only = True  # type: ignore[union-attr, assignment]


def _enter(at: _Targets, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    states = args[0] if args else kwargs["hidden_states"]
    at.positions = kwargs.get("targets")
    at.blank = None if at.positions is None else states.new_zeros(states.shape[1], 1)


def _take(at: _Targets, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return None if at.positions is None else (args[0].index_select(1, at.positions), *args[1:])


def _put_back(at: _Targets, part: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    if at.positions is None or at.blank is None:
        return output
    # Not index_copy, which keeps what it has copied for the backward pass.
    return at.blank.expand(-1, output.shape[-1]).index_put((at.positions,), output[0])[None]
