"""The state that all phases share: ranks, folder and deadline; and the command lines of their child runs."""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from train.acceptance.child_runs import ChildResult, run_children
from train.acceptance.generated_inputs import (
    NARROW_SLICE,
    WIDE_SLICE,
    ModelSlice,
    Sizes,
    compute_sizes,
    write_inputs,
)
from train.acceptance.ranks import PhaseError, Ranks
from train.acceptance.row_coverage import Kinds, select_seed
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
# With small buckets and thresholds, a tiny model is partitioned and reduced in many pieces, as a large one is.
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
_ENGINES["zero3_node"] = ("engine=zero3_node", *_ENGINES["zero3"][1:])
_SMALL_GPU_GIB = 40


class NotRun(Exception):
    """A phase was not run, or was ended by the time limit; the message says why."""


@dataclass
class Device:
    """The device of a rank: "CPU" or the name of the GPU, and the memory that programs see."""

    name: str
    memory_gib: float = 0.0

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"


@dataclass
class PhaseContext:
    """The state that phases share. It is equal on every rank except for `ranks` and `device`.

    Attributes:
        out: folder of the report.
        timeout_s: timeout of a child run's collectives, in seconds.
        deadline_s: end of the time limit on rank 0's monotonic clock, in seconds.
        seed: of the order in which the equality checks train.
        kinds: kinds of the rows in that order.
        reference_ok, slice_ok: whether the reference run and the run of the speed phase succeeded.
        links, disk_gb_s: measurements for the hardware file.
        checkpoint: the checkpoint that the export phase exports.
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
    def inputs(self) -> Path:
        """Folder of the generated models, stores and YAML files."""
        return self.out / "materials"

    @property
    def sizes(self) -> Sizes:
        return compute_sizes(self.ranks.size)

    @property
    def model_slice(self) -> ModelSlice:
        """The model of the speed phase, which depends on the memory of the device."""
        if not self.device.is_gpu:
            return NARROW_SLICE
        return (
            WIDE_SLICE if self.device.memory_gib >= _SMALL_GPU_GIB else replace(WIDE_SLICE, layers=2, max_tokens=4096)
        )

    def run_dir(self, name: str) -> Path:
        """Returns the run folder of a child run."""
        return self.out / "runs" / name / "finetune"

    def get_remaining_s(self) -> float:
        """Returns the seconds until the deadline on rank 0's clock. Every rank must call it."""
        return self.ranks.on_main(lambda: self.deadline_s - time.monotonic())

    def prepare(self) -> None:
        """Writes the inputs and selects the seed. Every rank must call it. Raises PhaseError."""

        def write_and_select() -> tuple[int, Kinds]:
            write_inputs(self.inputs, self.ranks.size, self.model_slice)
            config = load(self._list_tiny_overrides("plan", "zero0")[2:], str(self.inputs / "configs"))
            return select_seed(config, self.ranks.size)

        self.seed, self.kinds = self.ranks.on_main(write_and_select)

    def train_tiny(self, name: str, engine: str, num_ranks: int, *more: str, **options: Any) -> ChildResult:
        """Trains the tiny model; `options` are those of `run`."""
        return self.run(name, ["train", *self._list_tiny_overrides(name, engine), *more], num_ranks, **options)

    def train_slice(self, name: str, *more: str, limit_s: float) -> ChildResult:
        """Trains the slice of a full-size model on all ranks."""
        shape = self.model_slice
        batch_size = 4 * self.ranks.size
        arguments = [
            *self._list_common_arguments(name),
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
        return self.run(name, ["train", *arguments, *more], self.ranks.size, limit_s=limit_s)

    def run(self, name: str, module: list[str], num_ranks: int, *, limit_s: float, **options: Any) -> ChildResult:
        """Runs a module on the first `num_ranks` ranks, at most until the deadline. Every rank must call it.

        Raises:
            NotRun: the deadline passed before the run's own time limit.
        """
        remaining_s = self.get_remaining_s()
        result = run_children(
            self.ranks,
            [sys.executable, "-m", *module],
            num_ranks=num_ranks,
            limit_s=min(limit_s, remaining_s),
            logs=self.out / "logs" / name,
            **options,
        )
        if result.timed_out and remaining_s < limit_s:
            raise NotRun(f"--minutes passed while {name} was running")
        return result

    @property
    def limit_s(self) -> float:
        """Time limit of a tiny run; longer than the timeout of its collectives, so that the trainer reports a hang."""
        return 2 * self.timeout_s + 120.0

    def describe_failure(self, result: ChildResult, name: str) -> str:
        """Returns why a run failed, with the reason in its exit.json if there is one; empty if it succeeded."""
        if result.succeeded:
            return ""
        lines = [f"{name} was still running after {result.seconds:.0f} s"] if result.timed_out else []
        reason = self.ranks.on_main(lambda: _read_exit_reason(self.run_dir(name) / "exit.json"))
        lines += [reason] if reason else []
        lines += [f"exit codes by rank: {result.codes}", f"end of logs/{name}:", result.tail.strip()]
        return "\n".join(lines)

    def require_reference(self) -> None:
        """Raises NotRun if there is no reference run to compare with."""
        if not self.reference_ok:
            raise NotRun("the reference run on one rank did not succeed")

    def _list_tiny_overrides(self, name: str, engine: str) -> list[str]:
        return [
            *self._list_common_arguments(name),
            *_TINY,
            *_ENGINES[engine],
            f"stage.batch_size={self.sizes.batch_size}",
            f"seed={self.seed}",
            # Exact kernels on a GPU too; on a CPU they are the default.
            *(("attention=sdpa", "deterministic=true") if self.device.is_gpu else ()),
        ]

    def _list_common_arguments(self, name: str) -> list[str]:
        return [
            "--config-dir",
            str(self.inputs / "configs"),
            f"root={self.out / 'runs'}",
            f"name={name}",
            f"data.store_root={self.inputs / 'stores'}",
            "data.workers=1",
            "data.length_workers=1",
            "stage.init_from=null",
            "save.every=0",
            f"timeout_s={self.timeout_s}",
            "allow_idle_gpus=true",
            f"device={'cuda' if self.device.is_gpu else 'cpu'}",
        ]


def _read_exit_reason(path: Path) -> str:
    """Returns the reason in a run's exit.json; empty if there is no such file or the run succeeded."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    return "" if content["code"] == 0 else str(content["reason"])


def read_device(ranks: Ranks, out: Path) -> Device:
    """Returns the device of this rank. A child process queries CUDA, so that this process uses no GPU memory.

    Raises:
        PhaseError: the child process of a rank failed.
    """
    if not any(ranks.gather(torch.cuda.is_available())):
        return Device("CPU")
    code = (
        "import json, os, torch; n = torch.cuda.device_count(); k = int(os.environ['LOCAL_RANK']) if n > 1 else 0; "
        "p = torch.cuda.get_device_properties(k); print(json.dumps([p.name, p.total_memory / 2**30]))"
    )
    logs = out / "logs" / "device"
    result = run_children(ranks, [sys.executable, "-c", code], num_ranks=ranks.size, limit_s=120, logs=logs)
    if not result.succeeded:
        raise PhaseError(f"a rank could not query its GPU (exit codes {result.codes}): {result.tail.strip()}")
    name, memory_gib = json.loads((logs / f"rank_{ranks.rank:03d}.log").read_text().splitlines()[-1])
    return Device(name, memory_gib)
