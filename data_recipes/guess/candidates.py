"""Which readers, with which options, may fit what is in a raw folder. `trial.py` tries them."""

import glob
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_recipes.guess.first_records import find_image_root, read_first_records
from data_recipes.guess.folder_look import IMAGE_SUFFIXES, TAR_SUFFIXES, FolderLook
from data_recipes.raw.dataset_info import FILE_NAME
from data_recipes.readers.imagefolder import COLUMNS, FORMS
from data_recipes.schema.source import find_reader

_READERS = Path(__file__).parents[1] / "readers"
_JSON_READERS = ("messages_jsonl", "llava_json")
_PARQUET_READERS = ("messages_parquet", "llava_parquet")
_GENERAL = (*_JSON_READERS, *_PARQUET_READERS, "image_text_parquet", "imagefolder", "webdataset")
# Columns that the readers of conversations find by themselves.
_USUAL_TURNS = {"messages", "conversations", "conversation", "texts", "query", "instruction", "prompt", "question"}
_MAX_FILES = 8  # of each kind
_MAX_SIZES = 200
_MAX_INFO_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Candidate:
    """A reader with options.

    Attributes:
        reader: name of the reader.
        options: its options.
        file: the file or pattern that it reads, relative to the raw folder; empty for the layout of a publisher, which
            has several files.
    """

    reader: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""


def list_candidates(look: FolderLook) -> list[Candidate]:
    """Return the candidates for a folder, those that read the same file in the order of preference."""
    found = _info_candidates(look)
    for table in _select_tables(look):
        found += _table_candidates(look, table)
    for pattern, first in _group_shards(look.parquet, (".parquet",)).items():
        found += _parquet_candidates(look, pattern, first)
    for pattern in _group_shards(look.archives, TAR_SUFFIXES):
        found.append(Candidate("webdataset", {"shards": pattern}, pattern))
    return found


def list_published() -> list[Candidate]:
    """Return the readers of published layouts whose names of files are fixed, so that they need no options."""
    names = sorted(path.stem for path in _READERS.glob("[a-z]*.py") if path.stem not in _GENERAL)
    return [Candidate(name) for name in names if not _required_options(name)]


def _required_options(reader: str) -> list[str]:
    parameters = list(inspect.signature(find_reader("guess", reader)).parameters.values())[1:]
    return [each.name for each in parameters if each.default is each.empty and each.kind != each.VAR_KEYWORD]


def _select_tables(look: FolderLook) -> list[str]:
    """The tables that are most likely the annotations: metadata first, then by depth, then the largest."""

    def rank(table: str) -> tuple[bool, int, int, str]:
        is_metadata = Path(table).name.startswith("metadata.")
        try:
            size = (look.root / table).stat().st_size
        except OSError:
            size = 0
        return not is_metadata, table.count("/"), -size, table

    return sorted(look.tables[:_MAX_SIZES], key=rank)[:_MAX_FILES]


def _info_candidates(look: FolderLook) -> list[Candidate]:
    """The entries of LLaMA-Factory's `dataset_info.json`, which names the keys of the tables beside it."""
    try:
        with (look.root / FILE_NAME).open(encoding="utf-8-sig") as stream:
            entries = json.loads(stream.read(_MAX_INFO_CHARACTERS))
    except (OSError, ValueError, RecursionError):
        return []
    found: list[Candidate] = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        table = entry.get("file_name") if isinstance(entry, dict) else None
        if table in look.tables and len(found) < _MAX_FILES:
            folder = find_image_root(look, table, read_first_records(look.root / table))
            options = {"annotations": FILE_NAME, "dataset": name} | _image_root(folder, ".")
            found.append(Candidate("messages_jsonl", options, table))
    return found


def _table_candidates(look: FolderLook, table: str) -> list[Candidate]:
    records = read_first_records(look.root / table)
    folder = find_image_root(look, table, records)
    options: dict[str, Any] = {"metadata": table} | _image_root(folder, str(Path(table).parent))
    rows = [Candidate("imagefolder", options | _name_parts(records), table)]
    if table.endswith(".csv"):
        return rows
    options = {"annotations": table} | _image_root(folder, ".")
    return _order(
        records, [Candidate(name, options | _name_turns(name, records), table) for name in _JSON_READERS], rows
    )


def _parquet_candidates(look: FolderLook, pattern: str, first: str) -> list[Candidate]:
    records = read_first_records(look.root / first)
    folder = find_image_root(look, first, records)
    options: dict[str, Any] = {"shards": pattern} | _image_root(folder, ".")
    rows = [Candidate("image_text_parquet", options | _name_parts(records), pattern)]
    turns = [Candidate(name, options | _name_turns(name, records), pattern) for name in _PARQUET_READERS]
    return _order(records, turns, rows)


def _order(records: Sequence[Mapping[str, Any]], turns: list[Candidate], rows: list[Candidate]) -> list[Candidate]:
    """Order the readers of one file: those of conversations first, except for questions, which may have options."""
    keys = set(records[0]) if records else set()
    if "conversations" in keys:
        turns = turns[::-1]  # LLaVA's
    return rows + turns if "question" in keys else turns + rows


def _image_root(folder: str | None, default: str) -> dict[str, str]:
    return {} if folder is None or folder == default else {"image_root": folder}


def _name_turns(reader: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The option `columns` of a reader of conversations, where columns with turns or images have unusual names."""
    if not records or "columns" not in inspect.signature(find_reader("guess", reader)).parameters:
        return {}
    first = records[0]
    columns: dict[str, str] = {}
    if not _USUAL_TURNS & set(first):
        columns |= _name_only("messages", [name for name, value in first.items() if _is_turns(value)])
    if not {"image", "images"} & set(first):
        columns |= _name_only("images", [name for name, value in first.items() if _is_image(value)])
    return {"columns": columns} if columns else {}


def _name_parts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The option `columns` of a reader of rows, where the image or the only text have unusual names."""
    if not records:
        return {}
    first = records[0]
    usual = {part: [name for name in names if first.get(name) is not None] for part, names in COLUMNS.items()}
    columns: dict[str, str] = {}
    if not usual["images"]:
        columns |= _name_only("images", [name for name, value in first.items() if _is_image(value)])
    if not any(usual[form] for form in FORMS):
        strings = [name for name, value in first.items() if isinstance(value, str) and not _is_image(value)]
        texts = [name for name in strings if name != "id"]
        columns |= _name_only("text", texts)
    return {"columns": columns} if columns else {}


def _name_only(part: str, names: Sequence[str]) -> dict[str, str]:
    """{part: name} if there is one name only."""
    return {part: names[0]} if len(names) == 1 else {}


def _is_turns(value: object) -> bool:
    keys = set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def _is_image(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_image(value[0])
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or _is_image(value.get("path"))
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES))


def _group_shards(files: Sequence[str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """Group the shards of one table or split.

    Args:
        files: paths relative to the raw folder.
        suffixes: suffixes of shards; other files are left out.

    Returns:
        {glob pattern of a group: its first file}; training splits first, then by depth.
    """
    groups: dict[str, str] = {}
    for file in files:
        suffix = next((each for each in suffixes if file.lower().endswith(each)), None)
        if suffix is None:
            continue
        folder, slash, name = file.rpartition("/")
        numbered = re.fullmatch(r"(|.*?[-_.])\d{3,}(?:[-_.].*)?", name[: -len(suffix)])  # train-00000-of-00250
        pattern = f"{glob.escape(numbered[1])}*{name[-len(suffix) :]}" if numbered else glob.escape(name)
        groups.setdefault(glob.escape(folder) + slash + pattern, file)

    def rank(pattern: str) -> tuple[bool, int, str]:
        is_training = any(part.startswith("train") for part in pattern.split("/"))
        return not is_training, pattern.count("/"), pattern

    return {pattern: groups[pattern] for pattern in sorted(groups, key=rank)[:_MAX_FILES]}
