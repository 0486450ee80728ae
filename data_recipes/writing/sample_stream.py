"""Numbers the records of a reader, selects slices, and resumes after a position.

A reader always starts at its first record, which takes seconds because it does not read images. A digest of all records
up to a position detects whether they have changed since an earlier run.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_recipes.raw.image_files import LoadedImage
from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.sample import ArchiveMember, ImageReference, Reject, Sample, check_sample

LoadedRecord = tuple[Sample, list[LoadedImage]] | Reject
"""A sample with its images, or a rejected record."""

TaggedRecord = tuple[str | None, Sample | Reject]
"""(source name, record); the name is None if the record applies to every source of the stream."""


class StreamPosition(NamedTuple):
    """A position in the stream of a source: the number of records before it, and their digest."""

    num_records: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Slice:
    """Every `num_slices`-th record of a stream: 3/32 contains the records 2, 34, 66, ..., counted from 0."""

    number: int = 1
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Parse a slice such as `3/32`; the first is 1/32, the last 32/32.

        Raises:
            ValueError: the text has another format, or the number is out of range.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is not a slice; use 1/32 to 32/32")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.num_slices}"

    def contains(self, record: int) -> bool:
        """Return whether the record with this number, counted from 0, belongs to the slice."""
        return record % self.num_slices == self.number - 1


WHOLE_SOURCE = Slice()


class StreamChangedError(Exception):
    """The records before a position differ from those of the earlier run."""


class NumberedStream:
    """The records of a slice after each source's start position, each with the position after it."""

    def __init__(
        self,
        records: Iterable[TaggedRecord],
        root: Path,
        starts: Mapping[str, StreamPosition],
        part: Slice = WHOLE_SOURCE,
    ) -> None:
        """Create the stream.

        Args:
            records: the reader's records, from the first one.
            root: the raw folder. The digest contains image paths relative to it, so it does not depend on its location.
            starts: {source: position after which records are yielded}.
            part: the slice.
        """
        self._records = records
        self._root = f"{root}/"
        self._starts = starts
        self._part = part

    def load(self, pool: ImagePool) -> Iterator[tuple[str, StreamPosition, LoadedRecord | None]]:
        """Yield (source, position after the record, record with its images) in order.

        At the end, (source, final position, None) is yielded for each source.

        Raises:
            StreamChangedError: the records before a start position have changed.
        """
        positions: deque[tuple[str, StreamPosition]] = deque()
        for loaded in pool.load_in_order(self._select_records(positions)):
            yield *positions.popleft(), loaded
        for name, position in positions:
            yield name, position, None

    def _select_records(self, positions: "deque[tuple[str, StreamPosition]]") -> Iterator[Sample | Reject]:
        progress = dict.fromkeys(self._starts, (0, b""))
        for source, item in self._records:
            canonical = self._canonical(item)
            for name in self._starts if source is None else (source,):
                number, digest = progress[name][0] + 1, hashlib.sha256(progress[name][1] + canonical).digest()
                progress[name], start = (number, digest), self._starts[name]
                if number < start.num_records:
                    continue
                if number == start.num_records:
                    if digest.hex() != start.digest:
                        raise StreamChangedError
                elif self._part.contains(number - 1):
                    positions.append((name, StreamPosition(number, digest.hex())))
                    yield (check_sample(item) or item) if isinstance(item, Sample) else item
        for name, (number, digest) in progress.items():
            if number < self._starts[name].num_records:
                raise StreamChangedError
            positions.append((name, StreamPosition(number, digest.hex())))

    def _canonical(self, item: Sample | Reject) -> bytes:
        # The text of `detail` is included, so changing a reader's error message changes the digest.
        if isinstance(item, Reject):
            value: list[object] = [item.id, item.reason, item.detail, item.location]
        else:
            images = [self._name_image(image) for image in item.images]
            messages = [[message.role, message.text] for message in item.messages]
            value = [item.id, messages, images, item.location, item.repairs]
        # ASCII escapes lone surrogates. `default=str` accepts values of wrong types from custom readers, which
        # `check_sample` rejects.
        return json.dumps(value, default=str).encode("ascii")

    def _name_image(self, image: ImageReference) -> str:
        """Name an image. A member of an archive has the name of the unpacked file, so unpacking changes no digest."""
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        if isinstance(image, ArchiveMember):
            image = image.path or image.archive / image.name
        return str(image).removeprefix(self._root)
