"""The report's tables: how each run went, where its time went, what was evaluated, left out, mixed and started.

Owns their columns; each function returns HTML, or nothing where no run has anything to tell.
"""

from collections.abc import Sequence

import numpy as np

from train.html.escaping import shown
from train.html.table import write_table
from train.report.curves import is_number, parts_of_time, predicted_gib, series
from train.report.run_folder import Run

_LAST = 10
_NONE = ""


def overview(runs: Sequence[Run]) -> str:
    """One line a run: how far it came, and its figures."""
    head = ("run", "steps", "loss, last 10", "h in steps", "tokens/s", "MFU", "GiB", "planned GiB", "ranks", "ended")
    rows = []
    for run in runs:
        _, losses = series(run, "train/loss")
        _, seconds = series(run, "perf/step_s")
        _, memory = series(run, "perf/max_memory_gib")
        planned = predicted_gib(run)
        rows.append(
            [
                run.label,
                f"{run.metrics[-1]['step'] + 1:,}",
                f"{losses[-_LAST:].mean():.4f}" if len(losses) else _NONE,
                f"{seconds.sum() / 3600:,.2f}" if len(seconds) else _NONE,
                _median(run, "perf/tokens_per_s", "{:,.0f}"),
                _median(run, "perf/mfu", "{:.1%}"),
                f"{memory.max():.1f}" if len(memory) else _NONE,
                _NONE if planned is None else f"{planned:.1f}",
                str(run.num_ranks or _NONE),
                _end(run),
            ]
        )
    notes = []
    if all(predicted_gib(run) is None for run in runs):
        notes.append("No planned memory; `python -m train.plan ... --out RUN/plan.json` adds it.")
    if not all(_median(run, "perf/mfu", "{}") for run in runs):
        notes.append("No MFU of a run on a CPU, or on a card whose rate train/observability/rates.py has not.")
    medians = "Tokens/s and MFU are medians of the steps."
    return write_table(head, rows) + f'<p class="faint">{shown(" ".join([medians, *notes]))}</p>'


def times(runs: Sequence[Run]) -> str:
    """Seconds by kind, summed over all steps."""
    found = [{name: float(values.sum()) for name, (_, values) in parts_of_time(run).items()} for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = []
    for run, one in zip(runs, found, strict=True):
        whole = sum(one.values())
        cells = [f"{one[name]:,.1f} s, {one[name] / whole:.1%}" if name in one else _NONE for name in names]
        if whole:
            rows.append([run.label, *cells])
    return write_table(("run", *names), rows) if rows else ""


def evaluation(runs: Sequence[Run]) -> str:
    """evaluation.json by source, a run below the other."""
    head = (
        "source",
        "run",
        "samples",
        "loss",
        "metric",
        "score",
        "its picture",
        "another's",
        "commonest",
        "difference",
    )
    sources = dict.fromkeys(source for run in runs for source in run.evaluation.get("by_source") or {})
    rows = [
        [source, run.label, *_figures(row)]
        for source in sources
        for run in runs
        if (row := (run.evaluation.get("by_source") or {}).get(source))
    ]
    rows += [["all", run.label, *_figures(row)] for run in runs if (row := run.evaluation.get("all"))]
    if not rows:
        return ""
    missing = [run.label for run in runs if not run.evaluation]
    told = f"Not evaluated: {', '.join(missing)}. " if missing else ""
    told += "Exact answers with its own picture, another one, and the commonest answer instead; 95 % interval."
    return write_table(head, rows) + f'<p class="faint">{shown(told)}</p>'


def starts(runs: Sequence[Run]) -> str:
    """Every start of each run, and every resume."""
    rows = []
    for run in runs:
        before: dict[str, str] = {}
        for start in run.starts:
            versions = {name: str(value) for name, value in (start.get("versions") or {}).items()}
            changed = [f"{name} {value}" for name, value in versions.items() if before.get(name) != value]
            before = versions
            where = f"{start.get('device', _NONE)}, {start.get('dtype', _NONE)}"
            told = ", ".join(changed) or "as before"
            cells = (start.get("step"), start.get("time"), start.get("origin"), start.get("ranks"))
            rows.append([run.label, *(_NONE if cell is None else str(cell) for cell in cells), where, told])
    table = write_table(("run", "from step", "when", "how", "ranks", "device", "versions"), rows) if rows else ""
    unknown = [run.label for run in runs if not run.starts]
    told = f"Without a starts.jsonl, so that resumes are not known: {', '.join(unknown)}" if unknown else ""
    return table + (f'<p class="faint">{shown(told)}</p>' if told else "")


def left_out(runs: Sequence[Run]) -> str:
    """Steps that were not applied, with their samples."""
    parts = []
    for run in runs:
        for step in run.left_out:
            samples = ", ".join(map(str, step.get("samples") or []))
            head = f"{run.label}, step {step.get('step')}: {step.get('what')} was not finite"
            parts.append(f"<details><summary>{shown(head)}</summary><p>{shown(samples)}</p></details>")
    return "".join(parts)


def mixture(run: Run) -> str:
    """data.json: counts of every source, and who was left out."""
    rows, here = run.data.get("mixture") or [], run.data.get("rejects_by_source") or {}
    head = ("source", "wanted", "found", "held out", "excluded", "used", "share", "left out", "by this run", "licence")
    cells = [
        [
            str(row.get("source")),
            *(_count(row.get(key)) for key in ("wanted", "found", "held_out", "excluded", "used")),
            f"{row['share']:.1%}" if is_number(row.get("share")) else _NONE,
            _reasons(row.get("rejects")),
            _reasons(here.get(row.get("source"))),
            str(row.get("licence") or _NONE),
        ]
        for row in rows
    ]
    told = ", ".join(f"{name.removeprefix('num_')} {_count(run.data.get(name))}" for name in run.data if "num_" in name)
    lost = _reasons(run.data.get("rejects"))
    facts = f"{told}; left out by this run: {lost or 'none'}; data {str(run.data.get('data_fingerprint'))[:12]}"
    return (write_table(head, cells) if cells else "") + f'<p class="faint">{shown(facts)}</p>'


def _figures(row: dict[str, object]) -> list[str]:
    def share(key: str, form: str = "{:.1%}") -> str:
        value = row.get(key)
        return form.format(value) if is_number(value) else _NONE

    interval = row.get("interval")
    difference = share("difference", "{:+.1%}")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        difference += f" ({interval[0]:+.1%} to {interval[1]:+.1%})"
    return [
        _count(row.get("num_samples")),
        share("loss", "{:.4f}"),
        str(row.get("metric") or _NONE),
        share("score"),
        *(share(key) for key in ("right_picture", "other_picture", "commonest_answer")),
        difference,
    ]


def _median(run: Run, key: str, form: str) -> str:
    _, values = series(run, key)
    return form.format(np.median(values)) if len(values) else _NONE


def _end(run: Run) -> str:
    if not run.end:
        return "no exit.json: it runs, or was killed"
    return f"{run.end.get('code')}: {run.end.get('reason')}"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _NONE


def _reasons(rejects: object) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in rejects.items()) if isinstance(rejects, dict) else ""
