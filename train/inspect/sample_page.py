"""The values on the page of inspected samples, which `train/html/templates/samples.html` arranges."""

from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from llava_next.inputs.processor import IGNORE, SampleLayout, SampleRejected
from train.html.charts import Chart, Histogram, Line
from train.html.page import escape_text, jpeg_url
from train.html.views import canvas_of, side_for
from train.inspect.prompt import Piece, split_prompt, split_turns
from train.inspect.replay import Replay, SampleLoss
from train.inspect.sample_set import Subject, encode

_NUM_STEPS_AROUND = 50
"""Steps before and after the inspected one, in the curve of the logged loss."""
_LOSS_OF_FULL_SHADE, _FULL_SHADE = 8.0, 0.7
"""From this loss on, a token has the full shade of red; its text must remain legible."""


def page_values(subject: Subject, num: int | None, replayed: Replay | None) -> dict[str, Any]:
    """The values of the template.

    Args:
        subject: the samples, and what is known about them.
        num: at most so many samples are shown (None: all), with the highest loss first where there are losses.
        replayed: their losses, if they were computed.

    Raises:
        DataError: the bytes of an image cannot be read.
    """
    losses = {loss.number: loss for loss in replayed.losses} if replayed else {}
    shown = [*losses, *(number for number in range(len(subject.choices)) if number not in losses)][:num]
    layouts: dict[int, SampleLayout] = {}
    sources: dict[str, list[int]] = {}  # of a whole step: samples, tokens, supervised tokens and tiles
    for number, choice in enumerate(subject.choices):
        text = choice.samples.text(choice.number)
        try:
            layout = layouts[number] = subject.processor.layout(text.messages, text.sizes_hw)
        except SampleRejected:
            continue
        if subject.is_whole_step:
            counts = (1, layout.num_tokens, layout.num_supervised, layout.num_tiles)
            before = sources.get(text.source, [0] * len(counts))
            sources[text.source] = [a + b for a, b in zip(before, counts, strict=True)]
    side = side_for(sum(len(layouts[number].images) for number in shown if number in layouts))
    return {
        "title": subject.title,
        "subject": subject,
        "sources": dict(sorted(sources.items())),
        "curve": _loss_curve(subject),
        "replayed": replayed,
        "histograms": _histograms(subject, list(layouts.values())),
        "shown": shown,
        "cards": [_card(subject, number, losses.get(number), side) for number in shown],
    }


def _loss_curve(subject: Subject) -> list[Chart]:
    """The logged loss around the step, if at least two steps have logged one."""
    run = subject.run
    near = [line for line in run.metrics if abs(line["step"] - run.step) <= _NUM_STEPS_AROUND] if run else []
    pairs = [(line["step"], line["train/loss"]) for line in near if line.get("train/loss")]
    if run is None or len(pairs) < 2:
        return []
    steps, values = np.array(pairs, np.float64).T
    unit = f"from {values.min():.4f} to {values.max():.4f}"
    return [Chart("Logged loss", unit, [Line("loss", 0, 0, steps, values)], marked_step=run.step)]


def _histograms(subject: Subject, layouts: list[SampleLayout]) -> list[Histogram]:
    every = subject.distribution
    lengths = np.array(
        [(layout.num_tokens, layout.num_supervised, layout.num_tiles) for layout in layouts], float
    ).reshape(-1, 3)
    aspects = np.array([image.size_hw[1] / image.size_hw[0] for layout in layouts for image in layout.images], float)
    charts = [
        Histogram("tokens", every.tokens, lengths[:, 0]),
        Histogram("supervised tokens", every.supervised, lengths[:, 1]),
        Histogram("tiles", every.tiles, lengths[:, 2]),
        Histogram("width ÷ height of images", every.aspects, aspects, is_log=True),
    ]
    return [chart for chart in charts if len(chart.values)]


def _card(subject: Subject, number: int, loss: SampleLoss | None, side: int) -> dict[str, Any]:
    """A sample: its images, its counts, and its prompt with what is supervised and the loss of each token."""
    choice, processor = subject.choices[number], subject.processor
    sample = choice.samples.sample(choice.number)
    example = encode(processor, sample)
    card = {"number": number, "sample": sample, "where": choice.where, "loss": loss, "rejected": None}
    if isinstance(example, SampleRejected):
        return card | {"rejected": example}
    images, start = [], 0
    for image, encoded in zip(example.layout.images, sample.images, strict=True):
        tiles = example.tiles[start : start + image.num_tiles]
        start += image.num_tiles
        canvas = canvas_of(image, tiles, encoded)
        urls = [jpeg_url(Image.fromarray(pixels), side) for pixels in (canvas.pixels, tiles[0])]
        images.append((image, canvas, *urls))
    turns = _turns(example.layout, split_prompt(example.layout, processor.tokenizer), loss)
    return card | {"layout": example.layout, "images": images, "turns": turns}


def _turns(layout: SampleLayout, pieces: list[Piece], loss: SampleLoss | None) -> list[dict[str, Any]]:
    """The prompt in runs of pieces that are supervised or not; an answer has a label."""
    costs: dict[int, tuple[float, bool]] = {}  # loss, and whether the token was the likeliest one, by position
    if loss:
        positions = (layout.labels[1:] != IGNORE).nonzero()[0] + 1
        costs = dict(zip(positions.tolist(), zip(loss.losses.tolist(), loss.hits.tolist(), strict=True), strict=True))
    turns, num_answers = [], 0
    for run, is_answer in split_turns(pieces):
        label = ""
        if is_answer:
            num_answers += 1
            label = f"answer {num_answers}: {run[-1].stop - run[0].start} supervised"
            if costs:
                label += f", loss {np.mean([costs[at][0] for at in range(run[0].start, run[-1].stop)]):.3f}"
        turns.append(
            {"label": label, "is_supervised": run[0].is_supervised, "pieces": [_shade(piece, costs) for piece in run]}
        )
    return turns


def _shade(piece: Piece, costs: dict[int, tuple[float, bool]]) -> dict[str, Any]:
    """A piece with its visible line breaks, its loss, and how red it is."""
    known = [costs[position] for position in range(piece.start, piece.stop) if position in costs]
    losses = [value for value, _ in known]
    return {
        "text": Markup('<span class="break">↵</span>\n').join(map(escape_text, piece.text.split("\n"))),
        "is_special": piece.is_special,
        "image": None if piece.image is None else f"image {piece.image + 1}: {piece.stop - piece.start:,} image tokens",
        "loss": f"{sum(losses):.3f}" if losses else None,
        "is_missed": not all(hit for _, hit in known),
        "shade": f"{_FULL_SHADE * min(1.0, float(np.mean(losses)) / _LOSS_OF_FULL_SHADE):.2f}" if losses else None,
    }
