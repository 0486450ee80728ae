"""How much room a store will need, told and compared with what is free before anything is written.

Owns: counting records and bytes ahead, the comparison.
Leaves: what counts as a picture's path to the readers; a disk that fills all the same to `writing/`.
"""

import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes.schema.sample import DataError, Reject
from data_recipes.writing.progress import readable
from data_recipes.writing.sample_stream import WHOLE, Named, Slice

_BYTES_PER_RECORD = 400  # index while it is written, offsets, id
_BYTES_PER_STORE = 1 << 20
_SEEN_BITS = 1 << 26  # 8 MiB whatever the number of pictures; a million share them with 1.5 % of collisions


@dataclass(frozen=True)
class Need:
    """What one store or slice takes: records (None: not counted) and bytes on the disk."""

    name: str
    num_records: int | None
    num_bytes: int


def survey(
    names: Mapping[str, str], records: Iterable[Named], raw_bytes: Callable[[], int], part: Slice = WHOLE
) -> list[Need]:
    """Count a reader's stream without opening a picture: file sizes, each path once, and the texts.

    Pictures that come as bytes out of the raw files are not counted one by one, since that would read all of those
    files twice: the whole raw folder, `raw_bytes`, stands for them.

    Args:
        names: the sources of the stream, and what each one's need is called.
        part: the slice that is made.
    """
    seen = bytearray(_SEEN_BITS // 8)
    num_records, num_bytes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for source, record in records:
        for name in names if source is None else (source,):
            num_records[name] += 1
            if isinstance(record, Reject) or not part.has(num_records[name] - 1):
                continue
            if any(isinstance(picture, bytes) for picture in record.pictures):
                share = raw_bytes() // part.num_slices // len(names)
                return [Need(shown, None, share + _BYTES_PER_STORE) for shown in names.values()]
            num_bytes[name] += sum(len(str(message.text)) for message in record.messages)
            paths = (picture for picture in record.pictures if isinstance(picture, Path))
            num_bytes[name] += sum(_size_once(name, path, seen) for path in paths)
    needs = []
    for name, shown in names.items():
        num_own = num_records[name] // part.num_slices
        needs.append(Need(shown, num_own, num_bytes[name] + num_own * _BYTES_PER_RECORD + _BYTES_PER_STORE))
    return needs


def check_space(needs: Sequence[Need], folder: Path) -> str:
    """The line that says what is needed and what is free below `folder`.

    Raises:
        DataError: it is not enough.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = sum(need.num_bytes for need in needs)
    names = ", ".join(f"{need.name} {readable(need.num_bytes)}" for need in needs)
    line = f"space: about {readable(needed)} needed ({names}), {readable(free)} free in {place}"
    if needed > free:
        raise DataError(f"{line}, which is not enough. Make room, or name another place with --stores.")
    return line


def _size_once(source: str, picture: Path, seen: bytearray) -> int:
    """The file's size, or 0 if it was counted for this source before or is not there."""
    bit = zlib.crc32(bytes(picture), zlib.crc32(source.encode())) % _SEEN_BITS
    if seen[bit >> 3] & (1 << (bit & 7)):
        return 0
    seen[bit >> 3] |= 1 << (bit & 7)
    try:
        return picture.stat().st_size
    except OSError:
        return 0
