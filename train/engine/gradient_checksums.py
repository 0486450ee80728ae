"""Checksums and norms of gradients by part: two computations of a step on the same rows are compared by them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from llava_next.model.parts import part_of
from train.distributed.device_copies import to_host
from train.engine.replica_checksums import tensor_sum


class GradientChecksum(NamedTuple):
    """The sum of the gradients' bits as integers, and their norm."""

    bits: int
    norm: float


class GradientChecksums:
    """Adds up the gradients of each part, on their device."""

    def __init__(self) -> None:
        self._bits: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def add(self, part: str, gradient: torch.Tensor) -> None:
        """Adds the bits and the squared norm of one gradient to its part's. The host does not wait for the device."""
        bits = tensor_sum(gradient)
        square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) ** 2
        self._bits[part] = self._bits[part] + bits if part in self._bits else bits
        self._squares[part] = self._squares[part] + square if part in self._squares else square

    def read(self) -> dict[str, GradientChecksum]:
        """Returns the sums of each part that has had a gradient."""
        bits = {part: int(to_host(value)) for part, value in self._bits.items()}
        return {part: GradientChecksum(bits[part], float(to_host(self._squares[part])) ** 0.5) for part in bits}


@contextmanager
def watch_gradients(model: nn.Module, sums: GradientChecksums) -> Iterator[None]:
    """Inside the block, `sums` gets the gradient of every trained parameter in every backward pass of this rank, before
    the engine adds it to others or reduces it."""
    handles = [
        parameter.register_hook(partial(sums.add, part_of(name)))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
