"""Which numbers of metrics.jsonl are drawn, as lines in charts; long runs are thinned to what a chart can show."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from train.html.charts import Chart, Line, Numbers
from train.html.page import is_number
from train.observability.run_folder import Run

MAX_POINTS = 150
"""A longer line is drawn as the means of so many equal spans of steps, with a band from their lowest to highest."""
_MAX_LINES = 8
"""More sources than that, or several runs, have a chart each."""


class Spike(NamedTuple):
    """A step whose loss is a spike."""

    step: int
    loss: float
    score: float


def spikes_of(run: Run) -> list[Spike]:
    """The steps whose score is at least the run's `spike_threshold`."""
    threshold: Any = run.config.get("spike_threshold")
    if not is_number(threshold):
        return []
    losses = dict(zip(*(column.tolist() for column in series(run, "train/loss")), strict=True))
    scores = zip(*(column.tolist() for column in series(run, "train/loss_spike_score")), strict=True)
    return [Spike(int(step), losses[step], score) for step, score in scores if score >= threshold and step in losses]


def charts_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """All charts for which the runs have numbers, by heading."""
    memory = _chart(runs, "Memory of rank 0", "GiB, the most so far", "perf/max_memory_gib")
    if len(runs) == 1 and (planned := predicted_gib(runs[0])) is not None:
        memory = replace(memory, level=(planned, f"planned: {planned:.1f} GiB"))
    spikes = [(number, spike.step) for number, run in enumerate(runs) for spike in spikes_of(run)]
    charts = {
        "Loss": [
            replace(_chart(runs, "Loss", _weighting(runs), "train/loss", from_zero=False), ticks=spikes),
            *_charts_by_key(runs, "train/loss/", "Loss by source", "", from_zero=False),
            *_charts_by_key(runs, "eval/", "Held-out loss", "", suffix="/loss", from_zero=False),
            _score_chart(runs),
        ],
        "Learning rates and gradient": [
            *_charts_by_key(runs, "lr/", "Learning rate", ""),
            _chart(runs, "Norm of the gradient", "before clipping", "train/grad_norm", from_zero=False),
            *_charts_by_key(runs, "train/grad_norm/", "Norm by part", "before clipping", from_zero=False),
        ],
        "Speed": [
            _chart(runs, "Tokens per second", "all ranks", "perf/tokens_per_s"),
            _chart(runs, "Samples per second", "all ranks", "perf/samples_per_s"),
            _chart(runs, "TFLOP/s per rank", "samples only: no padding, no recompute", "perf/tflops_per_rank"),
            _chart(runs, "MFU", "share of the card's dense bf16 rate", "perf/mfu"),
            _chart(runs, "Balance of a step", "mean rank ÷ fullest", "perf/balance"),
        ],
        "Time and memory": [*_time_charts(runs), memory],
    }
    return {name: drawn for name, each in charts.items() if (drawn := [chart for chart in each if chart.lines])}


def series(run: Run, key: str) -> tuple[Numbers, Numbers]:
    """(steps, values), [n] each, of the steps where there is a number."""
    pairs = [(line["step"], line[key]) for line in run.metrics if is_number(line.get(key))]
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def parts_of_time(run: Run) -> dict[str, tuple[Numbers, Numbers]]:
    """Seconds of each step by kind, all kinds over the same steps. A save's seconds are at the step after it."""
    steps, whole = series(run, "perf/step_s")

    def at_steps(key: str) -> Numbers:
        seconds = dict(zip(*(column.tolist() for column in series(run, key)), strict=True))
        return np.array([seconds.get(step, 0.0) for step in steps.tolist()])

    forward_backward, wait = at_steps("perf/forward_backward_s"), at_steps("perf/data_wait_s")
    kinds = {
        "forward and backward (slowest rank)": forward_backward,
        "waiting for data": wait,
        "rest of the step": np.maximum(whole - forward_backward - wait, 0.0),
        "verification": at_steps("perf/verify_s"),
        "saves": at_steps("perf/save_s"),
        "held-out loss and answers": at_steps("perf/evaluate_s"),
    }
    return {name: (steps, values) for name, values in kinds.items() if values.any()}


def predicted_gib(run: Run) -> float | None:
    """What `python -m train.plan --out RUN/plan.json` has predicted for this stage, in GiB per rank."""
    for stage in run.plan.get("stages") or []:
        if stage.get("stage") == run.stage.get("name"):
            value: Any = (stage.get("asked") or {}).get("memory_total_gib")
            return float(value) if is_number(value) else None
    return None


def _chart(runs: Sequence[Run], title: str, unit: str, key: str, *, from_zero: bool = True) -> Chart:
    lines = [_line(run.label, number, number, *series(run, key)) for number, run in enumerate(runs)]
    return Chart(title, unit, [line for line in lines if len(line.steps)], from_zero, _resumes(runs))


def _score_chart(runs: Sequence[Run]) -> Chart:
    """The scores by which spikes are found, with the threshold where it is the same in all runs."""
    chart = _chart(
        runs, "Distance from the losses before", "in their spreads", "train/loss_spike_score", from_zero=False
    )
    thresholds = {run.config.get("spike_threshold") for run in runs}
    threshold: Any = thresholds.pop() if len(thresholds) == 1 else None
    return replace(chart, level=(float(threshold), f"spike_threshold={threshold:g}")) if is_number(threshold) else chart


def _charts_by_key(
    runs: Sequence[Run], prefix: str, title: str, unit: str, *, suffix: str = "", from_zero: bool = True
) -> list[Chart]:
    """One chart of all sources or parts of a single run, else a chart of each with a line for every run."""
    logged = {key for run in runs for line in run.metrics for key in line}
    keys = sorted(key for key in logged if key.startswith(prefix) and key.endswith(suffix))
    names = {key: key.removeprefix(prefix).removesuffix(suffix) for key in keys}
    if len(runs) == 1 and 1 < len(keys) <= _MAX_LINES:
        lines = [_line(names[key], 0, number, *series(runs[0], key)) for number, key in enumerate(keys)]
        return [Chart(title, unit, [line for line in lines if len(line.steps)], from_zero, _resumes(runs))]
    return [_chart(runs, f"{title}: {names[key]}", unit, key, from_zero=from_zero) for key in keys]


def _weighting(runs: Sequence[Run]) -> str:
    """What has equal weight in the loss, where it is the same in all runs."""
    words = {"token": "per supervised token", "sample": "every sample has equal weight"}
    weightings = {words.get(str(run.stage.get("loss_weighting")), "") for run in runs}
    return weightings.pop() if len(weightings) == 1 else ""


def _time_charts(runs: Sequence[Run]) -> list[Chart]:
    if len(runs) > 1:
        return [
            _chart(runs, "Seconds per step", "", "perf/step_s"),
            _chart(runs, "Forward and backward", "s, slowest rank", "perf/forward_backward_s"),
            _chart(runs, "Waiting for data", "s", "perf/data_wait_s"),
        ]
    parts = parts_of_time(runs[0])
    lines = [_line(name, 0, number, *parts[name]) for number, name in enumerate(parts)]
    return [Chart("Seconds per step", "saves at the step after them", lines, from_zero=True, is_stack=True)]


def _resumes(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """(run, step) of each resume. A start at step 0 is none, nor is one of a finished run."""
    steps = dict.fromkeys((number, start.get("step")) for number, run in enumerate(runs) for start in run.starts)
    return [(n, step) for n, step in steps if isinstance(step, int) and 0 < step <= runs[n].metrics[-1]["step"]]


def _line(label: str, run: int, color: int, steps: Numbers, values: Numbers) -> Line:
    if len(steps) <= MAX_POINTS:
        return Line(label, run, color, steps, values)
    bounds = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*bounds, len(steps)])
    means, middles = (np.add.reduceat(column, bounds) / counts for column in (values, steps))
    lowest, highest = np.minimum.reduceat(values, bounds), np.maximum.reduceat(values, bounds)
    return Line(label, run, color, middles, means, lowest, highest)
