"""Named tensors that are loaded one at a time, and the weight files they are read from and written to.

At most one shard of a model is in memory while its tensors are copied or converted.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llava_next.config import ModelError
from llava_next.file_access import follow_umask, permission_problem

SHARD_BYTES = 4 * 10**9
"""Default maximum size of a safetensors file."""
_DERIVED = re.compile(r"\.(?:rotary_emb\.inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved and that a model computes."""

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Context manager inside which partitioned parameters (ZeRO-3) are complete. It is collective: every rank enters it, in
the same order."""


def no_gather(_: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """The `Gather` of parameters that are not partitioned."""
    return nullcontext()


@dataclass(frozen=True)
class LazyTensor:
    """A named tensor that is loaded on demand.

    Attributes:
        name: of the tensor.
        shape, dtype: of what `read` returns.
        read: loads the tensor to the host; returns None on ranks that only take part in gathering it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor | None]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    def renamed(self, name: str) -> "LazyTensor":
        """The same tensor under another name."""
        return replace(self, name=name)

    def cast(self, dtype: torch.dtype) -> "LazyTensor":
        """The tensor converted to another dtype."""
        return self.mapped(lambda tensor: tensor.to(dtype), self.shape, dtype)

    def first_rows(self, count: int) -> "LazyTensor":
        """The first `count` rows."""
        return self.mapped(lambda tensor: tensor[:count], (count, *self.shape[1:]), self.dtype)

    def mapped(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> "LazyTensor":
        """The tensor with `function` applied when it is read.

        Args:
            function: maps the tensor to one of `shape` and `dtype`.
        """

        def read() -> torch.Tensor | None:
            tensor = self.read()
            return None if tensor is None else function(tensor)

        return LazyTensor(self.name, shape, dtype, read)

    def value(self) -> torch.Tensor:
        """Loads the tensor; only for ranks on which `read` returns one."""
        tensor = self.read()
        assert tensor is not None, self.name
        return tensor


def from_tensor(name: str, tensor: torch.Tensor) -> LazyTensor:
    """Wraps a tensor in memory as a `LazyTensor`."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_shards(tensors: Sequence[LazyTensor], folder: Path | None, shard_bytes: int | None = None) -> None:
    """Writes tensors to safetensors files of at most `shard_bytes`, and their index if there is more than one file.

    A tensor larger than `shard_bytes` is written to a file of its own.

    Args:
        tensors: each is read once, in this order, on every rank.
        folder: an existing directory; None on ranks that only take part in gathering.
        shard_bytes: maximum size of a file, and of the tensors in memory; None means `SHARD_BYTES`.
    """
    shards = list(_shards(tensors, shard_bytes or SHARD_BYTES))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        loaded = {}
        for tensor in shard:
            value = tensor.read()
            weight_map[tensor.name] = file_name
            if folder is not None and value is not None:
                loaded[tensor.name] = value.contiguous()
        if folder is not None:
            write_safetensors(loaded, folder / file_name)
    if folder is not None and len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors to one file, whose permissions follow the umask.

    Args:
        tensors: contiguous tensors in memory, by name.
        path: the file; an existing one is replaced.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"})
    follow_umask(path)


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
    """The tensors of a model's directory by name, memory-mapped: `*.safetensors` if present, else `pytorch_model*.bin`.

    Raises:
        ModelError: there are no weights, a file of the index is missing, two files contain the same name, or a `.bin`
            file contains anything but tensors.
        SafetensorError, OSError: a file is damaged.
    """
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(
            permission_problem(source)
            or f"{source} has a config.json but no weights (neither *.safetensors nor pytorch_model*.bin)"
        )
    _check_shards(source, files)
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        for tensor in _iter_safetensors(path) if path.suffix == ".safetensors" else _iter_pickle(path):
            if _DERIVED.search(tensor.name):
                continue
            if tensor.name in tensors:
                raise ModelError(f"{source} contains {tensor.name} twice, once in {path.name}; remove one of the files")
            tensors[tensor.name] = tensor
    return tensors


def _check_shards(source: Path, files: Sequence[Path]) -> None:
    index = source / ("model.safetensors.index.json" if files[0].suffix == ".safetensors" else _BIN_INDEX)
    if index.is_file():
        expected = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(expected - {path.name for path in files})
        if missing:
            raise ModelError(
                f"{source} lacks {len(missing)} file(s) that {index.name} lists, the first is {missing[0]}; copy the "
                "missing files"
            )


_BIN_INDEX = "pytorch_model.bin.index.json"


def _iter_safetensors(path: Path) -> Iterator[LazyTensor]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            header = file.get_slice(name)
            yield LazyTensor(name, tuple(header.get_shape()), _DTYPES[header.get_dtype()], _Reader(path, name))


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


def _iter_pickle(path: Path) -> Iterator[LazyTensor]:
    for name, tensor in read_plain_tensors(path, "the publisher's original file").items():
        yield from_tensor(name, tensor)  # memory-mapped: pages are read on access


def read_plain_tensors(path: Path, alternative: str) -> dict[str, torch.Tensor]:
    """The tensors of a file written by `torch.save`, memory-mapped, without executing code from the pickle.

    Args:
        path: the file.
        alternative: what the error message suggests to use instead.

    Raises:
        ModelError: the pickle calls code, is damaged, or contains anything but strided tensors on the CPU.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or malicious file can raise any exception
        imported = re.search(r"GLOBAL (\S+)", str(error))
        denied = permission_problem(path) if isinstance(error, PermissionError) else ""
        if denied:
            raise ModelError(f"stage.init_from: {denied}") from None
        if imported:
            problem = f"imports {imported[1]}, which weight files do not need; no code was executed"
        elif isinstance(error, pickle.UnpicklingError):
            problem = "is not a pickle of plain tensors; no code was executed"
        else:
            problem = (
                f"is damaged or was not written by torch.save ({type(error).__name__} {str(error).strip()[:80]!r})"
            )
        raise ModelError(f"stage.init_from={path} {problem}; use {alternative}") from None
    if not isinstance(content, dict) or not all(_is_plain(value) for value in content.values()):
        raise ModelError(f"stage.init_from={path} does not contain a dictionary of tensors; use {alternative}")
    return {str(name): tensor for name, tensor in content.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


class HasShape(Protocol):
    """A parameter, a tensor or a `LazyTensor`."""

    @property
    def shape(self) -> Sequence[int]: ...


_FIX = "use the language model and the vision tower that it was trained with"


def check_tensor_names(expected: Mapping[str, HasShape], names: set[str], source: Path) -> None:
    """Checks that the names of the tensors in `source` are exactly those that the model needs.

    Args:
        expected: the model's parameters by name.
        names: of the tensors in `source`.
        source: for the message.

    Raises:
        ModelError: a tensor is missing or unexpected.
    """
    missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
    if missing:
        shape = list(expected[missing[0]].shape)
        raise ModelError(
            f"{source} lacks {len(missing)} tensor(s) of this model, the first is {missing[0]} of shape {shape}; {_FIX}"
        )
    if unexpected:
        raise ModelError(
            f"{source} has {len(unexpected)} tensor(s) that this model lacks, the first is {unexpected[0]}; {_FIX}"
        )


def check_shape(parameter: nn.Parameter, tensor: HasShape, name: str, source: Path) -> None:
    """Raises ModelError, with both shapes, if the tensor's shape is not the parameter's."""
    if tuple(parameter.shape) != tuple(tensor.shape):
        raise ModelError(
            f"{source}: {name} has shape {list(tensor.shape)}, this model needs {list(parameter.shape)}; {_FIX}"
        )


def copy_tensor(parameter: nn.Parameter, tensor: torch.Tensor, name: str, source: Path) -> None:
    """Copies a tensor of any floating dtype into the parameter; raises ModelError if the shapes differ."""
    check_shape(parameter, tensor, name, source)
    with torch.no_grad():
        parameter.copy_(tensor)
