"""Reads the images table of a store.

Headers, sizes and hashes are memory-mapped. The bytes of an image are read with one `pread`: on a network file system
this is one request, where a memory map causes a page fault for every few pages. A failed read raises OSError and can be
repeated, whereas a failed page fault kills the process.
"""

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MAX_OPEN_FILES = 128  # a mixture has one shard per GiB, and a process can often open no more than 1024 files


class StoreImages:
    """The images table of a store. Rows are numbered from 0.

    Args:
        folder: folder of the table.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is not an Arrow file of the expected format.
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
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close, self._descriptors)

    def __len__(self) -> int:
        return self._num_rows

    def sizes_hw(self, rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of the images in these rows."""
        return tuple((self._heights[row].as_py(), self._widths[row].as_py()) for row in rows)

    def hashes(self, rows: Sequence[int]) -> tuple[str, ...]:
        """Return the sha256 of the images in these rows, each as 64 hexadecimal digits."""
        return tuple(self._hashes[row].as_py() for row in rows)

    def all_hashes(self) -> npt.NDArray[np.bytes_]:
        """Return the sha256 of every image as 64 hexadecimal digits, S64 [num_images]."""
        return np.concatenate([np.zeros(0, dtype="S64"), *self._hash_chunks()])

    def keys(self) -> npt.NDArray[np.uint64]:
        """Return the first 64 bits of the sha256 of every image, uint64 [num_images]."""
        return np.concatenate([np.zeros(0, dtype=np.uint64), *map(first_64_bits, self._hash_chunks())])

    def read(self, row: int) -> bytes:
        """Return the original bytes of an image.

        Raises:
            OSError: the read failed; it may be repeated.
        """
        number = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        chunk = self._chunks[number]
        _, offsets, content = chunk.buffers()
        row_in_chunk = chunk.offset + row - int(self._row_starts[number])
        first, last = np.frombuffer(offsets, dtype=np.int32)[row_in_chunk : row_in_chunk + 2].tolist()
        if content is None or first == last:
            return b""
        shard = self._shard_of_chunk[number]
        position = content.address - self._maps[shard].address + first
        try:
            data = os.pread(self._descriptor(shard), last - first, position)
        except OSError:
            if shard in self._descriptors:  # a stale handle remains stale, so the next call must open the file again
                os.close(self._descriptors.pop(shard))
            raise
        if len(data) != last - first:
            raise OSError(f"{self._paths[shard]} ended at byte {position + len(data)}, before the end of an image")
        return data

    def _hash_chunks(self) -> Iterator[npt.NDArray[np.bytes_]]:
        return (np.array(chunk.to_pylist(), dtype="S64") for chunk in self._hashes.chunks)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]


def first_64_bits(hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """Convert hashes of 64 hexadecimal digits each, S64 [n], to their first 64 bits, uint64 [n]."""
    digits = np.ascontiguousarray(hashes.astype("S64")).view("S1").reshape(-1, 64)[:, :16]
    return np.frombuffer(bytes.fromhex(digits.tobytes().decode("ascii")), dtype=">u8").astype(np.uint64)


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
