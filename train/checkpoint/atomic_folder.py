"""Folders of files that many ranks write: brought to the disk, summed up (sha256), and given their name when whole.

    NAME.partial/sums_rank_NNN.json   what rank N has sealed
    NAME/sums.json                    bytes and sha256 of every file: only a whole folder has it

Owns those files and names; what else lies in the folder is saver.py's.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llava_next.formats.atomic import PARTIAL, replace_directory, sync_path

_SUMS = "sums.json"


def place_of(partial: Path) -> Path:
    """The name that a whole folder gets."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def is_complete(place: Path) -> bool:
    """Whether the folder was given its name; whether its files are still what was written `corrupt_files` tells."""
    return (place / _SUMS).is_file()


def seal(partial: Path, rank: int) -> None:
    """Brings the files that this rank has written to the disk, and writes their sums down.

    Raises:
        OSError: the disk fails.
    """
    own = [path for path in _files(partial) if _owner(path.relative_to(partial)) == rank]
    sums = {path.relative_to(partial).as_posix(): file_sum(path, sync=True) for path in own}
    _write_synced(_rank_sums(partial, rank), json.dumps(sums))


def commit(partial: Path, num_ranks: int) -> Path:
    """Makes a whole folder of what every rank has sealed, in place of one that may have the name already.

    Raises:
        OSError: a rank has not, or the disk fails.
        ValueError: a file is there that no rank has summed up, or the other way round.
    """
    if not is_complete(partial):
        sums: dict[str, Any] = {}
        for rank in range(num_ranks):
            sums |= json.loads(_rank_sums(partial, rank).read_text())
        files = _files(partial)
        unsummed = {path.relative_to(partial).as_posix() for path in files} ^ set(sums)
        if unsummed:
            raise ValueError(f"no rank has written, or summed up, {', '.join(sorted(unsummed))}")
        unfinished = partial / f"{_SUMS}{PARTIAL}"
        _write_synced(unfinished, json.dumps(sums, indent=1, sort_keys=True) + "\n")
        unfinished.rename(partial / _SUMS)
    for rank in range(num_ranks):
        _rank_sums(partial, rank).unlink(missing_ok=True)
    for folder in sorted({path.parent for path in partial.rglob("*")}, reverse=True):  # the innermost first
        sync_path(folder)
    place = place_of(partial)
    replace_directory(place)  # one may exist from before the run went back to an earlier checkpoint
    return place


def corrupt_files(place: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """What is wrong with this rank's share of the files, the first of them by name; empty where nothing is.

    Every byte of them is read.
    """
    try:
        sums = json.loads((place / _SUMS).read_text())
        for name, expected in sorted(sums.items())[rank::num_ranks]:
            path = place / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, {expected['bytes']:,} were written"
            if file_sum(path) != expected:
                return f"{name} has other bytes than were written (sha256)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def file_sum(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """A file's `bytes` and `sha256`; `sync` brings it to the disk first."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(partial: Path) -> list[Path]:
    return [path for path in sorted(partial.rglob("*")) if path.is_file() and not path.name.startswith("sums")]


def _owner(name: Path) -> int:
    """The rank that has written a file: DeepSpeed's names say it, the others are the first rank's."""
    found = re.search(r"(?:zero_pp_rank_|offloaded_tensors/rank)(\d+)", name.as_posix())
    return int(found.group(1)) if found else 0


def _rank_sums(partial: Path, rank: int) -> Path:
    return partial / f"sums_rank_{rank:03d}.json"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
