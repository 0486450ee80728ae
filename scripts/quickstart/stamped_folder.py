"""Folders that are complete or absent: written beside their place, stamped with what they are made of, and renamed."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def is_current(stamp_file: Path, stamp: Mapping[str, object]) -> bool:
    """Whether a folder was made of exactly this."""
    try:
        return bool(json.loads(stamp_file.read_text()) == stamp)
    except (OSError, json.JSONDecodeError):
        return False


@contextmanager
def replaced_folder(stamp_file: Path, stamp: Mapping[str, object]) -> Iterator[Path]:
    """Yields an empty folder, which replaces the stamp file's folder at the end; after an error it is removed."""
    folder = stamp_file.parent
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / stamp_file.name).write_text(json.dumps(stamp, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
