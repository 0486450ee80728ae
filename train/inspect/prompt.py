"""An encoded sample as readable text: its ids decoded piece by piece, the tokens of each image as one piece."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers.decoders import DecodeStream

from llava_next.inputs.processor import IGNORE, SampleLayout


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` - 1: of one text token, of the few of one character, or of image number `image`."""

    text: str
    start: int
    stop: int
    is_supervised: bool = False
    is_special: bool = False
    image: int | None = None


def split_prompt(layout: SampleLayout, tokenizer: Any) -> list[Piece]:
    """The whole sample in order. The first token of a sample is never supervised: nothing predicts it."""
    supervised = layout.labels != IGNORE
    supervised[:1] = False
    special_ids = set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    image, position = 0, 0
    for is_image, group in groupby(layout.ids.tolist(), key=layout.image_token_id.__eq__):
        ids = list(group)
        stop = position + len(ids)
        while is_image and position < stop:  # neighbouring images are one run of the same token
            pieces.append(Piece("", position, position + layout.images[image].num_tokens, image=image))
            image, position = image + 1, pieces[-1].stop
        if not is_image:
            for text, start, end in _decode(ids, tokenizer):
                is_special = end == start + 1 and ids[start] in special_ids
                is_supervised = bool(supervised[position + end - 1])
                pieces.append(Piece(text, position + start, position + end, is_supervised, is_special))
        position = stop
    return pieces


def split_turns(pieces: list[Piece]) -> list[tuple[list[Piece], bool]]:
    """Runs of pieces that are supervised or not, and whether each is an answer: more than special tokens and space."""
    runs = [list(group) for _, group in groupby(pieces, key=lambda piece: piece.is_supervised)]
    return [(run, run[0].is_supervised and any(p.text.strip() and not p.is_special for p in run)) for run in runs]


def _decode(ids: list[int], tokenizer: Any) -> Iterator[tuple[str, int, int]]:
    """(text, start, stop) of each piece. A piece ends where its tokens make whole characters."""
    stream, start = DecodeStream(skip_special_tokens=False), 0
    for position, number in enumerate(ids):
        try:
            text = stream.step(tokenizer.backend_tokenizer, number)
        except Exception:  # bytes that are not a character; the stream cannot continue after them
            stream = DecodeStream(skip_special_tokens=False)
            text = tokenizer.decode(ids[start : position + 1])
        if text is not None:
            yield text, start, position + 1
            start = position + 1
    if start < len(ids):
        yield tokenizer.decode(ids[start:]), start, len(ids)
