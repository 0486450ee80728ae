"""The pictures of a store, read one at a time.

Owns: where in which file a picture's bytes stand, and reading just these.
Leaves: what the columns mean to `reader.py`, writing them to `writing/tables.py`.

Headers, sizes and hashes are memory-mapped. A picture's bytes are read with one `pread`: on a busy network file system
that is one request where a memory map takes a fault for every few pages; and a read that fails is an OSError, which a
loader can retry, where a failing fault is a signal that kills the process.
"""

import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MOST_OPEN = 128  # files; a mixture has a shard a GiB, and a process often no more than 1024 files in all


class StorePictures:
    """The pictures table of a store: columns by memory map, bytes by `read`. Rows are numbered from 0.

    Raises:
        OSError: a file is absent or cannot be read.
        ValueError: one is no Arrow file, or not of this format.
    """

    def __init__(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._paths = [folder / shard["filename"] for shard in state["_data_files"]]
        maps = [pa.memory_map(str(path)).read_buffer() for path in self._paths]
        shards = [pa.ipc.open_stream(shard).read_all() for shard in maps]
        table = pa.concat_tables(shards)
        self._num_rows = int(table.num_rows)
        self._heights, self._widths, self._hashes = (table.column(name) for name in ("height", "width", "sha256"))
        numbered = [(number, chunk) for number, shard in enumerate(shards) for chunk in shard.column("bytes").chunks]
        self._shard_of_chunk = [number for number, _ in numbered]
        self._chunks = [chunk for _, chunk in numbered]
        self._maps = maps
        self._row_starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in self._chunks])]).astype(np.int64)
        self._open: dict[int, int] = {}
        weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        return self._num_rows

    def sizes_hw(self, rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(height, width) of these pictures."""
        return tuple((self._heights[row].as_py(), self._widths[row].as_py()) for row in rows)

    def hashes(self, rows: Sequence[int]) -> tuple[str, ...]:
        """sha256 of these pictures, as 64 hexadecimal letters each."""
        return tuple(self._hashes[row].as_py() for row in rows)

    def all_hashes(self) -> npt.NDArray[np.bytes_]:
        """sha256 (as 64 hexadecimal letters) of every picture, by row."""
        parts = [np.array(chunk.to_pylist(), dtype="S64") for chunk in self._hashes.chunks]
        return np.concatenate([np.zeros(0, dtype="S64"), *parts])

    def keys(self) -> npt.NDArray[np.uint64]:
        """The first 64 bits of every picture's sha256, by row."""
        letters = "".join(letters[:16] for chunk in self._hashes.chunks for letters in chunk.to_pylist())
        return np.frombuffer(bytes.fromhex(letters), dtype=">u8").astype(np.uint64)

    def read(self, row: int) -> bytes:
        """The bytes of a picture, as published.

        Raises:
            OSError: they could not be read; another try may succeed.
        """
        number = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        chunk = self._chunks[number]
        _, offsets, content = chunk.buffers()
        place = chunk.offset + row - int(self._row_starts[number])
        first, last = np.frombuffer(offsets, dtype=np.int32)[place : place + 2].tolist()
        if content is None or first == last:
            return b""
        shard = self._shard_of_chunk[number]
        position = content.address - self._maps[shard].address + first
        try:
            data = os.pread(self._descriptor(shard), last - first, position)
        except OSError:
            if shard in self._open:  # a stale handle stays stale: the next try opens the file again
                os.close(self._open.pop(shard))
            raise
        if len(data) != last - first:
            raise OSError(f"{self._paths[shard]} ended at byte {position + len(data)}, before a picture's end")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
