"""The page: one static HTML file without a script, in which every text of the data is escaped.

Owns what stands on it and in which order; a sample is `sample_html.py`'s, a chart `histograms.py`'s.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data_recipes.store.reader import StoredText
from llava_next.inputs.processor import SampleLayout, SampleRejected
from train.html.escaping import shown
from train.html.stylesheet import STYLE
from train.html.table import write_table
from train.inspect.drawing import side_for
from train.inspect.histograms import curve, histogram
from train.inspect.length_distribution import LeftOut, Spread
from train.inspect.replay import Replay, compared
from train.inspect.sample_html import write_card
from train.inspect.sample_set import RunStep, Subject

# Nothing is fetched and nothing runs, whatever a text of the data may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_AROUND = 50
"""Steps before and after the one that is looked at, in the curve of the logged loss."""
_MOST_OPEN = 40
"""Longer tables of losses are folded."""
_KEY = "".join(
    [
        '<p class="faint key">In a picture: ',
        '<span><i style="background:#e0261a99"></i>dropped, no token shows it</span>',
        '<span><i style="border:1px dashed #caa800"></i>edge of the picture, padding around it</span>',
        '<span><i style="background:#fff;border:2px solid #0009"></i>cut between tiles</span>',
        "(under the pointer the drawing fades). In a prompt: ",
        '<span><i style="background:var(--answer)"></i>supervised</span>',
        '<span><i style="background:var(--special)"></i>special token</span>',
        '<span><i style="background:var(--picture)"></i>image tokens</span>↵ is a line break.',
    ]
)
_KEY_LOSSES = " The redder a token, the larger its loss; those underlined in dots were not the likeliest."

_Layouts = list[SampleLayout | None]


def write_page(subject: Subject, num: int | None, found: Replay | None) -> str:
    """The whole page.

    Args:
        num: at most so many samples are shown (None: all); highest loss first where there are losses.
        found: their losses, if they were run.

    Raises:
        DataError: a picture's bytes cannot be read.
    """
    losses = {loss.number: loss for loss in found.losses} if found else {}
    order = [*losses, *(number for number in range(len(subject.choices)) if number not in losses)]
    on_page = order[:num]
    texts = [choice.text() for choice in subject.choices]
    layouts = [_layout(subject, text) for text in texts]
    side = side_for(sum(len(layout.images) for n in on_page if (layout := layouts[n]) is not None))
    cards = []
    for number in on_page:
        choice = subject.choices[number]
        loss = losses.get(number)
        cards.append(write_card(number, choice.read(), subject.processor, place=choice.place, loss=loss, side=side))
    some = f"{len(cards)} of {len(order)} samples" if len(cards) < len(order) else f"{len(cards)} samples"
    body = [
        f"<h1>{shown(subject.title)}</h1>",
        _facts(subject),
        *([_step(subject.run, texts, layouts)] if subject.run and subject.is_whole_step else []),
        *([_losses(found, set(on_page))] if found else []),
        _spread(subject.spread, layouts),
        _left_out(subject.left_out),
        f"<h2>{some}{', highest loss first' if found else ''}</h2>{_KEY}{_KEY_LOSSES if found else ''}</p>",
        *cards,
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(subject.title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _layout(subject: Subject, text: StoredText) -> SampleLayout | None:
    try:
        return subject.processor.layout(text.messages, text.sizes_hw)
    except SampleRejected:
        return None


def _facts(subject: Subject) -> str:
    """What decides how the samples look."""
    model, stage, processor = subject.config.model, subject.config.stage, subject.processor.config
    template = processor.template + (
        ", special tokens supervised everywhere" if processor.unmask_special_tokens else ""
    )
    grids = ", ".join(f"{rows} × {cols}" for rows, cols in processor.grids)
    views = f"AnyRes, grids {grids} (rows × columns)" if processor.image_mode == "anyres" else processor.image_mode
    facts = [
        ("model", f"{model.language_model.name} behind {model.vision_tower.name}"),
        ("stage", f"{stage.name}, template {template}, at most {processor.max_length:,} tokens"),
        ("views", f"{views}; tiles of {processor.tile} pixels, {processor.patches_per_side**2} image tokens each"),
    ]
    if subject.run:
        facts += _logged(subject.run)
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{shown(value)}</dd>" for name, value in facts)}</dl>'


def _logged(run: RunStep) -> list[tuple[str, str]]:
    names = ("train/loss", "train/grad_norm", "perf/step_s", "perf/balance")
    values = {name: run.logged.get(name) for name in names}
    values |= {name: value for name, value in run.logged.items() if name.startswith("lr/")}
    said = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
    return [("step", f"{run.step} of 0 to {run.num_steps - 1}"), ("logged", said or "nothing yet")]


def _step(run: RunStep, texts: Sequence[StoredText], layouts: _Layouts) -> str:
    """The step's sources, and the logged loss around it."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for text, layout in zip(texts, layouts, strict=True):
        if layout is not None:
            counts = (1, layout.num_tokens, layout.num_supervised, layout.num_tiles)
            sums[text.source] = [a + b for a, b in zip(sums[text.source], counts, strict=True)]
    rows = [
        [source, *(f"{count:,}" for count in counts), _number(run.logged.get(f"train/loss/{source}"))]
        for source, counts in sorted(sums.items())
    ]
    lines = [line for line in run.metrics if abs(line["step"] - run.step) <= _AROUND and line.get("train/loss")]
    drawn = curve("logged loss", [line["step"] for line in lines], [line["train/loss"] for line in lines], run.step)
    head = ("source", "samples", "tokens", "supervised", "tiles", "logged loss")
    return f'<h2>The step</h2><div class="charts">{write_table(head, rows)}{drawn}</div>'


def _losses(found: Replay, on_page: set[int]) -> str:
    rows = []
    for loss in found.losses:
        name = shown(f"{loss.source} : {loss.id}")
        share = found.part(loss) / found.total if found.total else 0.0
        numbers = (f"{loss.mean:.4f}", f"{len(loss.losses):,}", f"{loss.hits.mean():.0%}", f"{share:.1%}")
        link = f'<a href="#s{loss.number}">{name}</a>' if loss.number in on_page else name
        rows.append([link, *numbers])
    weigh = "every sample weighs alike" if found.weighting == "sample" else "every supervised token weighs alike"
    sentences = [found.weights, *([compared(found)] if found.step_loss is not None else [])]
    return (
        f"<h2>Loss of each sample, run alone</h2>"
        f'<div class="note">{"<br>".join(shown(sentence) for sentence in sentences)}</div>'
        f"<details{' open' if len(rows) <= _MOST_OPEN else ''}>"
        f"<summary>{len(rows)} samples, highest loss first; {weigh}</summary>"
        + write_table(("sample", "loss", "tokens", "likeliest", "share of the sum"), rows, escaped=True)
        + "</details>"
    )


def _spread(spread: Spread, layouts: _Layouts) -> str:
    there = [layout for layout in layouts if layout is not None]
    aspects = [image.size_hw[1] / image.size_hw[0] for layout in there for image in layout.images]
    charts = [
        histogram("tokens", _floats(spread.tokens), _floats([layout.num_tokens for layout in there])),
        histogram("supervised tokens", _floats(spread.supervised), _floats([one.num_supervised for one in there])),
        histogram("tiles", _floats(spread.tiles), _floats([layout.num_tiles for layout in there])),
        histogram("width ÷ height of pictures", spread.aspects, _floats(aspects), log=True),
    ]
    which = f"Of {spread.which}. Marks below an axis: the samples that are looked at."
    return f'<h2>Spread</h2><p class="faint">{shown(which)}</p><div class="charts">{"".join(charts)}</div>'


def _floats(values: Sequence[int] | Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _left_out(found: Sequence[LeftOut]) -> str:
    parts = ["<h2>Left out</h2>"]
    for left_out in found:
        if left_out.counts:
            parts.append(f"<p>{left_out.counts.total():,} {shown(left_out.title)}</p>")
        for reason, number in left_out.counts.most_common():
            entries = left_out.first[reason]
            rows = [[str(e.get("place") or e.get("source") or ""), str(e["id"]), str(e["detail"])] for e in entries]
            some = f", the first {len(rows)} of them" if len(rows) < number else ""
            table = write_table(("from", "id", "why"), rows)
            parts.append(f"<details><summary>{shown(reason)}: {number:,}{some}</summary>{table}</details>")
    nothing = "; ".join(left_out.title for left_out in found if not left_out.counts)
    return "".join([*parts, f'<p class="faint">none {shown(nothing)}</p>' if nothing else ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
