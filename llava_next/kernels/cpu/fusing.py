"""Which of a model's modules compute what a kernel of elementwise.py does; those are then run by it.

A module is left alone unless its class's own code, tried on a few numbers, gives the same: architectures differ under
the same names (Gemma's norm adds one to its weight), and new ones come. Owns that trial, and the change to a module.
"""

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation

from llava_next.kernels.cpu import elementwise as cpu_fused

Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_ROTATES = "apply_rotary_pos_emb"
_QUICK_GELU = 1.702


def fuse(module: nn.Module) -> None:
    """Lets this module, not its children, run by a fused kernel if there is one for it. Weights stay where they are."""
    kind: Any = type(module)
    if isinstance(module, QuickGELUActivation):
        module.forward = partial(cpu_fused.swish, beta=_QUICK_GELU)  # type: ignore[method-assign]
    elif _is_rms_norm(kind):
        module.forward = MethodType(_rms_norm, module)  # type: ignore[method-assign]
    elif _is_silu(getattr(module, "act_fn", None)) and _is_gated_mlp(kind):
        module.forward = MethodType(_gated_mlp, module)  # type: ignore[method-assign]
    elif _rotates_in_halves(kind):
        module.forward = MethodType(_with_rotation(kind.forward), module)  # type: ignore[method-assign]


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return cpu_fused.rms_norm(hidden_states, module.weight, module.variance_epsilon)


@cache
def _is_rms_norm(kind: Any) -> bool:
    norm: Any = SimpleNamespace(weight=_numbers(8), variance_epsilon=0.1)
    return kind.__name__.endswith("Norm") and _matches_numerically(
        lambda: (kind.forward(norm, _X), _rms_norm(norm, _X))
    )


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = module.down_proj(cpu_fused.swish(module.gate_proj(x), module.up_proj(x)))
    return states


def _is_silu(activation: Any) -> bool:
    return callable(activation) and _matches_numerically(lambda: (activation(_X), F.silu(_X)))


@cache
def _is_gated_mlp(kind: Any) -> bool:
    mlp: Any = SimpleNamespace(act_fn=F.silu, gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.exp)
    return _matches_numerically(lambda: (kind.forward(mlp, _X), _gated_mlp(mlp, _X)))


@cache
def _rotates_in_halves(kind: Any) -> bool:
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTATES not in forward.__code__.co_names:
        return False
    theirs = forward.__globals__.get(_ROTATES)
    if theirs is None:
        return False
    angles = _numbers(1, 3, 8)
    given = (_numbers(1, 2, 3, 8), _numbers(1, 1, 3, 8), angles.cos(), angles.sin())
    return _matches_numerically(lambda: (torch.cat(theirs(*given), 1), torch.cat(_rotate_both(theirs, *given), 1)))


def _rotate_both(
    theirs: Rotation, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [1, heads, T, width] of a row; several rows, or heads that are turned in part, are theirs."""
    if query.dim() != 4 or len(query) != 1 or cos.shape != (1, *query.shape[2:]):
        return theirs(query, key, cos, sin)
    return cpu_fused.rotate(query, cos, sin), cpu_fused.rotate(key, cos, sin)


def _with_rotation(forward: FunctionType) -> FunctionType:
    """The same code of an attention, in which that name means our rotation: a model's own, not the process's."""
    names = {**forward.__globals__, _ROTATES: partial(_rotate_both, forward.__globals__[_ROTATES])}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


_X = _numbers(1, 3, 8)


def _matches_numerically(both: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether both are the same to rounding. Code that wants something else than it is given here is other code."""
    try:
        theirs, ours = both()
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return False
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)
