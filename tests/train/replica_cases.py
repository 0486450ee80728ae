"""Functions that ranks run in the tests of replicas: a tensor is changed on one of them, or a folder is visible
late."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.train.cases import built, train
from train.config.schema import RunConfig


def _refused(action: Callable[[], Any], error: type[Exception]) -> str:
    try:
        action()
    except error as raised:
        return str(raised)
    raise AssertionError("it was not refused")


def start_with_a_changed_tensor(config: RunConfig, rank: int, name: str) -> str:
    """Runs a start in which one rank receives another value of a parameter or buffer; returns the error's message."""
    import deepspeed
    import torch

    from train.distributed.launch import read_launch
    from train.engine.replica_checksums import ReplicaError, tensor_sums

    initialize = deepspeed.initialize

    def change(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[tensor.numel() // 2] += 2.0**-20

    def start() -> None:
        with built(config):
            pass

    def initialized(*, model: Any, **options: Any) -> Any:
        made = initialize(model=model, **options)
        held = dict([*model.named_parameters(), *model.named_buffers()])
        change(held[name].data)
        return made

    gathers = 0

    def gathered_sums(tensors: Any) -> torch.Tensor:  # of ZeRO-3: a module's parameters, gathered
        nonlocal gathers
        tensors, gathers = list(tensors), gathers + 1
        if gathers == 5:
            change(tensors[0].data)
        return tensor_sums(tensors)

    with ExitStack() as patches:
        if read_launch().rank == rank:
            if name:
                patches.enter_context(patch("deepspeed.initialize", initialized))
            else:
                patches.enter_context(patch("train.engine.deepspeed_engine.tensor_sums", gathered_sums))
        return _refused(start, ReplicaError)


def resume_where_a_folder_lags(config: RunConfig, rank: int, hidden: str, lag_s: float, patience_s: float) -> Any:
    """Resumes where one rank does not see the newest checkpoint for a while; returns the record of the rest of the run,
    or the error's message."""
    from train.checkpoint import atomic_folder
    from train.config.schema import ConfigError
    from train.distributed.launch import read_launch

    is_whole, began_s = atomic_folder.is_complete, time.monotonic()

    def lagging(place: Path) -> bool:
        return is_whole(place) and (place.name != hidden or time.monotonic() - began_s > lag_s)

    with ExitStack() as patches:
        patches.enter_context(patch("train.checkpoint.saver.VISIBILITY_TIMEOUT_S", patience_s))
        if read_launch().rank == rank:
            patches.enter_context(patch("train.checkpoint.atomic_folder.is_complete", lagging))
        try:
            return train(config)
        except ConfigError as error:
            return str(error)


def compare_unlike_starts(value: dict[int, int]) -> str:
    """Compares ranks that would begin at different steps; returns the error's message."""
    import torch.distributed as dist

    from train.engine.replica_checksums import ReplicaError, compare_starts

    world = _world()
    return _refused(lambda: compare_starts({"first step": value[dist.get_rank()]}, world), ReplicaError)


def unlike_errors() -> tuple[int, str]:
    """Returns what `broadcast_from_main` gives every rank: rank 0's value, and rank 0's error."""
    from train.config.schema import ConfigError
    from train.distributed.world import broadcast_from_main

    world = _world()

    def fail() -> None:
        raise ConfigError(f"of rank {world.rank}")

    return broadcast_from_main(world, lambda: world.rank), _refused(
        lambda: broadcast_from_main(world, fail), ConfigError
    )


def _world() -> Any:
    import torch
    import torch.distributed as dist

    from train.distributed.world import World

    rank = dist.get_rank()
    return World(rank, rank, dist.get_world_size(), torch.device("cpu"), torch.float32, dist.group.WORLD)
