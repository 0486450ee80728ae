"""Reader of WebDataset shards: tar files in which the files of one sample follow each other and share a name.

    00000.tar:  0001.jpg  0001.json  0002.jpg  0002.txt ...

A sample is one or more images (`NAME.jpg`, or `NAME.0.jpg` and `NAME.1.jpg`) with `NAME.json`, an object with the parts
that `imagefolder.py` describes (a conversation, a question with its answer, a caption), or `NAME.txt`, a caption;
img2dataset writes both. NAME extends to the first dot of the file name. Shards may be compressed. They are read once,
from the beginning to the end, and nothing is unpacked.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path
from typing import Any

from data_recipes.raw.image_files import MAX_BYTES
from data_recipes.raw.parquet_records import find_shards
from data_recipes.readers.imagefolder import PROMPTS, RowLayout, convert_row
from data_recipes.schema.sample import Reason, Reject, Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXT_EXTENSIONS = ("json", "txt")
_MAX_TEXT_BYTES = 64 << 20


@dataclass
class _Group:
    """The files of one sample: (extension, bytes) in the order of the shard, and what is wrong with a bad one."""

    key: str
    files: list[tuple[str, bytes]] = field(default_factory=list)
    problem: tuple[Reason, str] | None = None


def samples(
    root: Path,
    shards: str = "**/*.tar",
    columns: Mapping[str, str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    suffix: str = "",
) -> Iterator[Sample | Reject]:
    """Yield one sample per name, shards sorted by name.

    A damaged shard is read up to the damage, which is one `Reject`.

    Args:
        root: the source's raw folder.
        shards: glob pattern of the tar files, relative to `root`.
        columns, prompts, suffix: see `imagefolder.RowLayout`, for the keys of the JSON files.

    Raises:
        DataError: there is no shard, or an option has an invalid value.
    """
    layout = RowLayout(columns or {}, prompts, suffix)
    for shard in find_shards(root, shards):
        for group in _iter_groups(shard):
            yield group if isinstance(group, Reject) else _convert_group(group, shard, layout)


def _convert_group(group: _Group, shard: Path, layout: RowLayout) -> Sample | Reject:
    name = group.key[-200:]
    location = f"{shard.name}, {name if name.isprintable() else repr(name)}"
    if group.problem is not None:
        return Reject(location, *group.problem, location)
    row: dict[str, Any] = {}
    texts = [(kind, data.decode("utf-8", "surrogateescape")) for kind, data in group.files if kind in _TEXT_EXTENSIONS]
    for kind, text in sorted(texts):  # .json before .txt
        if kind == "txt":
            # The caption, where the JSON has none. One that differs from the JSON's stays as a key that is no part.
            has_caption = any(row.get(name) is not None for name in layout.names("text"))
            if text.strip() not in row.values():
                row[".txt" if has_caption else layout.names("text")[0]] = text.strip()
            continue
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return Reject(location, Reason.BROKEN_RECORD, "its .json is not a JSON object", location)
        row |= value
    listed = layout.take(row, "images")  # the names of the images that follow as files
    images = [data for extension, data in sorted(group.files, key=_natural_order) if extension not in _TEXT_EXTENSIONS]
    if not images or (isinstance(listed, list) and len(listed) != len(images)):
        named = len(listed) if isinstance(listed, list) else 1
        detail = f"{len(images)} image files of this name follow each other where {named} belong"
        return Reject(location, Reason.IMAGE_MISSING, detail, location)
    row[layout.names("images")[0]] = images
    return convert_row(row, shard.parent, location, layout)


def _natural_order(file: tuple[str, bytes]) -> list[tuple[int, str]]:
    """Sort key of an extension in which 2.jpg precedes 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", file[0])]


class _Header(tarfile.TarInfo):
    """A header that tells its archive when the end has been read."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            if isinstance(archive, _Archive):
                archive.has_ended = True
            raise


class _Archive(tarfile.TarFile):
    """A tar file that knows whether it has ended: the library takes a missing or damaged header for the end."""

    tarinfo = _Header
    has_ended = False


def _iter_groups(shard: Path) -> Iterator[_Group | Reject]:
    """Yield the groups of files that follow each other with one name, and a `Reject` at the place of a damage."""
    group: _Group | None = None
    try:
        with _Archive.open(shard, "r|*") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # headers, kept for random access
                if member.isdir():
                    continue
                key, extension = _split_name(member.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                _add_file(group, archive, member, extension)
            if not archive.has_ended:
                raise tarfile.ReadError("the end of the archive is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, LZMAError) as error:
        place = f"from {group.key[-100:]!r} on" if group is not None else "from its beginning"
        detail = f"the shard cannot be read {place}: {str(error) or type(error).__name__}"[:200]
        yield Reject(shard.name, Reason.FILE_UNREADABLE, detail, shard.name)
        return
    if group is not None:
        yield group


def _add_file(group: _Group, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    kind = extension.rpartition(".")[2]
    limit = _MAX_TEXT_BYTES if kind in _TEXT_EXTENSIONS else MAX_BYTES
    problem = None
    if not member.isfile():
        problem = (Reason.BROKEN_RECORD, f"{_show(extension)} is a link or device, not a file")
    elif kind not in (*IMAGE_EXTENSIONS, *_TEXT_EXTENSIONS):
        problem = (Reason.BROKEN_RECORD, f"{_show(extension)} is neither an image nor .json or .txt")
    elif member.size > limit:
        reason = Reason.TOO_LONG if kind in _TEXT_EXTENSIONS else Reason.IMAGE_TOO_LARGE
        problem = (reason, f"{_show(extension)}: {member.size} bytes; the limit is {limit}")
    if problem is not None:
        group.problem = group.problem or problem
        return
    stream = archive.extractfile(member)
    assert stream is not None  # it is a file
    group.files.append((kind if kind in _TEXT_EXTENSIONS else extension, stream.read()))


def _show(extension: str) -> str:
    """An extension as one short line."""
    return f".{extension[:40]}" if extension.isprintable() else repr(extension[:40])


def _split_name(name: str) -> tuple[str, str]:
    """Split `a/0001.seg.PNG` to `a/0001` and `seg.png`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
