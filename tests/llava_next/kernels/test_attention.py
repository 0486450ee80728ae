"""Attention inside the segments of a row."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_next.config import ModelError
from llava_next.inputs.batch import Segments
from llava_next.kernels.attention import check_kernel, register, segment_attention

LENGTHS = (5, 1, 9, 3)


def _segments(device: str = "cpu") -> Segments:
    bounds = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32, device=device)
    return Segments(bounds, LENGTHS)


def _qkv(dtype: torch.dtype, device: str = "cpu", width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int) -> torch.Tensor:
        values = torch.randn((1, num_heads, 18, width), generator=generator)
        return values.to(device, dtype).requires_grad_()

    return random(4), random(2), random(2)


def _masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Dense attention under a block-diagonal causal mask."""
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    allowed = (number[:, None] == number[None]) & torch.ones(18, 18).tril().bool()
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=allowed.to(query.device), scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2)


def test_equals_a_block_diagonal_causal_mask() -> None:
    """Outputs and gradients of grouped-query attention in fp64, with an explicit scale."""
    inputs = _qkv(torch.float64)
    output, weights = segment_attention(torch.nn.Module(), *inputs, None, scaling=0.3, segments=_segments())
    assert weights is None
    expected = _masked(*inputs, scale=0.3)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, dtype=torch.float64)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_the_kernel_on_cuda_equals_the_mask() -> None:
    """Outputs and gradients of torch's variable-length flash attention in bf16 are those of the dense mask in fp32."""
    inputs = _qkv(torch.bfloat16, "cuda", width=64)
    output, _ = segment_attention(torch.nn.Module(), *inputs, None, scaling=0.125, segments=_segments("cuda"))
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in inputs)
    exact = (query, key, value)
    expected = _masked(*exact, scale=0.125)
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
    upstream = torch.randn(expected.shape, device="cuda")
    for gradient, expected_gradient in zip(
        torch.autograd.grad(output, inputs, upstream.bfloat16()),
        torch.autograd.grad(expected, exact, upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient.float(), expected_gradient, rtol=5e-2, atol=5e-2)


def test_calls_without_segments_are_refused() -> None:
    """A call without segments, or with dropout, is an error."""
    with pytest.raises(ValueError, match="within segments"):
        segment_attention(torch.nn.Module(), *_qkv(torch.float32), None)
    with pytest.raises(ValueError, match="dropout"):
        segment_attention(torch.nn.Module(), *_qkv(torch.float32), None, dropout=0.1, segments=_segments())


def _flash_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, softmax_scale: float, causal: bool
) -> torch.Tensor:
    """FlashAttention's signature over SDPA: the real kernel needs a GPU."""
    bounds, other_bounds, longest, other_longest = args
    assert bounds is other_bounds
    assert longest == other_longest == max(LENGTHS)
    rows = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        row = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        rows.append(row[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("kernel", "module"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_flash_attention_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, kernel: Any, module: str) -> None:
    """Layouts, bounds and scale, through a replacement with the same signature."""
    stand_in = ModuleType(module)
    stand_in.flash_attn_varlen_func = _flash_by_sdpa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, stand_in)
    assert register(kernel) == f"llava_next_segments_{kernel}"
    inputs = _qkv(torch.float64)
    output, _ = segment_attention(torch.nn.Module(), *inputs, None, scaling=0.3, segments=_segments(), kernel=kernel)
    torch.testing.assert_close(output, _masked(*inputs, scale=0.3), rtol=1e-10, atol=1e-12)


def test_flash_attention_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the package's version and the fix."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ModelError, match=r"attention=flash_attention_2: .* install FlashAttention 2, or .*=auto"):
        register("flash_attention_2")


@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_a_kernel_that_cannot_run_is_refused(kernel: Any) -> None:
    """Before the run, with the device and the data type; `auto` and `sdpa` run everywhere."""
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with pytest.raises(ModelError, match=rf"attention={kernel} .* {device}; choose attention=auto or .*=sdpa"):
            check_kernel(kernel, torch.device(device), dtype)
    check_kernel(kernel, torch.device("cuda"), torch.bfloat16)
    for general in ("auto", "sdpa"):
        check_kernel(general, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
