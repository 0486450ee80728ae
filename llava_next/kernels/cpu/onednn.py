"""Linear layers on a CPU through oneDNN, where that is faster than what torch takes by itself.

For fp32 torch takes MKL, which on AMD's processors keeps to AVX2; oneDNN uses AVX-512, and is up to twice as fast where
they have it. Owns which of the two it is, and the product with its gradients; beyond rounding nothing depends on it.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llava_next.config import LinearKernel, ModelError

CPU_FACTS = Path("/proc/cpuinfo")
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_NUM_CACHED = "64"
"""Code that oneDNN keeps, half a megabyte each: it makes one for every shape, rows differ in length, and by default it
keeps 1,024. A row needs three for each shape of weights, for all of its layers."""


def takes_onednn(kernel: LinearKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linear layers run through oneDNN: always the same on one machine.

    Args:
        kernel: `auto` is `onednn` for fp32 on AMD's processors that have AVX-512, and `torch` elsewhere.

    Raises:
        ModelError: `onednn` is asked for where it is not, or for something else than fp32 on a CPU.
    """
    if kernel == "torch":
        return False
    fits = device.type == "cpu" and dtype == torch.float32
    there = torch.backends.mkldnn.is_available()
    if kernel == "onednn" and not (fits and there):
        what = "this torch was built without it" if fits else f"it runs fp32 on a CPU, not {dtype} on {device.type}"
        raise ModelError(f"linear=onednn: {what}; choose linear=auto")
    return kernel == "onednn" or (fits and there and _mkl_halves_its_vectors())


def _mkl_halves_its_vectors() -> bool:
    """Whether MKL leaves AVX-512 unused here, as it does on AMD's processors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = CPU_FACTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith("vendor_id") and line.endswith("AuthenticAMD") for line in lines)


def run_by_onednn(module: nn.Linear) -> None:
    """Lets a layer of fp32 weights on a CPU run through oneDNN, with gradients, also where ZeRO-3 divides it.

    Call it before anything is computed in this process: the limits of oneDNN's caches are read once.
    """
    for name in _CACHES:
        os.environ.setdefault(name, _NUM_CACHED)
    module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _Product.apply(states, module.weight, module.bias)
    return product


class _Product(torch.autograd.Function):
    """x [..., K], weight [N, K], bias [N] or None → x @ weight.T + bias, [..., N].

    torch's own way to oneDNN is a tensor in oneDNN's layout (`to_mkldnn`), which would keep a copy of x for each layer
    that reads it, and copy its gradient too. These operations take states as they lie.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = _multiply(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return of_x, None, None
        return of_x, *_gradients_of(weight, x, gradient, has_bias=ctx.has_bias)


def _gradients_of(
    weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, *, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of weight and bias."""
    of_bias = gradient.flatten(0, -2).sum(0) if has_bias else None
    if not gradient.numel():
        return torch.zeros_like(weight), of_bias
    # oneDNN is up to three times as fast where the output has more channels than the input; else the two change places.
    if weight.shape[0] < weight.shape[1]:
        return _sum_of_products(x, gradient).t().contiguous(), of_bias
    return _sum_of_products(gradient, x), of_bias


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., N], b [..., K] → the sum over rows of their outer products, [N, K].

    It is the gradient of a convolution's kernel of one value, on a picture one pixel high whose channels lie innermost:
    what torch hands to oneDNN without a copy.
    """
    pictures = [rows.reshape(1, 1, -1, rows.shape[-1]).permute(0, 3, 1, 2) for rows in (a, b)]
    num_outputs, num_inputs = a.shape[-1], b.shape[-1]
    kernel = a.new_empty(num_outputs, num_inputs, 1, 1)
    stride, padding, groups = [1, 1], [0, 0], 1
    dilation = [2, 2]  # there is nothing to dilate; but on a single thread torch would not take oneDNN without it
    mask = [False, True, False]
    gradients = torch.ops.aten.convolution_backward(
        *pictures, kernel, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    of_kernel: torch.Tensor = gradients[1]
    return of_kernel.reshape(num_outputs, num_inputs)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
