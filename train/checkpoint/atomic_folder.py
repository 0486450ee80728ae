"""Folders that several ranks write, complete or absent: synced, with the sha256 of every file, and renamed at the end.

    NAME.partial/sums_rank_NNN.json   sizes and sha256 of the files of rank N
    NAME/sums.json                    the same of all files; only a complete folder has it

`saver.py` writes the other files.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llava_next.formats.atomic import PARTIAL, replace_directory, sync_path

_SUMS = "sums.json"


def final_path(partial: Path) -> Path:
    """Returns the path of the folder once it is complete."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def is_complete(folder: Path) -> bool:
    """Whether the folder was committed. `corrupt_files` checks whether its files have changed since."""
    return (folder / _SUMS).is_file()


def seal(partial: Path, rank: int) -> None:
    """Syncs the files of this rank and writes their sizes and sha256.

    Raises:
        OSError: the disk fails.
    """
    files = [path for path in _files(partial) if _owner(path.relative_to(partial)) == rank]
    sums = {path.relative_to(partial).as_posix(): file_sum(path, sync=True) for path in files}
    _write_synced(_rank_sums(partial, rank), json.dumps(sums))


def commit(partial: Path, num_ranks: int) -> Path:
    """Completes a folder that every rank has sealed, and renames it; an existing folder of that name is replaced.

    Returns:
        The path of the complete folder.

    Raises:
        OSError: a rank has not sealed its files, or the disk fails.
        ValueError: the files differ from those that the ranks have sealed.
    """
    if not is_complete(partial):
        sums: dict[str, Any] = {}
        for rank in range(num_ranks):
            sums |= json.loads(_rank_sums(partial, rank).read_text())
        files = _files(partial)
        different = {path.relative_to(partial).as_posix() for path in files} ^ set(sums)
        if different:
            raise ValueError(f"missing, or not sealed by any rank: {', '.join(sorted(different))}")
        unfinished = partial / f"{_SUMS}{PARTIAL}"
        _write_synced(unfinished, json.dumps(sums, indent=1, sort_keys=True) + "\n")
        unfinished.rename(partial / _SUMS)
    for rank in range(num_ranks):
        _rank_sums(partial, rank).unlink(missing_ok=True)
    for subfolder in sorted({path.parent for path in partial.rglob("*")}, reverse=True):  # the innermost first
        sync_path(subfolder)
    folder = final_path(partial)
    replace_directory(folder)  # one may exist from before the run went back to an earlier checkpoint
    return folder


def corrupt_files(folder: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """Checks every `num_ranks`-th file, beginning with number `rank`, by reading all of its bytes.

    Returns:
        A description of the first file that is missing or has changed; empty if there is none.
    """
    try:
        sums = json.loads((folder / _SUMS).read_text())
        for name, expected in sorted(sums.items())[rank::num_ranks]:
            path = folder / name
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
    """Returns a file's size (`bytes`) and `sha256`; with `sync`, the file is synced first."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(partial: Path) -> list[Path]:
    return [path for path in sorted(partial.rglob("*")) if path.is_file() and not path.name.startswith("sums")]


def _owner(name: Path) -> int:
    """Returns the rank that writes a file: DeepSpeed's names contain it, all other files are written by rank 0."""
    match = re.search(r"(?:zero_pp_rank_|offloaded_tensors/rank)(\d+)", name.as_posix())
    return int(match.group(1)) if match else 0


def _rank_sums(partial: Path, rank: int) -> Path:
    return partial / f"sums_rank_{rank:03d}.json"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
