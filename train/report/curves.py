"""Which numbers of metrics.jsonl are drawn, as lines in charts.

Owns the list of charts, and the thinning of long runs to what a chart can show.
Leaves how a chart looks to `charts.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from train.report.run_folder import Run

MOST_POINTS = 150
"""A longer line is drawn as the means of so many equal spans of steps, with a band from their lowest to highest."""
MOST_LINES = 8
"""More sources than that, or several runs, have a chart each."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Values by step, [n] each; `low` and `high` where they are means. `run` and `color` are numbers from 0."""

    label: str
    run: int
    color: int
    steps: Numbers
    values: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Chart:
    """One pair of axes. `floor`: zero belongs on the axis. `marks`: (run, step) of resumes. `is_stack`: areas on one
    another instead of lines. `level`: a number and its name that is drawn across."""

    title: str
    unit: str
    lines: list[Line]
    floor: bool = False
    marks: list[tuple[int, int]] = field(default_factory=list)
    is_stack: bool = False
    level: tuple[float, str] | None = None


def charts_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """All charts for which the runs have numbers, by heading."""
    speed = [
        _single(runs, "Tokens a second", "all ranks", "perf/tokens_per_s", floor=True),
        _single(runs, "Samples a second", "all ranks", "perf/samples_per_s", floor=True),
        _single(runs, "TFLOP/s a rank", "of the samples, no padding, no recompute", "perf/tflops_per_rank", floor=True),
        _single(runs, "MFU", "share of the card's dense bf16 rate", "perf/mfu", floor=True),
        _single(runs, "Balance of a step", "mean rank ÷ fullest", "perf/balance", floor=True),
    ]
    found = {
        "Loss": [
            _single(runs, "Loss", _weighting(runs), "train/loss"),
            *_by_key(runs, "train/loss/", "Loss by source", ""),
            *_by_key(runs, "eval/", "Held-out loss", "", ending="/loss"),
        ],
        "Rates and gradient": [
            *_by_key(runs, "lr/", "Learning rate", "", floor=True),
            _single(runs, "Norm of the gradient", "before clipping", "train/grad_norm"),
            *_by_key(runs, "train/grad_norm/", "Norm by part", "before clipping"),
        ],
        "Speed": speed,
        "Time and memory": [*_times(runs), _memory(runs)],
    }
    return {name: drawn for name, charts in found.items() if (drawn := [chart for chart in charts if chart.lines])}


def series(run: Run, key: str) -> tuple[Numbers, Numbers]:
    """(steps, values), [n] each, of the steps where there is a number."""
    pairs = [(line["step"], line[key]) for line in run.metrics if is_number(line.get(key))]
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def is_number(value: Any) -> bool:
    """Whether it can be drawn: null and true cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def parts_of_time(run: Run) -> dict[str, tuple[Numbers, Numbers]]:
    """Seconds of each step by kind, all kinds over the same steps. A save's seconds stand at the step after it."""
    steps, whole = series(run, "perf/step_s")
    at = {step: number for number, step in enumerate(steps.tolist())}
    kinds = {
        "forward and backward (slowest rank)": _at_steps(run, "perf/forward_backward_s", at),
        "waiting for data": _at_steps(run, "perf/data_wait_s", at),
        "rest of the step": np.zeros(len(steps)),
        "saves": _at_steps(run, "perf/save_s", at),
        "held-out loss and answers": _at_steps(run, "perf/evaluate_s", at),
    }
    inside = kinds["forward and backward (slowest rank)"] + kinds["waiting for data"]
    kinds["rest of the step"] = np.maximum(whole - inside, 0.0)
    return {name: (steps, values) for name, values in kinds.items() if values.any()}


def _at_steps(run: Run, key: str, at: dict[float, int]) -> Numbers:
    found = np.zeros(len(at))
    for step, value in zip(*(column.tolist() for column in series(run, key)), strict=True):
        if step in at:
            found[at[step]] = value
    return found


def _single(runs: Sequence[Run], title: str, unit: str, key: str, *, floor: bool = False) -> Chart:
    lines = [_line(run.label, number, number, *series(run, key)) for number, run in enumerate(runs)]
    return Chart(title, unit, [line for line in lines if len(line.steps)], floor, _marks(runs))


def _by_key(
    runs: Sequence[Run], prefix: str, title: str, unit: str, *, ending: str = "", floor: bool = False
) -> list[Chart]:
    """One chart of all sources or parts of a single run, else a chart of each with a line for every run."""
    keys = sorted({key for run in runs for line in run.metrics for key in line if _fits(key, prefix, ending)})
    names = {key: key.removeprefix(prefix).removesuffix(ending) for key in keys}
    if len(runs) == 1 and 1 < len(keys) <= MOST_LINES:
        lines = [_line(names[key], 0, number, *series(runs[0], key)) for number, key in enumerate(keys)]
        return [Chart(title, unit, [line for line in lines if len(line.steps)], floor, _marks(runs))]
    return [_single(runs, f"{title}: {names[key]}", unit, key, floor=floor) for key in keys]


def _fits(key: str, prefix: str, ending: str) -> bool:
    return key.startswith(prefix) and key.endswith(ending)


def _weighting(runs: Sequence[Run]) -> str:
    """What weighs alike in the loss, where it is the same in all runs."""
    words = {"token": "a supervised token", "sample": "every sample weighs alike"}
    found = {words.get(str(run.stage.get("loss_weighting")), "") for run in runs}
    return found.pop() if len(found) == 1 else ""


def _times(runs: Sequence[Run]) -> list[Chart]:
    if len(runs) > 1:
        return [
            _single(runs, "Seconds of a step", "", "perf/step_s", floor=True),
            _single(runs, "Forward and backward", "s, slowest rank", "perf/forward_backward_s", floor=True),
            _single(runs, "Waiting for data", "s", "perf/data_wait_s", floor=True),
        ]
    lines = [
        _line(name, 0, number, steps, values, has_band=False)
        for number, (name, (steps, values)) in enumerate(parts_of_time(runs[0]).items())
    ]
    return [Chart("Seconds of a step", "saves at the step after them", lines, True, is_stack=True)]


def _memory(runs: Sequence[Run]) -> Chart:
    chart = _single(runs, "Memory of rank 0", "GiB, the most so far", "perf/max_memory_gib", floor=True)
    planned = predicted_gib(runs[0]) if len(runs) == 1 else None
    level = None if planned is None else (planned, f"planned: {planned:.1f} GiB")
    return Chart(chart.title, chart.unit, chart.lines, True, chart.marks, level=level)


def predicted_gib(run: Run) -> float | None:
    """What `python -m train.plan --out RUN/plan.json` has foretold of this stage, in GiB a rank."""
    for stage in run.plan.get("stages") or []:
        if stage.get("stage") == run.stage.get("name"):
            value: Any = (stage.get("asked") or {}).get("memory_total_gib")
            return float(value) if is_number(value) else None
    return None


def _marks(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Where runs were resumed. A start at step 0 is none, nor is one of a finished run."""
    steps = dict.fromkeys((number, start.get("step")) for number, run in enumerate(runs) for start in run.starts)
    return [(n, step) for n, step in steps if isinstance(step, int) and 0 < step <= runs[n].metrics[-1]["step"]]


def _line(label: str, run: int, color: int, steps: Numbers, values: Numbers, *, has_band: bool = True) -> Line:
    if len(steps) <= MOST_POINTS:
        return Line(label, run, color, steps, values)
    bounds = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*bounds, len(steps)])
    means = np.add.reduceat(values, bounds) / counts
    low, high = np.minimum.reduceat(values, bounds), np.maximum.reduceat(values, bounds)
    middle = np.add.reduceat(steps, bounds) / counts
    return Line(label, run, color, middle, means, low, high) if has_band else Line(label, run, color, middle, means)
