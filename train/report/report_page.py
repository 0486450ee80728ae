"""The values on the page of a report, which `train/html/templates/report.html` arranges."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.html.charts import Numbers
from train.observability.run_folder import Run
from train.observability.suite_results import SUITE_HEAD, suite_rows
from train.report.asked_questions import MAX_STEPS, evaluation_questions, live_questions
from train.report.comparison import compare
from train.report.curves import MAX_POINTS, charts_of, parts_of_time, predicted_gib, series, spikes_of

_FIGURES: tuple[tuple[str, str, Callable[[Numbers], Any]], ...] = (
    ("first_loss", "train/loss", lambda losses: losses[:10].mean()),
    ("loss", "train/loss", lambda losses: losses[-10:].mean()),
    ("hours", "perf/step_s", lambda seconds: seconds.sum() / 3600),
    ("tokens_per_s", "perf/tokens_per_s", np.median),
    ("mfu", "perf/mfu", np.median),
    ("memory_gib", "perf/max_memory_gib", np.max),
)


def page_values(runs: Sequence[Run], num_samples: int) -> dict[str, Any]:
    """The values of the template, with at most `num_samples` questions of the evaluation and of the training."""
    differences, equal = compare(runs)
    sources = dict.fromkeys(source for run in runs for source in run.evaluation.get("by_source") or {})
    evaluated = [("all", run.label, run.evaluation.get("all")) for run in runs]
    evaluated += [(s, run.label, (run.evaluation.get("by_source") or {}).get(s)) for s in sources for run in runs]
    times = [(run.label, {kind: float(s.sum()) for kind, (_, s) in parts_of_time(run).items()}) for run in runs]
    kinds = list(dict.fromkeys(kind for _, seconds in times for kind in seconds))
    return {
        "title": runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        "runs": runs,
        "differences": differences,
        "equal": equal,
        "summaries": [(run, _summary(run)) for run in runs],
        "charts": charts_of(runs),
        "max_points": MAX_POINTS,
        "spikes": [(run.label, spike) for run in runs for spike in spikes_of(run)],
        "times": [row for row in times if row[1]],
        "time_kinds": kinds,
        "time_columns": ["run", *(f"{kind}>" for kind in kinds)],
        "live_questions": live_questions(runs, num_samples),
        "max_steps": MAX_STEPS,
        "evaluated": [row for row in evaluated if row[2]],
        "has_base_views": any((row[2] or {}).get("base_view") is not None for row in evaluated),
        "suites": [(run.label, suite, suite_rows(suite)) for run in runs for suite in run.suites],
        "suite_columns": [SUITE_HEAD[0], *(f"{name}>" for name in SUITE_HEAD[1:5]), SUITE_HEAD[5]],
        "questions": evaluation_questions(runs, num_samples),
        "num_questions": len({(a.get("source"), a.get("id"), a.get("text")) for run in runs for a in run.answers}),
        "starts": [start for run in runs for start in _starts(run)],
    }


def _summary(run: Run) -> dict[str, float | None]:
    """Figures of the whole run; None where it has logged none."""
    figures: dict[str, float | None] = {"planned_gib": predicted_gib(run)}
    for name, key, reduce in _FIGURES:
        values = series(run, key)[1]
        figures[name] = float(reduce(values)) if len(values) else None
    return figures


def _starts(run: Run) -> list[tuple[str, dict[str, Any], str]]:
    """(the run, its line of starts.jsonl, the versions that changed since the start before) of every start."""
    rows, before = [], dict[str, str]()
    for start in run.starts:
        versions = {name: str(value) for name, value in (start.get("versions") or {}).items()}
        changed = [f"{name} {value}" for name, value in versions.items() if before.get(name) != value]
        rows.append((run.label, start, ", ".join(changed) or "as before"))
        before = versions
    return rows
