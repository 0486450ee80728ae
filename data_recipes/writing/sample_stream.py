"""A reader's stream, numbered for each source: which records are a slice's, how far one has come, what to pass over.

Owns: `Slice`, `Mark` (a place in a stream, with a digest of everything before it), the check of every sample's
messages, and handing samples to the processes that load their pictures.
Leaves: raw layouts to `readers/`, the rules on messages to `sample.py`, what is done with a record to the tables.

A reader is run from its first record each time, whatever is needed of it: that costs seconds, since no picture is
read, and the digest tells whether the records are the ones that an earlier run has met.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_recipes.raw.image_files import LoadedPicture
from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import Reject, Sample, check

Loaded = tuple[Sample, list[LoadedPicture]] | Reject

Named = tuple[str | None, Sample | Reject]
"""A record and the source that it belongs to; None for every source of the stream."""


class Mark(NamedTuple):
    """A place in a stream: so many records lie before it, and this is their digest."""

    num_records: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Slice:
    """Every `num_slices`-th record of a stream; 3/32 has records 2, 34, 66 and so on, counted from 0."""

    number: int = 1
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """A slice as the command line writes it: `3/32`, from 1/32 to 32/32.

        Raises:
            ValueError: it is written otherwise, or there is no such slice.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is no slice; write 1/32 to 32/32")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.num_slices}"

    def has(self, record: int) -> bool:
        """Whether record number `record`, counted from 0, is of this slice."""
        return record % self.num_slices == self.number - 1


WHOLE = Slice()


class StreamChangedError(Exception):
    """The records before a mark are not the ones that an earlier run has met."""


class NumberedStream:
    """Of each source the records of a slice that lie behind its start, each with the mark behind it."""

    def __init__(self, records: Iterable[Named], root: Path, starts: Mapping[str, Mark], part: Slice = WHOLE) -> None:
        """`root` is the raw folder: the digest has pictures' paths below it, so it is the same wherever it lies."""
        self._records = records
        self._root = f"{root}/"
        self._starts = starts
        self._part = part

    def load(self, pool: PicturePool) -> Iterator[tuple[str, Mark, Loaded | None]]:
        """Yield (source, mark behind it, record with its pictures), in order; last each source's end, and None.

        Raises:
            StreamChangedError: what lies before a source's start is not what it was.
        """
        marks: deque[tuple[str, Mark]] = deque()
        for loaded in pool.load_in_order(self._own(marks)):
            yield *marks.popleft(), loaded
        for name, mark in marks:
            yield name, mark, None

    def _own(self, marks: "deque[tuple[str, Mark]]") -> Iterator[Sample | Reject]:
        at = dict.fromkeys(self._starts, (0, b""))
        for source, item in self._records:
            canonical = self._canonical(item)
            for name in self._starts if source is None else (source,):
                number, digest = at[name][0] + 1, hashlib.sha256(at[name][1] + canonical).digest()
                at[name], start = (number, digest), self._starts[name]
                if number < start.num_records:
                    continue
                if number == start.num_records:
                    if digest.hex() != start.digest:
                        raise StreamChangedError
                elif self._part.has(number - 1):
                    marks.append((name, Mark(number, digest.hex())))
                    yield (check(item) or item) if isinstance(item, Sample) else item
        for name, (number, digest) in at.items():
            if number < self._starts[name].num_records:
                raise StreamChangedError
            marks.append((name, Mark(number, digest.hex())))

    def _canonical(self, item: Sample | Reject) -> bytes:
        if isinstance(item, Reject):
            value: list[object] = [item.id, item.reason, item.detail, item.place]
        else:
            pictures = [
                hashlib.sha256(picture).hexdigest()
                if isinstance(picture, bytes)
                else str(picture).removeprefix(self._root)
                for picture in item.pictures
            ]
            messages = [[message.role, message.text] for message in item.messages]
            value = [item.id, messages, pictures, item.place, item.repairs]
        # ASCII holds lone surrogates, and `str` what a reader of one's own may have put where a string belongs.
        return json.dumps(value, default=str).encode("ascii")
