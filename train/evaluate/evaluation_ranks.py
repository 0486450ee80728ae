"""Divides the rows and batches of an evaluation over the ranks of a launcher, each of which has the whole model.

What is divided does not depend on the number of ranks, and results are combined in its order, so they are the same bits
on one rank and on several.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from data_recipes.schema.sample import DataError
from llava_next.config import ModelError
from train.config.schema import ConfigError, PackingConfig
from train.distributed.launch import Launch, meeting_point, read_launch
from train.distributed.world import World, all_gather_objects, destroy, is_out_of_memory

_TIMEOUT = timedelta(hours=24)
"""Of the exchange of results: ranks wait there for the slowest one. A rank that dies closes its connections."""
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


class EvaluationError(RuntimeError):
    """A row or a batch could not be computed; every rank raises the error with the same message."""


@dataclass(frozen=True)
class EvaluationRanks:
    """This rank and the others.

    Attributes:
        world: of the ranks; its process group is a gloo group on any device.
    """

    world: World

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def device(self) -> torch.device:
        return self.world.device

    def map(
        self, function: Callable[[_Item], _Value], items: Sequence[_Item], *, description: str, unit: str
    ) -> list[_Value]:
        """Applies a function to each item on one of the ranks. Every rank must call it.

        Args:
            function: its value must be picklable.
            items: the same on every rank.
            description, unit: for rank 0's progress bar.

        Returns:
            The values of all items in their order, on every rank.

        Raises:
            ConfigError, ModelError, DataError, EvaluationError: the function raised it, on any rank.
        """
        numbers = range(self.world.rank, len(items), self.world.size)

        def apply() -> dict[int, _Value]:
            bar = tqdm(numbers, description, unit=unit, file=sys.stderr, disable=not self.is_main)
            return {number: function(items[number]) for number in bar}

        merged = {number: value for of_rank in self._gather(apply) for number, value in of_rank.items()}
        return [merged[number] for number in range(len(items))]

    def run(self, function: Callable[[], _Value]) -> _Value:
        """Runs a function on every rank and returns this rank's value. Every rank must call it.

        Raises:
            ConfigError, ModelError, DataError, EvaluationError: the function raised it, on any rank.
        """
        values: list[_Value] = []
        self._gather(lambda: values.append(function()))
        return values[0]

    def _gather(self, function: Callable[[], _Value]) -> list[_Value]:
        """Runs a function on every rank and returns all values; if it fails on any rank, every rank raises."""
        if self.world.size == 1:
            return [function()]
        value: _Value | None = None
        error: Exception | None = None
        try:
            value = function()
        except Exception as raised:
            error = raised
        gathered = all_gather_objects(self.world, (value, self._make_message(error)))
        for failure in (error, *(message for _, message in gathered)):
            if failure is not None:
                raise failure
        return [value for value, _ in gathered]  # type: ignore[misc]

    def _make_message(self, error: Exception | None) -> Exception | None:
        """Returns an error as the other ranks raise it, with this rank unless it is a mistake of the user."""
        if error is None or isinstance(error, (ConfigError, ModelError, DataError)):
            return error
        text = str(error) if isinstance(error, EvaluationError) else f"{type(error).__name__}: {error}"
        return EvaluationError(f"rank {self.world.rank} ({socket.gethostname()}): {text}")


@contextmanager
def join_ranks() -> Iterator[EvaluationRanks]:
    """Context manager that joins the launcher's ranks (torchrun, deepspeed, srun, mpirun); alone without a launcher.

    Raises:
        ConfigError: the launcher's variables contradict each other, or this host has fewer GPUs than ranks.
    """
    launch = read_launch()
    device = _choose_device(launch)
    if launch.size > 1:
        address, port = meeting_point(launch, os.environ)
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=launch.rank, world_size=launch.size, timeout=_TIMEOUT)
    try:
        group = dist.group.WORLD if launch.size > 1 else None
        yield EvaluationRanks(World(launch.rank, launch.local_rank, launch.size, device, torch.float32, group))
    finally:
        destroy()


@contextmanager
def explain_out_of_memory(what: str, options: str) -> Iterator[None]:
    """Context manager that names what to lower if the block runs out of memory.

    Args:
        what: what was computed, with its size.
        options: the options to lower, with their values.

    Raises:
        EvaluationError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"{what} did not fit into memory: lower {options}. Original error: {str(error).splitlines()[0]}"
        ) from error


def describe_row_budgets(packing: PackingConfig) -> str:
    """Returns the options that bound a row, with their values."""
    return f"--max-tokens ({packing.max_tokens}) or --max-tiles ({packing.max_tiles})"


def _choose_device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if launch.local_rank >= num_gpus > 1:
        raise ConfigError(
            f"{socket.gethostname()} shows {num_gpus} GPUs to local rank {launch.local_rank}, and each rank needs its "
            "own; start as many ranks per node as it has GPUs"
        )
    device = torch.device("cuda", launch.local_rank if num_gpus > 1 else 0)
    torch.cuda.set_device(device)
    return device
