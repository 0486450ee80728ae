"""An on-disk index of the images and samples in a store that is being written, and of its progress.

The index is a SQLite file instead of a dictionary, so that memory does not grow with the number of records. Its entries
and the progress are committed in one transaction.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote


class SeenIndex:
    """A temporary index on disk. If the process is killed, entries since the last `commit` are lost.

    Every method raises OSError if the disk is full or failing.
    """

    def __init__(self, path: Path) -> None:
        """Open the index in the state of the last `commit`, or create it."""
        self._path = path
        # SQLite's locks are disabled: the store has its own lock, and cluster file systems often do not support locks.
        self._db = sqlite3.connect(f"file:{quote(str(path))}?nolock=1", uri=True, isolation_level=None)
        self._run("PRAGMA cache_size=-16384")
        self._run("CREATE TABLE IF NOT EXISTS pictures (sha256 BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._run("CREATE TABLE IF NOT EXISTS samples (id TEXT, content BLOB, PRIMARY KEY (id, content)) WITHOUT ROWID")
        self._run("CREATE TABLE IF NOT EXISTS progress (one INTEGER PRIMARY KEY, value TEXT)")
        self._run("BEGIN")

    def image_row(self, sha256: str) -> int | None:
        """Return the row of an image that was added before, or None."""
        result = self._run("SELECT row FROM pictures WHERE sha256 = ?", bytes.fromhex(sha256)).fetchone()
        return None if result is None else int(result[0])

    def add_image(self, sha256: str, row: int) -> None:
        """Add an image with its row in the images table."""
        self._run("INSERT INTO pictures VALUES (?, ?)", bytes.fromhex(sha256), row)

    def has_id(self, sample_id: str) -> bool:
        """Return whether a sample with this id was added."""
        return self._run("SELECT 1 FROM samples WHERE id = ? LIMIT 1", sample_id).fetchone() is not None

    def has_sample(self, sample_id: str, content: bytes) -> bool:
        """Return whether a sample with this id and content was added."""
        result = self._run("SELECT 1 FROM samples WHERE id = ? AND content = ?", sample_id, content).fetchone()
        return result is not None

    def add_sample(self, sample_id: str, content: bytes) -> None:
        """Add a sample by its id and the hash of its content."""
        self._run("INSERT OR IGNORE INTO samples VALUES (?, ?)", sample_id, content)

    def progress(self) -> dict[str, Any] | None:
        """Return the progress of the last `commit`, or None if there was none."""
        result = self._run("SELECT value FROM progress").fetchone()
        return None if result is None else dict(json.loads(result[0]))

    def commit(self, progress: dict[str, Any]) -> None:
        """Save all added entries and the progress in one transaction."""
        self._run("INSERT OR REPLACE INTO progress VALUES (0, ?)", json.dumps(progress))
        self._run("COMMIT")
        self._run("BEGIN")

    def close(self) -> None:
        """Close the file, which keeps the committed entries. A second call has no effect."""
        self._db.close()

    def remove(self) -> None:
        """Close the index and remove its file."""
        self.close()
        remove_index(self._path)

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:  # "database or disk is full", "disk I/O error"
            raise OSError(f"{error} ({self._path})") from error


def remove_index(path: Path) -> None:
    """Remove the files of a closed index, if they exist."""
    for file in (path, path.with_name(path.name + "-journal")):
        file.unlink(missing_ok=True)
