"""What a competitor of the step bench is told, and what it answers: a Job and an Outcome, as JSON files.

Owns the clocks too, so that time and memory are taken alike everywhere. Imported in the authors' environment with its
old packages: the standard library, and torch where a function needs it. Who competes is step.py's and gpu.py's.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEARNING_RATE = 2.0e-5
"""Of every trained part, constant: the competitors have one rate each."""

CLIP_NORM = 1.0

TEMPLATE = "vicuna_v1"
HEADER, END = "ASSISTANT:", "</s>"
"""What stands before an answer in that template, and after it."""


@dataclass(frozen=True)
class Job:
    """One run of one competitor.

    Attributes:
        folder: the materials (see materials.py).
        result: where the Outcome is written.
        batch: samples of a padded micro-batch; 0 where rows are packed.
        max_tokens: budget of a packed row.
        num_steps: optimizer steps; the first one is not timed.
        engine: the ZeRO stage, as in configs/engine (ours only).
        profile: the last step runs under torch's profiler, and is not timed (ours only).
        recompute: run every block again in the backward pass.
        compile: torch.compile the blocks (ours only).
        liger: liger-kernel's fused kernels in the language model (ours only).
        attention, linear, elementwise: the kernel of a row's attention, the library of a CPU's products, its norms and
            gates, as in configs/train.yaml (ours only).
        deterministic: on a GPU, kernels that give the same bits every time (ours only).
        half_weights: on a GPU, keep no fp32 copy of the weights (stock only).
    """

    folder: str
    result: str
    batch: int
    samples_per_step: int
    num_steps: int
    trains_tower: bool
    threads: int
    max_tokens: int = 0
    device: str = "cpu"
    workers: int = 0
    engine: int = 0
    profile: bool = False
    recompute: bool = False
    compile: bool = False
    liger: bool = False
    attention: str = "auto"
    linear: str = "auto"
    elementwise: str = "auto"
    deterministic: bool = False
    half_weights: bool = False

    def write(self, path: Path) -> None:
        """Writes the job where `read` finds it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> "Job":
        """A job from its file."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class Outcome:
    """What a competitor measured. Lists have one value a step, the untimed first included.

    Attributes:
        losses: mean over the step's supervised tokens.
        num_supervised: those tokens, as the competitor counted them.
        seconds, cpu_seconds: of the step, input included: on the clock, and of all of the process's threads.
        peak_gib: memory above what the process held before the model was built.
        gemm_tflops: the rate of a large matrix product in this process, before and after the steps.
        tower_seconds: of which tower and projector took, forward and backward; nothing where they were not watched.
        flops, tower_flops: useful FLOPs of each step, and which of them are the tower's and the projector's.
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
    num_tokens: list[int] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)
    longest_operations: dict[str, float] = field(default_factory=dict)
    device_name: str = ""

    def write(self, path: str) -> None:
        """Writes the outcome where `read` finds it."""
        Path(path).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """An outcome from its file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class StepClock:
    """Clock time and processor time from one step's end to the next. On a GPU it waits for the device first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._last = self._now()

    def restart(self) -> None:
        """What has passed belongs to no step."""
        self._last = self._now()

    def lap(self, outcome: Outcome) -> None:
        """Ends a step."""
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
    """Remembers how much memory is held now; `peak_gib` is the most that was held since, above that.

    On a CPU that is resident memory (VmHWM), on a GPU the allocator's.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM falls to what is resident now
            self._before = _status_bytes("VmRSS:")

    def peak_gib(self) -> float:
        """The most that was held since the mark, above what was held then."""
        if self.device == "cuda":
            import torch

            return (torch.cuda.max_memory_allocated() - self._before) / 2**30
        return (_status_bytes("VmHWM:") - self._before) / 2**30


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def gemm_tflops(device: str) -> float:
    """The rate of a large matrix product (fp32, on a GPU bf16): the best of several, in TFLOP/s.

    On a CPU by the faster of the libraries that torch has: the one behind torch.mm, and oneDNN.
    """
    import torch

    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: torch.mm(a, b)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    seconds = []
    for product in products:
        clock, outcome = StepClock(device), Outcome()
        for _ in range(8):
            product()
            clock.lap(outcome)
        seconds.append(min(outcome.seconds[1:]))
    return 2 * size**3 / min(seconds) / 1e12


def use_threads(threads: int) -> None:
    """As many threads for torch's operations as every other competitor has."""
    import torch

    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
