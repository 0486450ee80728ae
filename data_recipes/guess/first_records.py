"""The first records of a raw file as they are, and the folder that their image names are relative to."""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_recipes.guess.folder_look import ARCHIVE_SUFFIXES, IMAGE_SUFFIXES, FolderLook
from data_recipes.guess.time_limit import OutOfTime, time_limit
from data_recipes.raw.conversation_keys import RecordKeys
from data_recipes.raw.image_files import ImageError, load_image, resolve_image
from data_recipes.raw.json_records import iter_records
from data_recipes.readers.imagefolder import iter_table
from data_recipes.schema.sample import DataError, Reject

_NUM_RECORDS = 16
_MAX_RECORDS = 1000  # until one names an image: a file may begin with texts
_RECORD_KEYS = RecordKeys().record_keys()
_NUM_IMAGE_NAMES = 4
_MAX_FOLDERS = 300
_MAX_PARENTS = 3
_SECONDS = 30.0
_READ_SECONDS = 5.0  # records may have megabytes of base64 text


def read_first_records(path: Path) -> list[dict[str, Any]]:
    """Return the first records of a .json, .jsonl, .csv or .parquet file, without those that cannot be parsed.

    If none of them names an image, the next record of a JSON file that does follows. A list of turns is returned as
    `{"messages": turns}`.
    """
    found: list[dict[str, Any]] = []
    is_json = path.suffix.lower() in (".json", ".jsonl")
    rows = iter_records(path, (dict, list), record_keys=_RECORD_KEYS) if is_json else iter_table(path)
    with suppress(DataError, OSError, OutOfTime), time_limit(_READ_SECONDS):
        for number, (_, row) in enumerate(itertools.islice(rows, _MAX_RECORDS if is_json else _NUM_RECORDS)):
            if number == _NUM_RECORDS and any(_image_names(found)):
                break
            if isinstance(row, Reject):
                continue
            record = row if isinstance(row, dict) else {"messages": row}
            if number < _NUM_RECORDS:
                found.append(record)
            elif any(_image_names(record)):
                return [*found, record]
    return found


def describe_record(record: dict[str, Any], limit: int = 200) -> str:
    """Return a record as one line of JSON of at most `limit` characters; bytes are given by their number."""
    text = json.dumps(record, ensure_ascii=False, default=_describe_value)
    return shorten(text, limit)


def shorten(text: str, limit: int) -> str:
    """Return a text as one line of at most `limit` characters that can be printed."""
    line = " ".join(text[: 4 * limit].split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1].rstrip() + "…"


def find_image_root(look: FolderLook, table: str, records: Sequence[dict[str, Any]]) -> str | None:
    """Return the folder, relative to the look's, below which most of the first images of a table are.

    The folders are those that were looked at, for each archive the folder that it would be unpacked to, and `..`,
    `../..` and `../../..`, because some records name their images from the top of a repository.

    Returns:
        The folder; None if the records name no image, or if none of the images is found.
    """
    names = list(itertools.islice(_image_names(records), _NUM_IMAGE_NAMES))
    parent = str(Path(table).parent)
    packed = [_without_suffix(name) for name in look.archives]
    above = ["/".join([".."] * number) for number in range(1, _MAX_PARENTS + 1)]
    best, most = None, 0
    with suppress(OutOfTime), time_limit(_SECONDS):
        folders = [parent, ".", *look.folders[:_MAX_FOLDERS], *packed[:_MAX_FOLDERS], *above]
        for folder in dict.fromkeys(folders):
            num_found = sum(_is_found(look.root / folder, name) for name in names)
            if num_found > most:
                best, most = folder, num_found
            if most == len(names):
                break
    return best


def _image_names(value: object) -> Iterator[str]:
    """Yield the texts in a record, or in several, that look like the path of an image."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _image_names(each)
    elif isinstance(value, list):
        for each in value:
            yield from _image_names(each)
    elif isinstance(value, str) and len(value) < 300 and value.lower().endswith(IMAGE_SUFFIXES) and "\n" not in value:
        yield value


def _is_found(folder: Path, name: str) -> bool:
    try:
        image = resolve_image(name, folder)
        if isinstance(image, Path):
            return image.is_file()
        load_image(image)
    except (ImageError, DataError, OSError):
        return False
    return True


def _without_suffix(archive: str) -> str:
    return next(archive[: -len(suffix)] for suffix in ARCHIVE_SUFFIXES if archive.lower().endswith(suffix))


def _describe_value(value: object) -> str:
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else shorten(str(value), 60)
