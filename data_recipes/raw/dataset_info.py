"""Reads one entry of LLaMA-Factory's `dataset_info.json`, which names a data file and the keys of its records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_recipes.raw.conversation_keys import RecordKeys, read_columns
from data_recipes.schema.sample import DataError, describe_value

FILE_NAME = "dataset_info.json"
_ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "ranking", "split")
_TAGS = {"user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system", "system")}
_OTHER_TAGS = ("role_tag", "content_tag", "observation_tag", "function_tag")


def read_dataset_info(path: Path, dataset: str | None, columns: object = None) -> tuple[Path, RecordKeys]:
    """Return the data file of an entry and the keys of its records.

    Args:
        path: path of `dataset_info.json`; the data file is in the same folder.
        dataset: name of the entry.
        columns: the option `columns`, which precedes that of the entry.

    Raises:
        DataError: the file or the entry does not exist, or the entry is not that of a local file for supervised
            training.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; `annotations` names it.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {describe_value(str(error), 120)}.") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} is {describe_value(entries)}, but must be an object {{name of a dataset: its entry}}.")
    local = [name for name, entry in entries.items() if isinstance(entry, dict) and "file_name" in entry]
    origin = f"{path}: dataset {dataset!r}"
    if dataset is None or not isinstance(entries.get(dataset), dict):
        listed = ", ".join(local[:20]) or "none"
        problem = "`dataset` is not given" if dataset is None else f"there is no dataset {dataset!r}"
        raise DataError(f"{path}: {problem}; with a file in this folder: {listed}.")
    entry = entries[dataset]
    _check_entry(entry, origin)
    keys = read_columns({**_read_mapping(entry, "columns", origin), **read_columns(columns).columns})
    if entry.get("formatting") == "sharegpt":
        return path.parent / entry["file_name"], _read_tags(keys, _read_mapping(entry, "tags", origin), origin)
    return path.parent / entry["file_name"], keys


def _check_entry(entry: Mapping[str, Any], origin: str) -> None:
    """Raise DataError unless the entry is one of a local file for supervised training, with known keys only."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        hub = entry.get("hf_hub_url") or entry.get("ms_hub_url")
        where = f" It is on a hub, as {hub}: download it, and read its files." if isinstance(hub, str) else ""
        raise DataError(f"{origin} has no `file_name`.{where}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{origin}: `file_name` is {name!r}, but must be a path below the folder of the file.")
    if Path(name).suffix not in (".json", ".jsonl"):
        raise DataError(f"{origin}: `file_name` is {name!r}; only JSON is read here. Use messages_parquet for parquet.")
    if entry.get("ranking"):
        raise DataError(f"{origin} is a preference dataset (`ranking`), which is not read.")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise DataError(f"{origin}: `formatting` is {describe_value(entry['formatting'])}; known: alpaca, sharegpt.")
    if entry.get("split", "train") != "train":
        raise DataError(f"{origin}: `split` is {describe_value(entry['split'])}; a file has the split train only.")
    for key in entry:
        if key not in _ENTRY_KEYS and not key.endswith("_url"):
            raise DataError(f"{origin}: unknown key {key!r}; known: {', '.join(_ENTRY_KEYS)}.")


def _read_mapping(entry: Mapping[str, Any], key: str, origin: str) -> dict[str, str]:
    mapping = entry.get(key) or {}
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        raise DataError(f"{origin}: `{key}` is {describe_value(mapping)}, but must be an object of names.")
    return mapping


def _read_tags(keys: RecordKeys, tags: Mapping[str, str], origin: str) -> RecordKeys:
    """Add the names of roles and turn keys; those of tools need none, because such turns are rejected."""
    for tag in tags:
        if tag not in (*_TAGS, *_OTHER_TAGS):
            raise DataError(f"{origin}: unknown tag {tag!r}; known: {', '.join((*_TAGS, *_OTHER_TAGS))}.")
    speakers = {tags.get(tag, default): usual for tag, (default, usual) in _TAGS.items()}
    return RecordKeys(keys.columns, tags.get("role_tag", "from"), tags.get("content_tag", "value"), speakers)
