"""Attention inside the samples of a packed row, registered with transformers by name.

A row holds several samples, and no token attends to another sample's. The kernel is torch's variable-length flash
attention on CUDA, one SDPA call per sample elsewhere, or FlashAttention 2 or 3 where it is installed and requested.
Sliding windows, softcapping and attention sinks are not implemented: models that use them are refused when they are
built (`llava_next/model/language_models.py`).
"""

import importlib
import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_next.config import AttentionKernel, ModelError
from llava_next.inputs.batch import Segments

_VARLEN_HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
_FLASH_MODULES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    targets: torch.Tensor | None = None,
    kernel: AttentionKernel = "auto",
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        query: [1, heads, T, head width]; key and value: [1, kv heads, T, head width].
        segments: the samples' bounds; required (a model that generates uses a stock implementation).
        targets: int64 [L], ascending; for a module that is marked `reads_targets_only` (`supervised_last_block.py`),
            the positions whose output is read. With `sdpa` only these are computed, and the rest are zeros.
        kernel: `auto` is `varlen` on CUDA in half precision and `sdpa` elsewhere.
        sliding_window: number of keys that a query attends to, its own included; None or 0 for all before it.

    Returns:
        [1, T, heads, head width], as transformers' attention functions do, and no weights.

    Raises:
        ValueError: no segments, or dropout.
    """
    if segments is None:
        raise ValueError("this model attends within segments: call LlavaNext, or set_attn_implementation('sdpa')")
    if dropout:
        raise ValueError(f"segment attention has no dropout, the model asks for {dropout}")
    window = sliding_window or None
    if kernel == "auto":
        kernel = "varlen" if _has_varlen(query.device, query.dtype) else "sdpa"
    if kernel == "sdpa":
        if targets is not None and getattr(module, "reads_targets_only", False):
            return _sdpa_at_targets(query, key, value, segments, scaling, targets, window), None
        return _sdpa_per_segment(query, key, value, segments, scaling, window), None
    run = _varlen if kernel == "varlen" else partial(_flash, kernel)
    return run(query, key, value, segments, scaling, window), None


def _has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@torch.compiler.disable  # it would be compiled again for every list of lengths
def _sdpa_per_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None = None,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    for q, k, v in zip(
        query.split(segments.lengths, dim=2),
        key.split(segments.lengths, dim=2),
        value.split(segments.lengths, dim=2),
        strict=True,
    ):
        if window is None or q.shape[2] <= window:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        else:
            outputs += _sdpa_in_window(q, k, v, window, options)
    # Concatenated in the returned layout: the model flattens the heads next, which then needs no second copy.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _sdpa_in_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, options: dict[str, Any]
) -> list[torch.Tensor]:
    """Attention of one sample, block by block of `window` queries, whose keys are in two blocks: time and the mask grow
    with the length, not with its square."""
    outputs = []
    for start in range(0, query.shape[2], window):
        end, first = min(start + window, query.shape[2]), max(0, start - window + 1)
        distance = torch.arange(start, end, device=query.device)[:, None] - torch.arange(
            first, end, device=query.device
        )
        mask = (distance >= 0) & (distance < window)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], attn_mask=mask, **options
            )
        )
    return outputs


@torch.compiler.disable
def _sdpa_at_targets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    targets: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """As `_sdpa_per_segment` for the queries at `targets`, with an explicit causal mask; zeros elsewhere.

    SDPA computes masked scores too: if most of a row is supervised, causal attention at all positions is less work.
    """
    if 2 * len(targets) > query.shape[2]:
        return _sdpa_per_segment(query, key, value, segments, scaling, window)
    is_grouped = query.shape[1] != key.shape[1]
    queries = query.index_select(2, targets).split(segments.num_targets, dim=2)
    positions = targets.split(segments.num_targets)
    keys, values = key.split(segments.lengths, dim=2), value.split(segments.lengths, dim=2)
    outputs, start = [], 0
    for q, k, v, position in zip(queries, keys, values, positions, strict=True):
        distance = (position - start)[:, None] - torch.arange(k.shape[2], device=position.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=is_grouped))
        start += k.shape[2]
    computed = torch.cat([output.transpose(1, 2) for output in outputs], dim=1)[0]
    return computed.new_zeros(query.shape[2], *computed.shape[1:]).index_put((targets,), computed)[None]


def _positions_first(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, width] → [T, heads, width]. Not `states[0]`, whose gradient is zeros and a copy."""
    return states.squeeze(0).transpose(0, 1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    # torch 2.11 has no such argument: its kernel sees grouped heads from the shapes.
    is_grouped = query.shape[1] != key.shape[1]
    grouping: dict[str, Any] = {"enable_gqa": True} if is_grouped and _VARLEN_HAS_ENABLE_GQA else {}
    output = varlen_attn(
        _positions_first(query),
        _positions_first(key),
        _positions_first(value),
        segments.bounds,
        segments.bounds,
        segments.max_length,
        segments.max_length,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # causal
        **grouping,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _flash(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention 2 or 3: both have this signature, and see grouped heads from the shapes."""
    function = importlib.import_module(_FLASH_MODULES[kernel]).flash_attn_varlen_func
    output = function(
        _positions_first(query),
        _positions_first(key),
        _positions_first(value),
        segments.bounds,
        segments.bounds,
        segments.max_length,
        segments.max_length,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
    )
    output = output[0] if isinstance(output, tuple) else output  # early releases of 3 also return the normaliser
    assert isinstance(output, torch.Tensor)
    return output[None]


def register(kernel: AttentionKernel) -> str:
    """Registers attention by this kernel with transformers, and returns its name there.

    No mask function is registered with it, so transformers builds no mask.

    Raises:
        ModelError: the kernel's package is not installed.
    """
    module = _FLASH_MODULES.get(kernel)
    if module is not None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ModelError(
                f"attention={kernel}: the module {module} cannot be imported here ({error}); install FlashAttention "
                f"{kernel[-1]}, or choose attention=auto, which is torch's own variable-length flash attention on CUDA"
            ) from error
    name = f"llava_next_segments_{kernel}"
    AttentionInterface.register(name, partial(segment_attention, kernel=kernel))
    return name


def check_kernel(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ModelError if this kernel cannot run on a device in a data type.

    Args:
        device, dtype: the model's.
    """
    if kernel not in ("auto", "sdpa") and not _has_varlen(device, dtype):
        raise ModelError(
            f"attention={kernel} runs on CUDA in bf16, not in {str(dtype).removeprefix('torch.')} on {device.type}; "
            "choose attention=auto or attention=sdpa"
        )
