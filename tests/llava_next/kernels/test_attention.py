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


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Dense attention under a block-diagonal causal mask, with the last `window` keys of each query."""
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    allowed = (number[:, None] == number[None]) & torch.ones(18, 18).tril().bool()
    if window is not None:
        allowed &= torch.ones(18, 18).triu(1 - window).bool()
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=allowed.to(query.device), scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 8, 9, 30])
def test_equals_a_block_diagonal_causal_mask(window: int | None) -> None:
    """Outputs and gradients of grouped-query attention in fp64, with an explicit scale and a sliding window."""
    inputs = _qkv(torch.float64)
    output, weights = segment_attention(
        torch.nn.Module(), *inputs, None, scaling=0.3, segments=_segments(), sliding_window=window
    )
    assert weights is None
    expected = _masked(*inputs, scale=0.3, window=window)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, dtype=torch.float64)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_equals_the_mask_at_targets(window: int | None) -> None:
    """Where only the outputs at some positions are read, these are equal, and the rest are zeros."""
    module = torch.nn.Module()
    module.reads_targets_only = True  # type: ignore[assignment]
    inputs, targets = _qkv(torch.float64), torch.tensor([3, 4, 7, 14, 16])
    segments = Segments(_segments().bounds, LENGTHS, (2, 0, 2, 1))
    options: dict[str, Any] = {"scaling": 0.3, "segments": segments, "targets": targets, "sliding_window": window}
    output, _ = segment_attention(module, *inputs, None, **options)
    expected = torch.zeros_like(output)
    expected[:, targets] = _masked(*inputs, scale=0.3, window=window)[:, targets]
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_on_cuda_equals_the_mask(window: int | None) -> None:
    """Outputs and gradients of torch's variable-length flash attention in bf16 are those of the dense mask in fp32."""
    inputs = _qkv(torch.bfloat16, "cuda", width=64)
    output, _ = segment_attention(
        torch.nn.Module(), *inputs, None, scaling=0.125, segments=_segments("cuda"), sliding_window=window
    )
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in inputs)
    exact = (query, key, value)
    expected = _masked(*exact, scale=0.125, window=window)
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """FlashAttention's signature over SDPA: the real kernel needs a GPU."""
    bounds, other_bounds, longest, other_longest = args
    assert bounds is other_bounds
    assert longest == other_longest == max(LENGTHS)
    assert causal
    before, after = window_size
    assert after <= 0
    rows = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        mask = torch.ones(stop - start, stop - start).tril().bool()
        if before >= 0:
            mask &= torch.ones_like(mask).triu(-before)
        row = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        rows.append(row[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("kernel", "module"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_flash_attention_gets_its_arguments(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, module: str, window: int | None
) -> None:
    """Layouts, bounds, scale and window, through a replacement with the same signature."""
    stand_in = ModuleType(module)
    stand_in.flash_attn_varlen_func = _flash_by_sdpa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, stand_in)
    assert register(kernel) == f"llava_next_segments_{kernel}"
    inputs = _qkv(torch.float64)
    options: dict[str, Any] = {"scaling": 0.3, "segments": _segments(), "kernel": kernel, "sliding_window": window}
    output, _ = segment_attention(torch.nn.Module(), *inputs, None, **options)
    torch.testing.assert_close(output, _masked(*inputs, scale=0.3, window=window), rtol=1e-10, atol=1e-12)


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
