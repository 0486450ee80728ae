"""Lock files: which files were fetched from where, with revision, size and sha256, as JSON.

A lock file pins the revisions of repositories, so that a fetch that is continued, or repeated elsewhere, gets the same
files.
"""

import json
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_recipes.fetch.remote_file import Content, RemoteFile
from data_recipes.schema.sample import DataError
from data_recipes.store.durable import write_text_atomically

_FORMAT = 1


@dataclass(frozen=True)
class LockedFile:
    """What is recorded of a file; see `RemoteFile` for the attributes."""

    source: str
    path: str
    requested: str
    revision: str
    size: int
    sha256: str

    def as_remote(self, name: str) -> RemoteFile:
        """Return the file with the recorded revision and content."""
        return RemoteFile(name, self.source, self.path, self.requested, self.revision, self.size, self.sha256)


class LockFile:
    """A lock file that is read at the start and written whenever a file is complete. Threads may share it.

    Attributes:
        path: the file.
        files: what is recorded, by name.
    """

    def __init__(self, path: Path, files: dict[str, LockedFile]) -> None:
        self.path = path
        self.files = files
        self._mutex = threading.Lock()

    @classmethod
    def read(cls, path: Path, *, required: bool = False) -> "LockFile":
        """Read a lock file; one that does not exist is empty.

        Raises:
            DataError: it is damaged or of another format, or does not exist and is required.
        """
        if not path.is_file():
            if required or path.exists():
                raise DataError(f"{path} is not a lock file: there is no such file.")
            return cls(path, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise DataError(f"{path} has format {content['format']!r}; this version reads {_FORMAT}.")
            files = {str(name): _parse(values) for name, values in content["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a lock file of this program; remove it, or name another one.") from error
        return cls(path, files)

    def record(self, file: RemoteFile, content: Content) -> None:
        """Record a complete file and write the lock file; does nothing if it is recorded already."""
        entry = LockedFile(file.source, file.path, file.requested, file.revision, content.size, content.sha256)
        with self._mutex:
            if self.files.get(file.name) == entry:
                return
            self.files[file.name] = entry
            content_by_name = {name: asdict(self.files[name]) for name in sorted(self.files)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.path, json.dumps({"format": _FORMAT, "files": content_by_name}, indent=1) + "\n")

    def find_revision(self, source: str, requested: str) -> str | None:
        """Return the commit of a repository that is recorded for a branch, tag or commit; None if there is none."""
        wanted = (source, requested)
        return next((each.revision for each in self.files.values() if (each.source, each.requested) == wanted), None)

    def has(self, file: RemoteFile, size: int) -> bool:
        """Whether a file of this size is recorded as this published file, so that its content is known."""
        entry = self.files.get(file.name)
        if entry is None or entry.size != size or (entry.source, entry.path) != (file.source, file.path):
            return False
        if file.sha256 is not None:
            return entry.sha256 == file.sha256
        return entry.revision == file.revision and file.size in (None, size)


def _parse(values: dict[str, Any]) -> LockedFile:
    texts = {field.name: values[field.name] for field in fields(LockedFile) if field.name != "size"}
    if not all(isinstance(value, str) for value in texts.values()) or not isinstance(values["size"], int):
        raise ValueError
    return LockedFile(**texts, size=values["size"])
