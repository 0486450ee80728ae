"""What a store under construction has met already: pictures by hash, sample ids with their contents.

Owns: the index, a file beside the tables and not a dictionary, so that a million records need no more memory
than ten thousand.
Leaves: what to do about a repetition to `store.py`.
"""

import sqlite3
from pathlib import Path


class SeenIndex:
    """A scratch index on disk; `close` removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        # Scratch: if the program dies, the whole partial folder goes. So no journal and no waiting for the
        # disk.
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("PRAGMA cache_size=-16384")
        self._db.execute("CREATE TABLE pictures (sha256 BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE samples (id TEXT, content BLOB, PRIMARY KEY (id, content)) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def picture_row(self, sha256: str) -> int | None:
        """The row of a picture that was met before, else None."""
        found = self._db.execute("SELECT row FROM pictures WHERE sha256 = ?", (bytes.fromhex(sha256),)).fetchone()
        return None if found is None else int(found[0])

    def add_picture(self, sha256: str, row: int) -> None:
        """Note that the picture stands in `row`."""
        self._db.execute("INSERT INTO pictures VALUES (?, ?)", (bytes.fromhex(sha256), row))

    def has_id(self, sample_id: str) -> bool:
        """Was there a sample of this id?"""
        return self._db.execute("SELECT 1 FROM samples WHERE id = ? LIMIT 1", (sample_id,)).fetchone() is not None

    def has_sample(self, sample_id: str, content: bytes) -> bool:
        """Was there a sample of this id with this content?"""
        row = self._db.execute("SELECT 1 FROM samples WHERE id = ? AND content = ?", (sample_id, content)).fetchone()
        return row is not None

    def add_sample(self, sample_id: str, content: bytes) -> None:
        """Note the sample."""
        self._db.execute("INSERT OR IGNORE INTO samples VALUES (?, ?)", (sample_id, content))

    def close(self) -> None:
        """Close and remove the file; a second call does nothing."""
        self._db.close()
        self._path.unlink(missing_ok=True)
