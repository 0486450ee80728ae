"""A reader's stream, numbered: which records are a slice's, how far one has come, what to pass over.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_recipes.pictures import LoadedPicture, PicturePool
from data_recipes.sample import Reject, Sample, check

Loaded = tuple[Sample, list[LoadedPicture]] | Reject


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
    """The records of a slice that lie behind `start`, each with the mark behind it."""

    def __init__(
        self, records: Iterable[Sample | Reject], root: Path, part: Slice = WHOLE, start: Mark | None = None
    ) -> None:
        """`root` is the raw folder: the digest has pictures' paths below it, so it is the same wherever it lies."""
        self._records = records
        self._root = f"{root}/"
        self._part = part
        self._start = start or Mark()

    def load(self, pool: PicturePool) -> Iterator[tuple[Mark, Loaded | None]]:
        """Yield (mark behind it, record with its pictures), in order; last the mark at the stream's end, and None.

        Raises:
            StreamChangedError: at the first record, if what lies before `start` is not what it was.
        """
        marks: deque[Mark] = deque()
        for loaded in pool.load_in_order(self._own(marks)):
            yield marks.popleft(), loaded
        yield marks.popleft(), None

    def _own(self, marks: "deque[Mark]") -> Iterator[Sample | Reject]:
        number, digest = 0, b""
        for item in self._records:
            digest = hashlib.sha256(digest + self._canonical(item)).digest()
            number += 1
            if number <= self._start.num_records:
                if number == self._start.num_records:
                    self._compare(digest)
            elif self._part.has(number - 1):
                marks.append(Mark(number, digest.hex()))
                yield (check(item) or item) if isinstance(item, Sample) else item
        if number < self._start.num_records:
            raise StreamChangedError
        marks.append(Mark(number, digest.hex()))

    def _compare(self, digest: bytes) -> None:
        if digest.hex() != self._start.digest:
            raise StreamChangedError

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
