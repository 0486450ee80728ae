"""Variable-length attention in fp32 on a CPU, with gradients: the Python side of cpu_attention.cpp.

Owns when it can run, the checks of what it is given, and its place in autograd. What is a segment, and which keys a
query sees, is the caller's to say.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from llava_next.kernels.cpu import compile as native

SOURCE = Path(__file__).with_suffix(".cpp")
_VECTOR = 16
"""Floats of the widest vector. Heads whose width is no multiple of it are filled up with zeros."""


def unavailable_reason() -> str | None:
    """Why it cannot run in this process; None where it can. Compiles it, if it never was."""
    return native.unavailable_reason(_library)


def is_supported_isa() -> bool:
    """Whether it was found faster than torch's SDPA with this processor's instructions: AVX2 or AVX-512."""
    return torch.backends.cpu.get_cpu_capability() in native.INSTRUCTIONS


def takes(query: torch.Tensor) -> bool:
    """Whether it computes this: fp32 on a CPU."""
    return query.device.type == "cpu" and query.dtype == torch.float32


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * query @ key.T) @ value inside of segments. The same bits on any number of threads.

    Args:
        query: float32 [Q, heads, width]; key and value: float32 [K, kv heads, width]; on the CPU, of any strides.
        query_bounds, key_bounds: int64 [segments + 1], ascending from 0 to Q and to K.
        seen: int64 [Q], how many of its segment's keys each query sees, at least one; ascending along a segment.
        scale: 1 / sqrt(width) unless it is given; above 0.

    Returns:
        float32 [Q, heads, width], contiguous.

    Raises:
        ValueError: shapes or types that do not fit.
        CompileError: it cannot run here (`unavailable_reason` says so beforehand).
    """
    (num_queries, heads, width), kv_heads = query.shape, key.shape[1]
    if not all(map(takes, (query, key, value))) or key.shape != value.shape or key.shape[2] != width:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (query, key, value))
        raise ValueError(f"queries, keys and values must be fp32 on a CPU, with heads of one width: {shapes}")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads of queries cannot share {kv_heads} of keys")
    indices = (query_bounds, key_bounds, seen)
    if any(index.dtype != torch.int64 or not index.is_contiguous() or index.is_cuda for index in indices):
        raise ValueError("bounds and seen must be contiguous int64 tensors on the CPU")
    if query_bounds.shape != key_bounds.shape or len(seen) != num_queries:
        raise ValueError(
            f"{len(query_bounds)} and {len(key_bounds)} bounds, {len(seen)} seen for {num_queries} queries"
        )
    if int(query_bounds[-1]) != num_queries or int(key_bounds[-1]) != len(key):
        raise ValueError(f"the last bounds are not the {num_queries} queries and {len(key)} keys")
    scale = width**-0.5 if scale is None else scale
    rest = width % _VECTOR
    if rest:
        query, key, value = (F.pad(states, (0, _VECTOR - rest)) for states in (query, key, value))
    output: torch.Tensor = _Attention.apply(query, key, value, *indices, scale)
    return output[..., :width].contiguous() if rest else output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        seen: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        query, key, value = map(_with_whole_heads, (query, key, value))
        output = query.new_empty(query.shape)
        divisors = query.new_empty(query.shape[1], query.shape[0])
        tensors = (query, key, value, output, divisors, query_bounds, key_bounds, seen)
        _library().llava_next_attention(ctypes.byref(_problem(tensors, scale)))
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        query, key = tensors[:2]
        gradient = _with_whole_heads(gradient)
        of_query = query.new_empty(query.shape)
        of_key, of_value = (query.new_empty(len(key), *query.shape[1:]) for _ in range(2))
        gradients = _Gradients(_rows(gradient), _rows(of_query), _rows(of_key), _rows(of_value))
        problem = _problem(tensors, ctx.scale)
        _library().llava_next_attention_backward(ctypes.byref(problem), ctypes.byref(gradients))
        if query.shape[1] != key.shape[1]:
            groups = (len(key), key.shape[1], -1, key.shape[2])
            of_key, of_value = of_key.view(groups).sum(2), of_value.view(groups).sum(2)
        return of_query, of_key, of_value, None, None, None, None


# The structures of cpu_attention.cpp, field by field.


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("position", ctypes.c_int64), ("head", ctypes.c_int64))


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_void_p) for name in ("divisors", "query_bounds", "key_bounds", "seen")),
        *((name, ctypes.c_int64) for name in ("num_segments", "num_queries", "heads", "group")),
        ("width", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("num_threads", ctypes.c_int),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, _Rows) for name in ("output", "query", "key", "value"))


def _problem(tensors: tuple[torch.Tensor, ...], scale: float) -> _Problem:
    """Of queries, keys, values, output, divisors, both bounds, and what is seen."""
    query, key, query_bounds = tensors[0], tensors[1], tensors[5]
    num_queries, heads, width = query.shape
    return _Problem(
        *map(_rows, tensors[:4]),
        *(tensor.data_ptr() for tensor in tensors[4:]),
        len(query_bounds) - 1,
        num_queries,
        heads,
        heads // key.shape[1],
        width,
        scale,
        torch.get_num_threads(),
    )


def _rows(tensor: torch.Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _with_whole_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with those of a head side by side in memory."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


@cache
def _library() -> ctypes.CDLL:
    library = native.load(SOURCE, torch.backends.cpu.get_cpu_capability())
    for function in (library.llava_next_attention, library.llava_next_attention_backward):
        function.restype = None
    return library
