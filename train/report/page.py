"""The page: one HTML file that stands alone, without a script, in which every text of a run is escaped.

Owns what stands on it and in which order. Charts are `charts.py`'s, tables `tables.py`'s.
"""

from collections.abc import Sequence

from train.html.escaping import shown
from train.html.table import write_table
from train.report import tables
from train.report.charts import draw, legend
from train.report.comparison import compare
from train.report.curves import MOST_POINTS, charts_of
from train.report.run_folder import Run
from train.report.samples import MOST_STEPS, Shown, live_of, samples_of
from train.report.style import STYLE

# Nothing is fetched and nothing runs, whatever a run's files may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(runs: Sequence[Run], num_samples: int) -> str:
    """The whole page; `num_samples` questions of the evaluation, and of a run's course, are shown at most."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<h1>{shown(title)}</h1>",
        *([f'<p class="runs">{legend([run.label for run in runs])}</p>', _differences(runs)] if len(runs) > 1 else []),
        _remarks(runs),
        _section("How it went" if len(runs) == 1 else "How they went", tables.overview(runs)),
        *_charts(runs),
        _live(runs, num_samples),
        _section("Evaluation", tables.evaluation(runs) or _told("No run has an evaluation.json.")),
        _samples(runs, num_samples),
        _section("Starts and resumes", tables.starts(runs)),
        _section("Steps left out", tables.left_out(runs) or _told("None: every loss and gradient was a number.")),
        _section("Data", "".join(_folded(runs, run, tables.mixture(run)) for run in runs)),
        _section("Configuration", "".join(_config(run) for run in runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _differences(runs: Sequence[Run]) -> str:
    found = compare(runs)
    rows = [[one.kind, one.name, *one.values] for one in found.differences]
    table = (
        write_table(("", "what differs", *(run.label for run in runs)), rows)
        if rows
        else _told("Nothing that is recorded.")
    )
    equal = _told(f"Equal: {', '.join(found.equal)}.") if found.equal else ""
    stages = {str(run.stage.get("name")) for run in runs}
    mixed = _told("They are of different stages: their steps have not the same data.") if len(stages) > 1 else ""
    return f'<h2>What differs</h2><div class="differs">{table}</div>{equal}{mixed}'


def _remarks(runs: Sequence[Run]) -> str:
    told = [f"{run.label}: {remark}" for run in runs for remark in run.remarks]
    return f'<div class="note">{"<br>".join(map(shown, told))}</div>' if told else ""


def _charts(runs: Sequence[Run]) -> list[str]:
    parts: list[str] = []
    number = 0
    long = any(len(run.metrics) > MOST_POINTS for run in runs)
    told = "A dotted upright line is a resume. Under the pointer stand the numbers."
    if long:
        told += f" Of runs of more than {MOST_POINTS} steps: means of equal spans, the band from lowest to highest."
    for heading, charts in charts_of(runs).items():
        drawn = []
        for chart in charts:
            drawn.append(draw(chart, number, marks_runs=len(runs) > 1))
            number += 1
        after = tables.times(runs) if heading == "Time and memory" else ""
        first = _told(told) if not parts else ""
        parts.append(f'<h2>{heading}</h2>{first}<div class="plots">{"".join(drawn)}</div>{after}')
    return parts


def _samples(runs: Sequence[Run], num: int) -> str:
    found = samples_of(runs, num)
    if not found:
        return ""
    total = len({(one.get("source"), one.get("id"), one.get("text")) for run in runs for one in run.answers})
    told = f"{len(found)} of {total:,} questions, evenly spaced; all are in evaluation.answers.jsonl."
    return _cards("Questions and answers", told, found, runs)


def _live(runs: Sequence[Run], num: int) -> str:
    found = live_of(runs, num)
    if not found:
        return ""
    steps = {len({answer["step"] for answer in run.live_answers}) for run in runs}
    told = f"{len(found)} of the held-out questions in answers.jsonl, answered greedily by the model as it stood then."
    if max(steps) > MOST_STEPS:
        told += f" At most {MOST_STEPS} answers of a run, evenly spaced."
    return _cards("Answers while it learned", told, found, runs)


def _cards(heading: str, told: str, found: Sequence[Shown], runs: Sequence[Run]) -> str:
    cards = "".join(_card(one, runs) for one in found)
    return f'<h2>{heading}</h2>{_told(told)}<div class="shots">{cards}</div>'


def _card(one: Shown, runs: Sequence[Run]) -> str:
    drawn = f'<img src="{one.url}" alt="the picture">' if one.picture else _told(f"No picture: {one.why}")
    facts = [("question", one.question), ("truth", one.truth)]
    for place, (number, answer, score) in enumerate(one.answers):
        name = "answer" if len(runs) == 1 else runs[number].label
        if one.steps:
            name = f"step {one.steps[place]}" + ("" if len(runs) == 1 else f", {runs[number].label}")
        facts.append((name, answer + ("" if score is None else f"  (score {score:.2f})")))
    rows = "".join(f"<dt>{shown(name)}</dt><dd>{shown(value)}</dd>" for name, value in facts)
    head = f'<div class="chips">{shown(one.source)} : {shown(one.id)}</div>'
    return f'<article>{head}{drawn}<dl class="facts">{rows}</dl></article>'


def _config(run: Run) -> str:
    return f"<details><summary>{shown(run.label)}: config.yaml</summary><pre>{shown(run.config_text)}</pre></details>"


def _folded(runs: Sequence[Run], run: Run, html: str) -> str:
    """Of one run open, of several folded."""
    if len(runs) == 1:
        return html
    return f"<details><summary>{shown(run.label)}</summary>{html}</details>"


def _section(heading: str, html: str) -> str:
    return f"<h2>{heading}</h2>{html}"


def _told(text: str) -> str:
    return f'<p class="faint">{shown(text)}</p>'
