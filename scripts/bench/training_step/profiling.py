"""The time of a step by kind of operation, from torch's profiler, and the time of the vision tower."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from measuring.result_files import table
from torch import nn
from torch.profiler import record_function

INPUT = "bench_input"

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input (decode, tiles, tokens)", (INPUT, "DataLoader")),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention", "_varlen")),
    ("matrix products", ("::mm", "addmm", "bmm", "::linear", "_linear", "conv", "gemm", "matmul")),
    ("loss", ("softmax", "nll_loss", "cross_entropy")),
    ("optimizer and clipping", ("adam", "_foreach_norm", "vector_norm", "clip", "Optimizer")),
    ("norm (without its products)", ("layer_norm", "rms_norm", "::pow", "::rsqrt", "::mean", "Pow", "Rsqrt", "Mean")),
    (
        "copies, gathers, sums",
        (
            *("copy", "::cat", "::clone", "index", "gather", "scatter", "::sum", "::zero", "::fill", "embedding"),
            *("::contiguous", "Accumulate", "::to", "slice", "narrow", "::stack"),
        ),
    ),
    (
        "elementwise",
        ("::mul", "::add", "silu", "gelu", "sigmoid", "::div", "::neg", "::sub", "::exp", "::sin", "::cos"),
    ),
)
"""An operation belongs to the first kind of which a word is in its name. RMS norms are single operations, whose
products count as elementwise."""

KERNELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("flash", "fmha", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas")),
    ("fused by torch.compile or liger", ("triton", "_liger", "_rms_norm", "_swiglu", "_rope")),
    ("loss", ("softmax", "nll_loss")),
    ("optimizer and clipping", ("adam", "multi_tensor")),
    ("collectives", ("nccl",)),
    ("norms and sums", ("layer_norm", "layernorm", "reduce")),
    ("copies, gathers", ("memcpy", "memset", "copy", "catarray", "index", "fill", "embedding", "scatter", "gather")),
    ("elementwise", ("elementwise",)),
)
"""The same for the kernels of a GPU, by their names."""

OTHER = "other (Python, allocation, dispatch)"
IDLE = "other, and the device idle"


def seconds_by_kind(profiler: Any, wall_s: float, device: str) -> dict[str, float]:
    """Seconds of each kind, the largest first.

    Args:
        profiler: torch's, after its `with` block.
        wall_s: the time that the block took.
        device: with "cuda" the times of kernels are taken, which do not contain the work of the host.
    """
    kinds, rest = (KERNELS, IDLE) if device == "cuda" else (KINDS, OTHER)
    sums = dict.fromkeys([name for name, _ in kinds], 0.0)
    for key, seconds in _operations(profiler, device):
        name = key.lower() if device == "cuda" else key
        kind = next((kind for kind, words in kinds if any(word in name for word in words)), None)
        if kind is not None:
            sums[kind] += seconds
    sums[rest] = wall_s - sum(sums.values())
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def longest_operations(profiler: Any, device: str, count: int = 30) -> dict[str, float]:
    """Seconds of the operations (on a GPU of the kernels) that took longest in all."""
    return dict(sorted(_operations(profiler, device), key=lambda item: -item[1])[:count])


def _operations(profiler: Any, device: str) -> Iterator[tuple[str, float]]:
    for event in profiler.key_averages():
        if event.device_type.name == ("CUDA" if device == "cuda" else "CPU"):
            yield event.key, (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6


def profile_table(profile: Mapping[str, float]) -> str:
    """Seconds of one step of ours by kind of operation."""
    total = sum(profile.values())
    rows = [(kind, f"{seconds:.2f}", f"{seconds / total:.1%}") for kind, seconds in profile.items()]
    return table(("a step of ours", "s", "share"), rows)


def marked_input(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches, with the time in which each is made recorded as input."""
    iterator = iter(batches)
    while True:
        with record_function(INPUT):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


class TowerClock:
    """Time of the tower and its projector, forward and backward: wall time, or on a GPU time between events.

    Their backward pass comes last, so its end is the end of the whole backward pass.

    Args:
        tower, projector: the modules; the projector's output is the input of the language model.
        device: "cpu" or "cuda".
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, device: str) -> None:
        self.device = device
        self._spans: list[list[Any]] = []
        tower.register_forward_pre_hook(lambda *_: self._open())
        projector.register_forward_hook(self._after_forward)

    def wrap(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The same backward pass; its end is recorded."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = backward(*args, **kwargs)
            if self._spans and len(self._spans[-1]) == 1:
                self._close()
            return result

        return timed

    def take_seconds(self) -> float:
        """Seconds since the last call."""
        spans, self._spans = self._spans, []
        if self.device == "cuda":
            torch.cuda.synchronize()
            return sum(float(start.elapsed_time(end)) for start, end in spans) / 1e3
        return sum(float(end - start) for start, end in spans)

    def _after_forward(self, module: nn.Module, inputs: Any, features: torch.Tensor) -> None:
        self._close()
        features.register_hook(lambda _: self._open())

    def _open(self) -> None:
        self._spans.append([self._mark()])

    def _close(self) -> None:
        self._spans[-1].append(self._mark())

    def _mark(self) -> Any:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()
