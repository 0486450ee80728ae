"""What a store under construction has met already: pictures by hash, sample ids with their contents, progress.

Owns: the index, a file beside the tables and not a dictionary, so that a million records need no more memory
than ten thousand; and that index and progress are saved together or not at all.
Leaves: what to do about a repetition, and what progress is, to `store_tables.py`.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote


class SeenIndex:
    """A scratch index on disk. What was added since the last `commit` is gone when the program dies.

    Raises (every method):
        OSError: the disk is full or failing.
    """

    def __init__(self, path: Path) -> None:
        """Open the index, as the last `commit` left it, or make it."""
        self._path = path
        # No locks: whoever writes a store holds a lock of its own, and cluster file systems often have none.
        self._db = sqlite3.connect(f"file:{quote(str(path))}?nolock=1", uri=True, isolation_level=None)
        self._run("PRAGMA cache_size=-16384")
        self._run("CREATE TABLE IF NOT EXISTS pictures (sha256 BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._run("CREATE TABLE IF NOT EXISTS samples (id TEXT, content BLOB, PRIMARY KEY (id, content)) WITHOUT ROWID")
        self._run("CREATE TABLE IF NOT EXISTS progress (one INTEGER PRIMARY KEY, value TEXT)")
        self._run("BEGIN")

    def picture_row(self, sha256: str) -> int | None:
        """The row of a picture that was met before, else None."""
        found = self._run("SELECT row FROM pictures WHERE sha256 = ?", bytes.fromhex(sha256)).fetchone()
        return None if found is None else int(found[0])

    def add_picture(self, sha256: str, row: int) -> None:
        """Note that the picture stands in `row`."""
        self._run("INSERT INTO pictures VALUES (?, ?)", bytes.fromhex(sha256), row)

    def has_id(self, sample_id: str) -> bool:
        """Was there a sample of this id?"""
        return self._run("SELECT 1 FROM samples WHERE id = ? LIMIT 1", sample_id).fetchone() is not None

    def has_sample(self, sample_id: str, content: bytes) -> bool:
        """Was there a sample of this id with this content?"""
        found = self._run("SELECT 1 FROM samples WHERE id = ? AND content = ?", sample_id, content).fetchone()
        return found is not None

    def add_sample(self, sample_id: str, content: bytes) -> None:
        """Note the sample."""
        self._run("INSERT OR IGNORE INTO samples VALUES (?, ?)", sample_id, content)

    def progress(self) -> dict[str, Any] | None:
        """What the last `commit` was given; None before the first."""
        found = self._run("SELECT value FROM progress").fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def commit(self, progress: dict[str, Any]) -> None:
        """Save all that was added, and `progress`, at one stroke."""
        self._run("INSERT OR REPLACE INTO progress VALUES (0, ?)", json.dumps(progress))
        self._run("COMMIT")
        self._run("BEGIN")

    def close(self) -> None:
        """Let go of the file, which keeps what was committed; a second call does nothing."""
        self._db.close()

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        remove_index(self._path)

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:  # "database or disk is full", "disk I/O error"
            raise OSError(f"{error} ({self._path})") from error


def remove_index(path: Path) -> None:
    """Remove a closed index, if there is one."""
    for file in (path, path.with_name(path.name + "-journal")):
        file.unlink(missing_ok=True)
