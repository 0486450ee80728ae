"""The input and the output of a competitor's process, a Job and an Outcome, as JSON files; and the clocks of all.

Imported in the environment of the authors' code too, with its old packages: standard library, and torch where a
function needs it.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measuring.processes import memory_mib

LEARNING_RATE = 2.0e-5
"""Of every trained part, constant."""

CLIP_NORM = 1.0

TEMPLATE = "vicuna_v1"
HEADER, END = "ASSISTANT:", "</s>"
"""The texts before and after an answer in that template."""


@dataclass(frozen=True)
class Job:
    """One run of one competitor.

    Attributes:
        folder: of the model and the samples (materials.py).
        result: path of the Outcome.
        samples_per_step: of an optimizer step.
        batch: samples of a padded micro-batch; 0 where rows are packed.
        max_tokens: budget of a packed row.
        num_steps: optimizer steps; the first one is not timed.
        engine: the ZeRO stage, as in configs/engine (ours only).
        profile: the last step runs under torch's profiler, and is not timed (ours only).
        recompute: run every block again in the backward pass.
        compile: torch.compile the blocks (ours) or the model (stock).
        liger: liger-kernel's fused kernels in the language model (ours) or the model (stock).
        attention: the kernel of a row's attention, as in configs/train.yaml (ours), or transformers' implementation
            (stock; auto is sdpa).
        deterministic: on a GPU, kernels that give the same bits every time (ours only).
        half_weights: on a GPU, keep no fp32 copy of the weights (stock only).
    """

    samples_per_step: int
    num_steps: int
    folder: str = ""
    result: str = ""
    batch: int = 0
    trains_tower: bool = True
    threads: int = 1
    max_tokens: int = 0
    device: str = "cpu"
    workers: int = 0
    engine: int = 0
    profile: bool = False
    recompute: bool = False
    compile: bool = False
    liger: bool = False
    attention: str = "auto"
    deterministic: bool = False
    half_weights: bool = False

    def write(self, path: Path) -> None:
        """Writes the job as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> "Job":
        """Reads what `write` has written."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class Outcome:
    """The measurements of a competitor. Lists have one value per step, the untimed first one included.

    Attributes:
        losses: mean over the step's supervised tokens.
        num_supervised: those tokens, as the competitor counts them.
        seconds, cpu_seconds: of the step, input included: wall time, and processor time of all threads.
        peak_gib: memory above what the process held before the model was built.
        gemm_tflops: the rate of a large matrix product in this process, before and after the steps.
        tower_seconds: of the tower and the projector, forward and backward; empty if they were not measured.
        flops, tower_flops, head_flops: useful FLOPs of the step; those of the tower and the projector; those of the
            language model's head, at supervised positions only.
        num_tokens: of each step, padding not counted.
        profile: seconds of one step by kind of operation.
        longest_operations: seconds of the longest of them, by name.
    """

    losses: list[float] = field(default_factory=list)
    num_supervised: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    gemm_tflops: float = 0.0
    tower_seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    tower_flops: list[float] = field(default_factory=list)
    head_flops: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)
    longest_operations: dict[str, float] = field(default_factory=dict)
    device_name: str = ""

    def write(self, path: str) -> None:
        """Writes the outcome as JSON."""
        Path(path).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """Reads what `write` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class StepClock:
    """Wall time and processor time between the ends of two steps. On a GPU it synchronizes first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._last = self._now()

    def restart(self) -> None:
        """Starts the first step now."""
        self._last = self._now()

    def lap(self, outcome: Outcome) -> None:
        """Ends a step and appends its times to the outcome."""
        now = self._now()
        outcome.seconds.append(now[0] - self._last[0])
        outcome.cpu_seconds.append(now[1] - self._last[1])
        self._last = now

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class MemoryMark:
    """Peak memory above the level at construction: resident memory on a CPU, the allocator's on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM falls to what is resident now
            self._before_mib = memory_mib("VmRSS")

    def peak_gib(self) -> float:
        """Peak since the construction, above the level at the construction, in GiB."""
        if self.device == "cuda":
            import torch

            return (torch.cuda.max_memory_allocated() - self._before) / 2**30
        return (memory_mib("VmHWM") - self._before_mib) / 1024


def gemm_tflops(device: str) -> float:
    """The rate of a large matrix product (fp32, on a GPU bf16): the best of several, in TFLOP/s."""
    import torch

    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock, outcome = StepClock(device), Outcome()
    for _ in range(8):
        torch.mm(a, b)
        clock.lap(outcome)
    return 2 * size**3 / min(outcome.seconds[1:]) / 1e12


def use_threads(threads: int) -> None:
    """Sets the number of threads of torch's operations, the same for all competitors."""
    import torch

    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
