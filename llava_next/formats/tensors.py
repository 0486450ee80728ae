"""Named tensors that are read one at a time: the folders they lie in, and safetensors shards that they are written to.

A model of any size passes through here with one shard of it in memory. What the names mean is `tensor_names.py`'s;
where the tensors come from (a live model, files, a checkpoint) is the caller's.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_next.config import ModelError

SHARD_BYTES = 4 * 10**9
_DERIVED = re.compile(r"\.(?:rotary_emb\.inv_freq|position_ids)$")
"""Buffers that older versions saved, and that every model makes for itself."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor by name. `read` gives it, in `shape` and `dtype`, on the host; None on ranks that only gather."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor | None]

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def renamed(self, name: str) -> "LazyTensor":
        """The same tensor by another name."""
        return replace(self, name=name)

    def cast(self, dtype: torch.dtype) -> "LazyTensor":
        """The same numbers in another type."""
        return self.mapped(lambda tensor: tensor.to(dtype), self.shape, dtype)

    def rows(self, count: int) -> "LazyTensor":
        """The first rows alone."""
        return self.mapped(lambda tensor: tensor[:count], (count, *self.shape[1:]), self.dtype)

    def mapped(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> "LazyTensor":
        """What `change` makes of it, when it is read."""

        def read() -> torch.Tensor | None:
            found = self.read()
            return None if found is None else change(found)

        return LazyTensor(self.name, shape, dtype, read)

    def value(self) -> torch.Tensor:
        """The tensor, where this process has it."""
        found = self.read()
        assert found is not None, self.name
        return found


def from_tensor(name: str, tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_shards(tensors: Sequence[LazyTensor], folder: Path | None, shard_bytes: int | None = None) -> None:
    """Writes safetensors files of at most `shard_bytes` (a larger tensor has one of its own), and their index.

    Args:
        tensors: each is read once, in this order, on every rank.
        folder: None on ranks that only help to gather.
        shard_bytes: None takes `SHARD_BYTES`; what is held in memory at a time.
    """
    shards = list(_shards(tensors, shard_bytes or SHARD_BYTES))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = {}
        for tensor in shard:
            found = tensor.read()
            weight_map[tensor.name] = file_name
            if folder is not None and found is not None:
                held[tensor.name] = found.contiguous()
        if folder is not None:
            save_file(held, folder / file_name, metadata={"format": "pt"})
    if folder is not None and len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(tensors: Sequence[LazyTensor], shard_bytes: int) -> Iterator[list[LazyTensor]]:
    shard: list[LazyTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard


def read_folder(source: Path) -> dict[str, LazyTensor]:
    """The weights of a model's directory: `*.safetensors`, else `pytorch_model*.bin`; mapped, none of them read.

    Raises:
        ModelError: there are none, a name stands in two files, or a `.bin` holds more than tensors.
        SafetensorError, OSError: a damaged file.
    """
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{source} holds a config.json and no weights (neither *.safetensors nor pytorch_model*.bin)")
    _refuse_missing_shards(source, files)
    found: dict[str, LazyTensor] = {}
    for path in files:
        for tensor in _in_safetensors(path) if path.suffix == ".safetensors" else _in_pickle(path):
            if _DERIVED.search(tensor.name):
                continue
            if tensor.name in found:
                raise ModelError(f"{source} holds {tensor.name} twice, once in {path.name}; take one of them away")
            found[tensor.name] = tensor
    return found


def _refuse_missing_shards(source: Path, files: Sequence[Path]) -> None:
    index = source / ("model.safetensors.index.json" if files[0].suffix == ".safetensors" else _BIN_INDEX)
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(wanted - {path.name for path in files})
        if missing:
            raise ModelError(f"{source} lacks {missing[0]}, which {index.name} names ({len(missing)} such files)")


_BIN_INDEX = "pytorch_model.bin.index.json"


def _in_safetensors(path: Path) -> Iterator[LazyTensor]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part = file.get_slice(name)
            yield LazyTensor(name, tuple(part.get_shape()), _DTYPES[part.get_dtype()], _Reader(path, name))


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor of a safetensors file."""

    path: Path
    name: str

    def __call__(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _in_pickle(path: Path) -> Iterator[LazyTensor]:
    for name, tensor in read_plain_tensors(path, "the publisher's own").items():
        yield from_tensor(name, tensor)  # mapped: its pages are read when they are used


def read_plain_tensors(path: Path, whose: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save`, mapped, read without running what a pickle may ask for.

    Args:
        path: the file.
        whose: file to give instead, for the message.

    Raises:
        ModelError: it asks for code, is damaged, or holds anything but tensors on the host.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile file may raise
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            what = f"asks Python for {asked[1]}, which no file of weights needs: nothing in it was run"
        elif isinstance(error, pickle.UnpicklingError):
            what = "is no pickle of plain tensors: nothing in it was run"
        else:
            what = f"is damaged, or no file of torch.save ({type(error).__name__} {str(error).strip()[:80]!r})"
        raise ModelError(f"stage.init_from={path} {what}; give {whose}") from None
    if not isinstance(found, dict) or not all(_is_plain(value) for value in found.values()):
        raise ModelError(f"stage.init_from={path} holds no dictionary of tensors; give {whose}")
    return {str(name): tensor for name, tensor in found.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
