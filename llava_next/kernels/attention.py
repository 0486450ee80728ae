"""Attention inside the segments of a packed row, and inside tiles, registered with transformers by name.

A row holds several samples; no token attends to another sample's. The kernel is execution: torch's own variable-length
flash attention on CUDA, this package's on a CPU (cpu_attention.py), one SDPA call per segment elsewhere, FlashAttention
2 or 3 where it is installed and asked for. What this does not implement (sliding windows, softcapping, sinks) is
refused when the model is built (language_models.py), never ignored.
"""

import importlib
import inspect
import logging
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_next.config import AttentionKernel, ModelError
from llava_next.inputs.batch import Segments
from llava_next.kernels.cpu import cpu_attention

logger = logging.getLogger(__name__)

_KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        query: [1, heads, T, head width]; key and value: [1, kv heads, T, head width].
        segments: the samples' bounds; required (a model that generates uses a stock implementation).
        targets: int64 [L], ascending; of a module that is marked `reads_targets_only` (last_block.py) the positions
            whose output is read. On a CPU these alone are computed, and zeros left elsewhere; so does `sdpa`.
        kernel: `auto` is `varlen` on CUDA in half precision and on a CPU with AVX2 or AVX-512 in fp32, and `sdpa`
            elsewhere.

    Returns:
        [1, T, heads, head width], as transformers' attention functions do, and no weights.
    """
    if segments is None:
        raise ValueError("this model attends within segments: call LlavaNext, or set_attn_implementation('sdpa')")
    if dropout:
        raise ValueError(f"segment attention has no dropout, the model asks for {dropout}")
    if kernel == "auto":
        kernel = "varlen" if _varlen_is_faster(query) else "sdpa"
    if not getattr(module, "reads_targets_only", False):
        targets = None
    if kernel == "varlen" and query.device.type == "cpu":
        return _varlen_on_cpu(query, key, value, segments, scaling, targets), None
    if kernel == "sdpa":
        if targets is not None:
            return _at_targets(query, key, value, segments, scaling, targets), None
        return _per_segment(query, key, value, segments, scaling), None
    run = _varlen if kernel == "varlen" else partial(_flash, kernel)
    return run(query, key, value, segments, scaling), None


def _varlen_is_faster(query: torch.Tensor) -> bool:
    """Whether there is variable-length attention for this, known to be faster than SDPA."""
    if query.is_cuda:
        return query.dtype in (torch.bfloat16, torch.float16)
    return cpu_attention.takes(query) and _cpus_own_is_at_hand()


@torch.compiler.assume_constant_result
def _cpus_own_is_at_hand() -> bool:
    return cpu_attention.is_supported_isa() and _is_compiled()


@cache
def _is_compiled() -> bool:
    """Whether attention on a CPU could be compiled; says once where it could not."""
    why_not = cpu_attention.unavailable_reason()
    if why_not is not None:
        logger.warning("attention=auto takes SDPA, which is slower here: %s", why_not)
    return why_not is None


@torch.compiler.disable  # it would be compiled anew for every list of lengths
def _per_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(
            query.split(segments.lengths, dim=2),
            key.split(segments.lengths, dim=2),
            value.split(segments.lengths, dim=2),
            strict=True,
        )
    ]
    # Joined in the layout that is returned: the model flattens the heads next, which then costs no second copy.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


@torch.compiler.disable
def _at_targets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    targets: torch.Tensor,
) -> torch.Tensor:
    """As `_per_segment`, for the queries at these positions, with a mask that says what stands before each.

    A mask hides what is computed nevertheless: where most of a row is supervised, the causal whole is less work.
    """
    if 2 * len(targets) > query.shape[2]:
        return _per_segment(query, key, value, segments, scaling)
    grouped = query.shape[1] != key.shape[1]
    queries = query.index_select(2, targets).split(segments.num_targets, dim=2)
    positions = targets.split(segments.num_targets)
    keys, values = key.split(segments.lengths, dim=2), value.split(segments.lengths, dim=2)
    outputs, start = [], 0
    for q, k, v, at in zip(queries, keys, values, positions, strict=True):
        seen = torch.arange(k.shape[2], device=at.device) <= (at - start)[:, None]
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=grouped))
        start += k.shape[2]
    found = torch.cat([output.transpose(1, 2) for output in outputs], dim=1)
    return _among_zeros(found[0], targets, query.shape[2])


def _among_zeros(found: torch.Tensor, targets: torch.Tensor, length: int) -> torch.Tensor:
    """What was found at these positions, [L, ...], in a row of this length, [1, length, ...]."""
    return found.new_zeros(length, *found.shape[1:]).index_put((targets,), found)[None]


def _positions_first(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, width] → [T, heads, width]. Not `states[0]`, whose gradient is zeros and a copy."""
    return states.squeeze(0).transpose(0, 1)


@torch.compiler.disable  # it calls C++ by way of ctypes
def _varlen_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    targets: torch.Tensor | None,
) -> torch.Tensor:
    """At all positions, or at these alone."""
    length = query.shape[2]
    q, k, v = map(_positions_first, (query, key, value))
    key_bounds = segments.bounds.long()
    if targets is None:
        positions, query_bounds = torch.arange(length, device=query.device), key_bounds
    else:
        positions, q = targets, q.index_select(0, targets)
        query_bounds = torch.tensor([0, *accumulate(segments.num_targets)], device=query.device)
    seen = positions - key_bounds[:-1].repeat_interleave(query_bounds.diff()) + 1
    found = cpu_attention.attend(q, k, v, query_bounds, key_bounds, seen, scaling)
    return found[None] if targets is None else _among_zeros(found, targets, length)


def tile_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A tower's attention, inside each of its tiles: this package's on a CPU where that is faster, else transformers'
    SDPA; SDPA also in what torch.compile translates, which would be cut in two there.

    Args:
        query, key, value: [tiles, heads, patches, head width].

    Returns:
        [tiles, patches, heads, head width], and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    alike = query.shape[:1] + query.shape[2:] == key.shape[:1] + key.shape[2:]
    stays = query.is_cuda or torch.compiler.is_compiling() or attention_mask is not None or causal or bool(dropout)
    if stays or not (alike and _varlen_is_faster(query)):
        output: torch.Tensor
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    return _within_tiles_on_cpu(query, key, value, scaling), None


def _within_tiles_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    num_tiles, _, length, _ = query.shape
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    bounds = torch.arange(0, (num_tiles + 1) * length, length, device=query.device)
    seen = torch.full((len(q),), length, device=query.device)
    found = cpu_attention.attend(q, k, v, bounds, bounds, seen, scaling)
    return found.unflatten(0, (num_tiles, length))


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor:
    # torch 2.11 has no such argument: there the kernel sees grouped heads from the shapes.
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] and _KNOWS_GROUPS else {}
    output = varlen_attn(
        _positions_first(query),
        _positions_first(key),
        _positions_first(value),
        segments.bounds,
        segments.bounds,
        segments.max_length,
        segments.max_length,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _flash(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor:
    """FlashAttention 2 or 3: one call and one signature; grouped heads are found out from the shapes."""
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
    )
    output = output[0] if isinstance(output, tuple) else output  # early releases of 3 return the normaliser, too
    assert isinstance(output, torch.Tensor)
    return output[None]


def register(kernel: AttentionKernel) -> str:
    """Makes attention by this kernel known to transformers, and returns its name there.

    No mask function goes with it, so none is built.

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


def register_for_tower(kernel: AttentionKernel) -> str:
    """Makes a tower's attention known to transformers, and returns its name there; `sdpa` stays transformers' own."""
    if kernel == "sdpa":
        return kernel
    name = "llava_next_tiles"
    AttentionInterface.register(name, tile_attention)
    return name


def check_kernel(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ModelError if this kernel cannot attend there; what is compiled once for a CPU is compiled now.

    Args:
        device, dtype: the model's.
    """
    if device.type != "cpu":
        return
    if kernel == "varlen":
        why_not = (
            cpu_attention.unavailable_reason() if dtype == torch.float32 else f"it runs fp32 on a CPU, not {dtype}"
        )
        if why_not is not None:
            raise ModelError(f"attention=varlen: {why_not}; choose attention=auto or attention=sdpa")
    elif kernel == "auto" and dtype == torch.float32 and cpu_attention.is_supported_isa():
        _is_compiled()
