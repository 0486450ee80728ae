"""An encoded sample as readable text: its ids decoded piece by piece, each picture's tokens as one piece.

Owns which text stands at which tokens, and what of it is supervised; how that looks is `samples_page.py`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers.decoders import DecodeStream

from llava_next.inputs.processor import IGNORE, SampleLayout


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of the few that make up one character; or a picture's tokens, `picture` from 0.

    Its tokens are those at `start` .. `stop` - 1.
    """

    text: str
    start: int
    stop: int
    supervised: bool
    special: bool = False
    picture: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


def pieces_of(layout: SampleLayout, tokenizer: Any) -> list[Piece]:
    """The whole sample in order. The first token of a sample is never supervised: nothing predicts it."""
    supervised = layout.labels != IGNORE
    supervised[:1] = False
    special_ids = set(tokenizer.all_special_ids)
    found: list[Piece] = []
    picture, position = 0, 0
    for is_picture, group in groupby(layout.ids.tolist(), key=layout.image_token_id.__eq__):
        ids = list(group)
        stop = position + len(ids)
        while is_picture and position < stop:  # neighbouring pictures are one run of the same token
            end = position + layout.images[picture].num_tokens
            found.append(Piece("", position, end, False, picture=picture))
            picture, position = picture + 1, end
        if not is_picture:
            for text, start, end in _decoded(ids, tokenizer):
                is_special = end == start + 1 and ids[start] in special_ids
                at = position + start
                found.append(Piece(text, at, position + end, bool(supervised[position + end - 1]), is_special))
        position = stop
    return found


def answers_of(pieces: list[Piece]) -> list[range]:
    """The answers, as numbers of pieces: supervised runs that hold more than special tokens and white space."""
    found, start = [], 0
    for supervised, group in groupby(pieces, key=lambda piece: piece.supervised):
        run = list(group)
        if supervised and any(piece.text.strip() and not piece.special for piece in run):
            found.append(range(start, start + len(run)))
        start += len(run)
    return found


def _decoded(ids: list[int], tokenizer: Any) -> Iterator[tuple[str, int, int]]:
    """Text, and the tokens from and to, of each piece. Tokens wait for one another until they make whole characters."""
    stream, start = DecodeStream(skip_special_tokens=False), 0
    for position, number in enumerate(ids):
        try:
            text = stream.step(tokenizer.backend_tokenizer, number)
        except Exception:  # bytes that are no character: no text has them, and the stream cannot go on
            stream = DecodeStream(skip_special_tokens=False)
            text = tokenizer.decode(ids[start : position + 1])
        if text is not None:
            yield text, start, position + 1
            start = position + 1
    if start < len(ids):
        yield tokenizer.decode(ids[start:]), start, len(ids)
