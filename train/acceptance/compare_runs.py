"""Compares two runs: the loss and gradient norm of every step, and every exported tensor.

In fp32, two runs on the same samples differ only by the order of sums, which depends on the number of ranks, the
partitioning and the rows.
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
"""Largest relative difference of a step's loss, a step's gradient norm, a part's weights, and one tensor."""
TOLERANCE_REASON = (
    "fp32 sums in another order differ by 6e-8 per addition, and losses by 1e-7 to 1e-6. AdamW divides by the size of "
    "the gradient, so an element with a gradient near zero moves by its noise: little in a part, more in a bias that "
    "started at 0. Key biases are excluded, because softmax does not depend on them and their true gradient is zero"
)
_EXCLUDED_SUFFIX = "k_proj.bias"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a run from a reference. `problem` is empty if all are within the tolerances."""

    numbers: dict[str, Any]
    problem: str

    @property
    def summary(self) -> str:
        """The differences as text."""
        shown = {"loss": "losses", "grad_norm": "gradient norms", "weights": "weights"}
        return ", ".join(f"{shown[key]} {self.numbers[key]:.1e}" for key in shown if key in self.numbers)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the lines of a run's metrics.jsonl; empty if there is no such file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def compare_runs(run_dir: Path, reference_dir: Path, tolerances: dict[str, float], *, weights: bool) -> Difference:
    """Compares the metrics of two runs, and with `weights` also their export/.

    Args:
        tolerances: by key, as in `TOLERANCES`.
    """
    lines, expected = read_metrics(run_dir), read_metrics(reference_dir)
    if [line["step"] for line in lines] != [line["step"] for line in expected] or not lines:
        return Difference({}, f"the run has {len(lines)} steps, the reference {len(expected)}")
    numbers: dict[str, Any] = {"steps": len(lines), "losses": [line["train/loss"] for line in lines]}
    for name, key in (("loss", "train/loss"), ("grad_norm", "train/grad_norm")):
        numbers[name] = max(_compute_relative_difference(a[key], b[key]) for a, b in zip(lines, expected, strict=True))
    equal_keys = ("train/samples", "train/supervised_tokens", "train/input_tokens", "train/tiles")
    for key in equal_keys:
        if [line[key] for line in lines] != [line[key] for line in expected]:
            return Difference(numbers, f"{key} differs from the reference: the steps have other samples")
    if weights:
        numbers |= _compare_weights(run_dir / "export", reference_dir / "export")
    problems = []
    for name, tolerance in tolerances.items():
        if name in numbers and not numbers[name] <= tolerance:
            at = f" ({numbers['worst_tensor']})" if name == "tensor" else ""
            problems.append(f"{name} differs by {numbers[name]:.1e}{at}, tolerance {tolerance:.0e}")
    return Difference(numbers, "; ".join(problems))


def _compute_relative_difference(value: float | None, expected: float | None) -> float:
    if value is None or expected is None:  # non-finite numbers are null in JSON
        return math.inf
    return abs(value - expected) / max(abs(expected), 1e-30)


def _compare_weights(export: Path, reference: Path) -> dict[str, Any]:
    """Returns ‖a - b‖ / ‖b‖ of the worst part and of the worst tensor; key biases are excluded."""
    a, b = read_folder(export), read_folder(reference)
    if a.keys() != b.keys():
        return {"weights": math.inf, "worst_tensor": f"{min(a.keys() ^ b.keys())} is in only one of them"}
    tensor_differences, norms_by_part = {}, defaultdict[str, list[tuple[float, float]]](list)
    for name in sorted(a):
        if not name.endswith(_EXCLUDED_SUFFIX):
            value, expected = a[name].value().double(), b[name].value().double()
            norms = float((value - expected).norm()), float(expected.norm())
            tensor_differences[name] = _compute_ratio(*norms)
            norms_by_part[name.removeprefix("model.").partition(".")[0]].append(norms)
    part_differences = {
        part: _compute_ratio(*(math.hypot(*column) for column in zip(*norms, strict=True)))
        for part, norms in norms_by_part.items()
    }
    worst = max(tensor_differences, key=lambda name: tensor_differences[name])
    return {
        "weights": max(part_differences.values()),
        "tensor": tensor_differences[worst],
        "worst_tensor": worst,
        "parts": part_differences,
        "tensors": len(tensor_differences),
        "bit_equal": sum(torch.equal(a[name].value(), b[name].value()) for name in tensor_differences),
    }


def _compute_ratio(difference: float, size: float) -> float:
    """Returns difference / size; infinite if the difference is NaN, or if only the size is zero."""
    if math.isnan(difference) or (size == 0 and difference > 0):
        return math.inf
    return difference / size if size else 0.0
