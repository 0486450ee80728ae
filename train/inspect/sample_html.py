"""One sample as HTML: its pictures, its counts, and its prompt with what is supervised and what each token cost.

Owns how a sample is arranged. Pictures are `drawing.py`'s, the pieces of the prompt `prompt.py`'s.
"""

from data_recipes.store.reader import StoredSample
from llava_next.inputs.processor import IGNORE, Example, Processor, SampleRejected
from train.html.escaping import shown
from train.inspect.drawing import describe_picture, draw_picture
from train.inspect.prompt import Piece, answers_of, pieces_of
from train.inspect.replay import SampleLoss
from train.inspect.sample_set import encoded

_LOSS_OF_FULL_SHADE, _FULL_SHADE = 8.0, 0.7
"""A token of this loss and above is as red as one gets; its text must stay legible."""


def write_card(
    number: int, sample: StoredSample, processor: Processor, *, place: str, loss: SampleLoss | None, side: int
) -> str:
    """One sample.

    Args:
        number: of the sample on its page, for links.
        place: which rank and micro-step had it.
        loss: what it cost, if it was run.
        side: the longest side of an embedded picture, in pixels.

    Raises:
        DataError: a picture's bytes cannot be read.
    """
    head = f'<article id="s{number}"><h3>{shown(sample.source)} : {shown(sample.id)}</h3>'
    example = encoded(processor, sample)
    if isinstance(example, SampleRejected):
        return f"{head}{_rejected(sample, example)}</article>"
    return "".join(
        [
            head,
            f'<div class="chips">{_chips(example, place, loss)}</div>',
            *_pictures(number, sample, example, processor, side),
            f'<div class="prompt">{_prompt(example, processor, loss)}</div></article>',
        ]
    )


def _chips(example: Example, place: str, loss: SampleLoss | None) -> str:
    layout = example.layout
    num_image_tokens = sum(image.num_tokens for image in layout.images)
    chips = [
        f"{layout.num_tokens:,} tokens",
        f"{num_image_tokens:,} of pictures",
        f"{layout.num_tokens - num_image_tokens:,} of text",
        f"<b>{layout.num_supervised:,} supervised</b>",
        f"{layout.num_tiles} tile{'' if layout.num_tiles == 1 else 's'}",
    ]
    if layout.num_rounds_cut:
        chips.append(f"<b>{layout.num_rounds_cut} last round(s) cut off, beyond stage.max_length</b>")
    if loss is not None:
        chips.append(f"<b>loss {loss.mean:.4f}</b> a supervised token, {loss.hits.mean():.0%} of them the likeliest")
    return " · ".join([*chips, *([place] if place else [])])


def _pictures(number: int, sample: StoredSample, example: Example, processor: Processor, side: int) -> list[str]:
    found, start = [], 0
    for index, image in enumerate(example.layout.images):
        tiles = example.tiles[start : start + image.num_tiles]
        start += image.num_tiles
        name = f"s{number}p{index}"
        drawn = draw_picture(image, tiles, sample.pictures[index], processor.config, name=name, side=side)
        found.append(f'<div class="faint">picture {index + 1}: {describe_picture(image)}</div>')
        found.append(f'<div class="views">{drawn}</div>')
    return found


def _prompt(example: Example, processor: Processor, loss: SampleLoss | None) -> str:
    layout = example.layout
    pieces = pieces_of(layout, processor.tokenizer)
    costs: dict[int, tuple[float, bool]] = {}
    if loss is not None:
        positions = (layout.labels[1:] != IGNORE).nonzero()[0] + 1
        costs = dict(zip(positions.tolist(), zip(loss.losses.tolist(), loss.hits.tolist(), strict=True), strict=True))
    turns = {run[0]: (count, run) for count, run in enumerate(answers_of(pieces), start=1)}
    html, open_mark = [], False
    for index, piece in enumerate(pieces):
        if piece.supervised != open_mark:
            html.append("<mark>" if piece.supervised else "</mark>")
            open_mark = piece.supervised
        if index in turns:
            html.append(_turn(*turns[index], pieces, costs))
        html.append(_piece(piece, costs))
    return "".join(html) + ("</mark>" if open_mark else "")


def _turn(count: int, run: range, pieces: list[Piece], costs: dict[int, tuple[float, bool]]) -> str:
    positions = range(pieces[run[0]].start, pieces[run[-1]].stop)
    said = f"answer {count}: {len(positions)} supervised"
    if costs:
        said += f", loss {sum(costs[position][0] for position in positions) / len(positions):.3f}"
    return f'<span class="turn">{said}</span>'


def _piece(piece: Piece, costs: dict[int, tuple[float, bool]]) -> str:
    if piece.picture is not None:
        return f'<span class="picture">picture {piece.picture + 1}: {piece.num_tokens:,} image tokens</span>'
    text = shown(piece.text).replace("\n", '<span class="break">↵</span>\n')
    if piece.special:
        text = f'<span class="special">{text}</span>'
    known = [costs[position] for position in range(piece.start, piece.stop) if position in costs]
    if not known:
        return text
    loss = sum(value for value, _ in known)
    missed = "" if all(hit for _, hit in known) else " miss"
    shade = _FULL_SHADE * min(1.0, loss / len(known) / _LOSS_OF_FULL_SHADE)
    return f'<span class="t{missed}" style="--a:{shade:.2f}" title="loss {loss:.3f}">{text}</span>'


def _rejected(sample: StoredSample, rejected: SampleRejected) -> str:
    turns = "\n".join(f"{message.role}: {message.text}" for message in sample.messages)
    sizes = ", ".join(f"{height} × {width}" for height, width in sample.sizes_hw) or "none"
    return (
        f'<div class="note">has no place in this stage: {rejected.reason.value}, {shown(rejected.detail)}</div>'
        f'<div class="chips">pictures (height × width): {sizes}</div><div class="prompt">{shown(turns)}</div>'
    )
