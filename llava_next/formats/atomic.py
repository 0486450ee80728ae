"""What reading and writing directories of tensors share: a directory is complete or absent, a tensor fits by name and
shape or is told. Which directories there are is `hugging_face.py`'s and `connector.py`'s.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from llava_next.config import ModelError

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole while inside it, where they are partitioned; every rank calls it in the same order."""


class Shaped(Protocol):
    """A tensor, or what stands for one that is not read yet."""

    @property
    def shape(self) -> Sequence[int]: ...


def no_gather(_: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """The `Gather` of parameters that are whole already."""
    return nullcontext()


@contextmanager
def complete_or_absent(target: Path | None) -> Iterator[Path | None]:
    """A folder to write into, which becomes `target` (and replaces an older one) when all went well.

    Args:
        target: None on ranks that write nothing; they get None.
    """
    if target is None:
        yield None
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def check_names(ours: Mapping[str, Shaped], theirs: set[str], source: Path) -> None:
    """Raises ModelError unless both have the same tensors."""
    missing, extra = sorted(set(ours) - theirs), sorted(theirs - set(ours))
    if missing:
        shape = list(ours[missing[0]].shape)
        raise ModelError(
            f"{source} lacks {len(missing)} tensor(s) that this model has, the first is {missing[0]} of shape {shape}; "
            f"{_CHOOSE}"
        )
    if extra:
        raise ModelError(
            f"{source} has {len(extra)} tensor(s) that this model lacks, the first is {extra[0]}; {_CHOOSE}"
        )


_CHOOSE = "choose the language model and vision tower it was made with"


def check_shape(parameter: nn.Parameter, tensor: Shaped, name: str, source: Path) -> None:
    """Raises ModelError, with both shapes, unless the tensor fits the parameter."""
    if tuple(parameter.shape) != tuple(tensor.shape):
        raise ModelError(
            f"{source}: {name} has shape {list(tensor.shape)}, this model needs {list(parameter.shape)}; {_CHOOSE}"
        )


def copy_tensor(parameter: nn.Parameter, tensor: torch.Tensor, name: str, source: Path) -> None:
    """Writes a tensor of any floating type into the parameter; raises ModelError where the shape is another."""
    check_shape(parameter, tensor, name, source)
    with torch.no_grad():
        parameter.copy_(tensor)
