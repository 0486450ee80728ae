"""Norms, gates and the rotary embedding in fp32 on a CPU, each in one pass, with gradients: the Python side of
cpu_fused.cpp.

Owns when they can run and their place in autograd. Which modules of a model are run by them is speedups.py's.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llava_next.config import ElementwiseKernel, ModelError
from llava_next.kernels.cpu import compile as native

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")


def takes_fused(kernel: ElementwiseKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model runs by these. Compiles them, if they never were.

    Args:
        kernel: `auto` is `fused` for fp32 on a CPU with AVX2 or AVX-512 where there is a compiler, else `torch`.

    Raises:
        ModelError: `fused` is asked for where it is not, or for something else than fp32 on a CPU.
    """
    if kernel == "torch":
        return False
    if device.type != "cpu" or dtype != torch.float32:
        if kernel == "fused":
            raise ModelError(
                f"elementwise=fused: it runs fp32 on a CPU, not {dtype} on {device.type}; choose elementwise=auto"
            )
        return False
    if kernel == "auto" and torch.backends.cpu.get_cpu_capability() not in native.INSTRUCTIONS:
        return False
    why_not = unavailable_reason()
    if why_not is None:
        return True
    if kernel == "fused":
        raise ModelError(f"elementwise=fused: {why_not}; choose elementwise=auto")
    logger.warning("elementwise=auto takes torch's own operations, which are slower here: %s", why_not)
    return False


def unavailable_reason() -> str | None:
    """Why they cannot run in this process; None where they can. Compiles them, if they never were."""
    return native.unavailable_reason(_library)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension. The same bits on any number of threads.

    Args:
        x: float32 [..., D].
        weight: float32 [D].
    """
    normed: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return normed


def swish(x: torch.Tensor, gated: torch.Tensor | None = None, *, beta: float = 1.0) -> torch.Tensor:
    """x * sigmoid(beta * x), times `gated` where it is given: SiLU for 1, CLIP's GELU for 1.702. Both float32."""
    activated: torch.Tensor = _Swish.apply(x, gated, beta)
    return activated


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in halves: x * cos + (-x's second half, x's first half) * sin.

    Args:
        x: float32 [1, heads, T, width], of any strides.
        cos, sin: float32 [1, T, width], without gradients.

    Returns:
        [1, heads, T, width], in memory [T, heads, width].
    """
    turned: torch.Tensor = _Rotation.apply(x, cos, sin)
    return turned


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("rms_norm", x, weight, y, inverse, inverse.numel(), len(weight), ctypes.c_float(eps))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        given = (x, weight, inverse, gradient.contiguous(), of_x, of_weight)
        _call("rms_norm_backward", *given, inverse.numel(), len(weight))
        return of_x, of_weight, None


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gated: torch.Tensor | None, beta: float) -> torch.Tensor:
        x, gated = x.contiguous(), None if gated is None else gated.contiguous()
        y = torch.empty_like(x)
        _call("swish", x, gated, y, x.numel(), ctypes.c_float(beta))
        ctx.save_for_backward(x, gated)
        ctx.beta = beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gated = ctx.saved_tensors
        of_x, of_gated = torch.empty_like(x), None if gated is None else torch.empty_like(gated)
        given = (x, gated, gradient.contiguous(), of_x, of_gated)
        _call("swish_backward", *given, x.numel(), ctypes.c_float(ctx.beta))
        return of_x, of_gated, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _rotated(gradient, *ctx.saved_tensors, back=True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    _, heads, length, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = x.new_empty(1, length, heads, width)
    _call("rotate", x, x.stride(2), x.stride(1), cos, sin, y, length, heads, width, ctypes.c_int(back))
    return y.transpose(1, 2)


def _call(name: str, *arguments: Any) -> None:
    """Calls llava_next_<name>: tensors by their memory, whole numbers as int64; the number of threads comes last."""
    getattr(_library(), f"llava_next_{name}")(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))


def _as_c(argument: Any) -> Any:
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


@cache
def _library() -> ctypes.CDLL:
    return native.load(SOURCE, torch.backends.cpu.get_cpu_capability())
