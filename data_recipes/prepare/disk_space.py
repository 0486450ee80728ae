"""Estimates the disk space of stores and compares it with the free space before anything is written."""

import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes.raw.archives import member_size
from data_recipes.schema.sample import ArchiveMember, DataError, Reject
from data_recipes.writing.progress import format_bytes
from data_recipes.writing.sample_stream import WHOLE_SOURCE, Slice, TaggedRecord

_BYTES_PER_RECORD = 400  # temporary index, offsets and id
_BYTES_PER_STORE = 1 << 20
_SEEN_BITS = 1 << 26  # 8 MiB; 1.5 % of a million images collide


@dataclass(frozen=True)
class SpaceNeed:
    """Estimated size of one store or slice.

    Attributes:
        name: name of the store or slice in messages.
        num_records: number of records; None if they were not counted.
        num_bytes: size on the disk.
    """

    name: str
    num_records: int | None
    num_bytes: int


def estimate_space(
    names: Mapping[str, str], records: Iterable[TaggedRecord], raw_bytes: Callable[[], int], part: Slice = WHOLE_SOURCE
) -> list[SpaceNeed]:
    """Estimate the size of stores from the texts and image files of their records, without opening the images.

    If the raw files contain the images as bytes, counting them would read all of these files twice. The size of the raw
    folder is used instead.

    Args:
        names: {source of the stream: name of its store or slice}.
        records: the reader's records.
        raw_bytes: returns the size of the raw folder in bytes.
        part: the slice to prepare.
    """
    seen = bytearray(_SEEN_BITS // 8)
    num_records, num_bytes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for source, record in records:
        for name in names if source is None else (source,):
            num_records[name] += 1
            if isinstance(record, Reject) or not part.contains(num_records[name] - 1):
                continue
            if any(isinstance(image, bytes) for image in record.images):
                share = raw_bytes() // part.num_slices // len(names)
                return [SpaceNeed(title, None, share + _BYTES_PER_STORE) for title in names.values()]
            num_bytes[name] += sum(len(str(message.text)) for message in record.messages)
            files = (image for image in record.images if not isinstance(image, bytes))
            num_bytes[name] += sum(_size_once(name, file, seen) for file in files)
    needs = []
    for name, title in names.items():
        num_in_slice = num_records[name] // part.num_slices
        needs.append(
            SpaceNeed(title, num_in_slice, num_bytes[name] + num_in_slice * _BYTES_PER_RECORD + _BYTES_PER_STORE)
        )
    return needs


def check_space(needs: Sequence[SpaceNeed], folder: Path) -> str:
    """Compare the needed with the free disk space and return a message with both.

    Args:
        needs: the estimates.
        folder: the output folder, which need not exist.

    Raises:
        DataError: there is not enough free space.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = sum(need.num_bytes for need in needs)
    names = ", ".join(f"{need.name} {format_bytes(need.num_bytes)}" for need in needs)
    line = f"space: about {format_bytes(needed)} needed ({names}), {format_bytes(free)} free in {existing}"
    if needed > free:
        raise DataError(f"{line}, which is not enough. Free some space, or use another --stores.")
    return line


def _size_once(source: str, image: Path | ArchiveMember, seen: bytearray) -> int:
    """Return the size of a file, or 0 if it was already counted for this source or does not exist."""
    path = image if isinstance(image, Path) else image.archive / image.name
    bit = zlib.crc32(bytes(path), zlib.crc32(source.encode())) % _SEEN_BITS
    if seen[bit >> 3] & (1 << (bit & 7)):
        return 0
    seen[bit >> 3] |= 1 << (bit & 7)
    try:
        return image.stat().st_size if isinstance(image, Path) else member_size(image)
    except OSError:
        return 0
