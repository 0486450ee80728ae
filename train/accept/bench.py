"""What every phase works with: the ranks, the folder, the time that is left, and the command lines of child runs."""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from train.accept.child_runs import Ended, run_children
from train.accept.generated_inputs import NARROW_SLICE, WIDE_SLICE, Sizes, Slice, sizes_for, write_materials
from train.accept.ranks import PhaseError, Ranks
from train.accept.row_coverage import Kinds, choose_seed
from train.config.compose import load

_TINY = (
    "model/language_model=accept",
    "model/vision_tower=accept",
    "mixture=accept",
    "stage.learning_rates={vision_tower: 1.0e-4, projector: 1.0e-3, language_model: 5.0e-4}",
    "stage.warmup_ratio=0",
    "stage.weight_decay=0.01",
    "stage.max_length=256",
    "packing.max_tokens=256",
    "packing.max_tiles=8",
    "precision=fp32",
)
# Buckets and thresholds so small that a tiny model is partitioned and reduced in many pieces, as a large one is.
_ENGINES = {
    "zero0": ("engine=zero0",),
    "zero1": ("engine=zero1", "engine.zero_optimization.reduce_bucket_size=20000"),
    "zero2": (
        "engine=zero2",
        "engine.zero_optimization.reduce_bucket_size=20000",
        "engine.zero_optimization.allgather_bucket_size=20000",
    ),
    "zero3": (
        "engine=zero3",
        "engine.zero_optimization.reduce_bucket_size=20000",
        "engine.zero_optimization.stage3_param_persistence_threshold=100",
        "engine.zero_optimization.stage3_prefetch_bucket_size=10000",
    ),
}
_SMALL_GPU_GIB = 40


class NotRun(Exception):
    """A phase did not run, or was cut off by the end of the time; the message says why."""


@dataclass
class Device:
    """What a rank runs on: "CPU", or the GPU's name, with the memory that programs see."""

    name: str
    memory_gib: float = 0.0

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"


@dataclass
class Bench:
    """The state that phases share; equal on every rank but for `ranks`.

    Attributes:
        out: folder of the report.
        timeout_s: of a child run's collectives.
        deadline_s: on rank 0's monotonic clock.
        seed, kinds: of the order that the equality checks train in.
        links, disk_gb_s: measured by phases, for the hardware file.
        checkpoint: what the export phase exports.
    """

    ranks: Ranks
    device: Device
    out: Path
    timeout_s: int
    deadline_s: float
    seed: int = 0
    kinds: Kinds = field(default_factory=list)
    reference_ok: bool = False
    slice_ok: bool = False
    links: dict[str, Any] | None = None
    disk_gb_s: float | None = None
    checkpoint: Path | None = None

    @property
    def materials(self) -> Path:
        return self.out / "materials"

    @property
    def sizes(self) -> Sizes:
        return sizes_for(self.ranks.size)

    @property
    def slice(self) -> Slice:
        """The model of the speed check, by the device's memory."""
        if not self.device.is_gpu:
            return NARROW_SLICE
        return (
            WIDE_SLICE if self.device.memory_gib >= _SMALL_GPU_GIB else replace(WIDE_SLICE, layers=2, max_tokens=4096)
        )

    def run_dir(self, name: str) -> Path:
        """The folder of a child run of the trainer."""
        return self.out / "runs" / name / "finetune"

    def left_s(self) -> float:
        """Seconds until the deadline, as rank 0's clock has it. Every rank must call it."""
        return self.ranks.on_main(lambda: self.deadline_s - time.monotonic())

    def prepare(self) -> None:
        """Writes the materials and chooses the seed. Every rank must call it. Raises PhaseError."""

        def make() -> tuple[int, Kinds]:
            write_materials(self.materials, self.ranks.size, self.slice)
            config = load(self._tiny("plan", "zero0")[2:], str(self.materials / "configs"))
            return choose_seed(config, self.ranks.size)

        self.seed, self.kinds = self.ranks.on_main(make)

    def train_tiny(self, name: str, engine: str, num_ranks: int, *more: str, **options: Any) -> Ended:
        """A run of the tiny model; `options` are those of `run`."""
        return self.run(name, ["train", *self._tiny(name, engine), *more], num_ranks, **options)

    def train_slice(self, name: str, *more: str, limit_s: float) -> Ended:
        """A run of the slice on all ranks."""
        shape = self.slice
        batch_size = 4 * self.ranks.size
        words = [
            *self._common(name),
            "model/language_model=accept_wide",
            "model/vision_tower=accept_wide",
            "mixture=accept_wide",
            "engine=zero2",
            f"stage.batch_size={batch_size}",
            "stage.learning_rates={vision_tower: 2.0e-6, projector: 2.0e-5, language_model: 2.0e-5}",
            "stage.max_length=4096" if self.device.is_gpu else "stage.max_length=1024",
            f"stage.epochs={6 * batch_size / max(32, batch_size):g}",
            f"packing.max_tokens={shape.max_tokens}",
        ]
        return self.run(name, ["train", *words, *more], self.ranks.size, limit_s=limit_s)

    def run(self, name: str, module: list[str], num_ranks: int, *, limit_s: float, **options: Any) -> Ended:
        """Runs a module on the first ranks, at most until the deadline. Every rank must call it.

        Raises:
            NotRun: the time was over before the run's own limit.
        """
        left_s = self.left_s()
        ended = run_children(
            self.ranks,
            [sys.executable, "-m", *module],
            num_ranks=num_ranks,
            limit_s=min(limit_s, left_s),
            logs=self.out / "logs" / name,
            **options,
        )
        if ended.timed_out and left_s < limit_s:
            raise NotRun(f"the time was over while {name} ran")
        return ended

    @property
    def limit_s(self) -> float:
        """Time limit of a tiny run: longer than its collectives wait, so that the trainer reports a hang by itself."""
        return 2 * self.timeout_s + 120.0

    def problem_of(self, ended: Ended, name: str) -> str:
        """Why a run did not succeed, in the trainer's own words where it left any; empty where it did."""
        if ended.succeeded:
            return ""
        lines = [f"{name} was still running after {ended.seconds:.0f} s"] if ended.timed_out else []
        reason = self.ranks.on_main(lambda: _exit_reason(self.run_dir(name) / "exit.json"))
        lines += [reason] if reason else []
        lines += [f"exit codes by rank: {ended.codes}", f"end of logs/{name}:", ended.tail.strip()]
        return "\n".join(lines)

    def needs_reference(self) -> None:
        """Raises NotRun where there is no run to compare with."""
        if not self.reference_ok:
            raise NotRun("the reference run on one rank did not succeed")

    def _tiny(self, name: str, engine: str) -> list[str]:
        return [
            *self._common(name),
            *_TINY,
            *_ENGINES[engine],
            f"stage.batch_size={self.sizes.batch_size}",
            f"seed={self.seed}",
            # Exact kernels on a GPU too; on a CPU they are what runs anyway.
            *(("attention=sdpa", "deterministic=true") if self.device.is_gpu else ()),
        ]

    def _common(self, name: str) -> list[str]:
        return [
            "--config-dir",
            str(self.materials / "configs"),
            f"root={self.out / 'runs'}",
            f"name={name}",
            f"data.store_root={self.materials / 'stores'}",
            "data.workers=1",
            "data.length_workers=1",
            "stage.init_from=null",
            "save.every=0",
            f"timeout_s={self.timeout_s}",
            f"device={'cuda' if self.device.is_gpu else 'cpu'}",
        ]


def _exit_reason(path: Path) -> str:
    """What the trainer wrote about its end; empty where it wrote nothing, or ended well."""
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    return "" if written["code"] == 0 else str(written["reason"])


def find_device(ranks: Ranks, out: Path) -> Device:
    """The device of this rank. CUDA is asked by a short child, so that this process holds no memory of the GPU.

    Raises:
        PhaseError: a rank's child could not ask.
    """
    if not any(ranks.gather(torch.cuda.is_available())):
        return Device("CPU")
    code = (
        "import json, os, torch; n = torch.cuda.device_count(); k = int(os.environ['LOCAL_RANK']) if n > 1 else 0; "
        "p = torch.cuda.get_device_properties(k); print(json.dumps([p.name, p.total_memory / 2**30]))"
    )
    logs = out / "logs" / "device"
    ended = run_children(ranks, [sys.executable, "-c", code], num_ranks=ranks.size, limit_s=120, logs=logs)
    if not ended.succeeded:
        raise PhaseError(f"a rank cannot ask for its GPU (exit codes {ended.codes}): {ended.tail.strip()}")
    name, memory_gib = json.loads((logs / f"rank_{ranks.rank:03d}.log").read_text().splitlines()[-1])
    return Device(name, memory_gib)
