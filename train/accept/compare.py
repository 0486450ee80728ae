"""Two runs compared: every step's loss and gradient norm, and every tensor of the exported weights.

In fp32 two runs of the same samples differ by the order of their sums alone: the number of ranks, the partitioning
and the rows decide who adds what.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_next.formats.tensors import read_folder

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "weights": 1e-5, "tensor": 1e-3}
"""Largest relative difference of a step's loss, of a step's gradient norm, of a part's weights, of one tensor."""
WHY = (
    "fp32 sums in another order: 6e-8 an addition, 1e-7 to 1e-6 in a loss. AdamW divides by the gradient's own size, "
    "so an element whose gradient is near zero moves by the noise: little in a part, more in a bias that began at 0. "
    "Key biases are left out: softmax does not depend on them, their true gradient is zero"
)
_NOISE = "k_proj.bias"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a run from a reference; `problem` is empty where all are tolerated."""

    numbers: dict[str, Any]
    problem: str

    @property
    def summary(self) -> str:
        shown = {"loss": "losses", "grad_norm": "gradient norms", "weights": "weights"}
        return ", ".join(f"{shown[key]} {self.numbers[key]:.1e}" for key in shown if key in self.numbers)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def compare_runs(run_dir: Path, reference_dir: Path, tolerances: dict[str, float], *, weights: bool) -> Difference:
    """Compares the metrics of two runs, and with `weights` their export/ too."""
    ours, theirs = read_metrics(run_dir), read_metrics(reference_dir)
    if [line["step"] for line in ours] != [line["step"] for line in theirs] or not ours:
        return Difference({}, f"the run has {len(ours)} steps, the reference {len(theirs)}")
    numbers: dict[str, Any] = {"steps": len(ours), "losses": [line["train/loss"] for line in ours]}
    for name, key in (("loss", "train/loss"), ("grad_norm", "train/grad_norm")):
        numbers[name] = max(_relative(a[key], b[key]) for a, b in zip(ours, theirs, strict=True))
    same = ("train/samples", "train/supervised_tokens", "train/input_tokens", "train/tiles")
    for key in same:
        if [line[key] for line in ours] != [line[key] for line in theirs]:
            return Difference(numbers, f"{key} differs from the reference's: the steps are not the same samples")
    if weights:
        numbers |= _weights_difference(run_dir / "export", reference_dir / "export")
    problems = []
    for name, most in tolerances.items():
        if name in numbers and not numbers[name] <= most:
            at = f" ({numbers['worst_tensor']})" if name == "tensor" else ""
            problems.append(f"{name} differs by {numbers[name]:.1e}{at}, tolerated is {most:.0e}")
    return Difference(numbers, "; ".join(problems))


def _relative(ours: float | None, theirs: float | None) -> float:
    if ours is None or theirs is None:  # JSON has no non-finite numbers
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


def _weights_difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """‖a - b‖ / ‖b‖ of the worst part and of the worst tensor, key biases left out."""
    a, b = read_folder(ours), read_folder(theirs)
    if a.keys() != b.keys():
        return {"weights": math.inf, "worst_tensor": f"{min(a.keys() ^ b.keys())} is in one of them only"}
    of_tensors, sums = {}, defaultdict[str, list[tuple[float, float]]](list)
    for name in sorted(a):
        if not name.endswith(_NOISE):
            mine, reference = a[name].value().double(), b[name].value().double()
            norms = float((mine - reference).norm()), float(reference.norm())
            of_tensors[name] = _ratio(*norms)
            sums[name.removeprefix("model.").partition(".")[0]].append(norms)
    of_parts = {
        part: _ratio(*(math.hypot(*column) for column in zip(*norms, strict=True))) for part, norms in sums.items()
    }
    worst = max(of_tensors, key=lambda name: of_tensors[name])
    return {
        "weights": max(of_parts.values()),
        "tensor": of_tensors[worst],
        "worst_tensor": worst,
        "parts": of_parts,
        "tensors": len(of_tensors),
        "bit_equal": sum(torch.equal(a[name].value(), b[name].value()) for name in of_tensors),
    }


def _ratio(difference: float, size: float) -> float:
    """A relative difference; infinite where it is none (NaN), or the reference is zero and the other is not."""
    if math.isnan(difference) or (size == 0 and difference > 0):
        return math.inf
    return difference / size if size else 0.0
