"""Takes the copies from which checkpoints are written beside the next steps.

DeepSpeed hands every object that it saves to a checkpoint engine. The one here copies it to host memory instead of
writing it; `saver.py` writes the copies in a thread. Whether there is enough memory, and whether the installed
DeepSpeed calls the engine, is found out before the first step. Where one of them fails, DeepSpeed writes the files
itself while training waits.
"""

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from llava_next.formats.atomic import PARTIAL
from train.checkpoint.checkpoint_size import checkpoint_bytes
from train.checkpoint.host_copy import HostCopy, HostMemory
from train.distributed.free_memory import MAX_COPY_SHARE, available_bytes
from train.distributed.world import World, all_gather_objects, barrier
from train.engine.deepspeed_engine import release_gathered

try:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
except ImportError:  # another version of DeepSpeed: `_check_calls` reports that it does not use the engine below
    CheckpointEngine = object

_PADDING = 1.01
_METADATA = 2**22
_GIB = 2**30


class CopyingEngine(CheckpointEngine):
    """A checkpoint engine of DeepSpeed whose `save` copies to host memory.

    Args:
        own: DeepSpeed's engine, which loads checkpoints.

    Attributes:
        memory: for the copies; while it is None, nothing is copied.
        num_calls: of `save` for the checkpoint that is being saved.
        copies: of that checkpoint, by path.
    """

    def __init__(self, own: CheckpointEngine) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.memory: HostMemory | None = None
        self.num_calls = 0
        self.copies: dict[Path, HostCopy] = {}
        self._own = own

    def create(self, info: Any) -> None:
        """Begins a checkpoint. The files of the previous one must have been written."""
        self.copies, self.num_calls = {}, 0
        if self.memory is not None:
            self.memory.reset()

    def save(self, state_dict: Any, path: str) -> None:
        """Copies the content of a file."""
        self.num_calls += 1
        if self.memory is not None:
            self.copies[Path(path)] = HostCopy(state_dict, self.memory)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Loads a file as DeepSpeed does."""
        return self._own.load(path, map_location=map_location)

    def commit(self, info: Any) -> bool:
        """Ends a checkpoint: its copies are complete, its files are not."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: only the elements of a tensor are copied, so DeepSpeed need not clone views."""
        return False


@dataclass(frozen=True)
class MemoryNeed:
    """What the copies of one rank need and what its host has, in bytes."""

    host: str
    needed: int
    available: int


def enable(engine: deepspeed.DeepSpeedEngine, folder: Path, world: World) -> tuple[CopyingEngine | None, str]:
    """Lets an engine copy its checkpoints instead of writing them, if that works on every rank. All ranks must call it.

    Args:
        engine: not changed where copying does not work.
        folder: of the checkpoints; a folder is made in it and removed.
        world: of the run.

    Returns:
        The engine that takes the copies, or None; and a sentence on it for the log.
    """
    blocking = "each save stalls training until DeepSpeed has written it: "
    needed = int(checkpoint_bytes(engine, world.rank, world.size) * _PADDING) + _METADATA
    needs = all_gather_objects(world, MemoryNeed(socket.gethostname(), needed, available_bytes()))
    problem = find_shortage(needs)
    if engine.zero_nvme_offload_optimizer():
        problem = "the optimizer is on NVMe, whose files DeepSpeed copies itself"
    if problem:
        return None, blocking + problem
    copying = CopyingEngine(engine.checkpoint_engine)
    problem = _check_calls(engine, copying, folder, world)
    memory, error = None, ""
    if not problem:
        try:
            memory = HostMemory(needed, pinned=world.device.type == "cuda")
        except (RuntimeError, MemoryError) as raised:
            error = f"{needed / _GIB:.1f} GiB of host memory could not be taken on {socket.gethostname()}: {raised}"
        problem = next((text for text in all_gather_objects(world, error) if text), "")
    if problem:
        return None, blocking + problem
    copying.memory = memory
    engine.checkpoint_engine = copying
    largest = max(_needs_by_host(needs).values())
    return copying, (
        f"each save copies to host memory ({largest / _GIB:.1f} GiB on a host) and is written beside the next steps"
    )


def find_shortage(needs: list[MemoryNeed]) -> str:
    """Names the first host whose ranks need more than `MAX_COPY_SHARE` of its free memory; empty if there is none."""
    for host, needed in _needs_by_host(needs).items():
        ranks = [need for need in needs if need.host == host]
        available = min(need.available for need in ranks)
        if needed > MAX_COPY_SHARE * available:
            return (
                f"to write it beside the next steps, the {len(ranks)} rank(s) of {host} would need {needed / _GIB:.1f} "
                f"GiB of host memory for a copy, and {available / _GIB:.1f} GiB are free, of which "
                f"{MAX_COPY_SHARE:.0%} may be used"
            )
    return ""


def _needs_by_host(needs: list[MemoryNeed]) -> dict[str, int]:
    hosts: dict[str, int] = {}
    for need in needs:
        hosts[need.host] = hosts.get(need.host, 0) + need.needed
    return hosts


def _check_calls(engine: deepspeed.DeepSpeedEngine, copying: CopyingEngine, folder: Path, world: World) -> str:
    """Lets DeepSpeed save without content; returns why it does not use the engine, or an empty string if it does."""
    scratch = folder / f"step_check{PARTIAL}"  # a name that the next start removes
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    barrier(world)
    own, error = engine.checkpoint_engine, ""
    engine.checkpoint_engine = copying
    try:
        engine.save_checkpoint(str(scratch), tag="check", save_latest=False, exclude_frozen_parameters=True)
    except (AttributeError, TypeError, NotImplementedError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        engine.checkpoint_engine = own
        release_gathered(engine)
    writes = world.is_main or engine.zero_optimization_stage() > 0
    if not error and writes and not copying.num_calls:
        error = "its `save` was not called"
    barrier(world)
    if world.is_main:
        by_others = sorted(path.name for path in scratch.rglob("*.pt"))
        if not error and by_others:
            error = f"DeepSpeed wrote {by_others[0]} without it"
        shutil.rmtree(scratch, ignore_errors=True)
    errors = all_gather_objects(world, error)
    rank = next((rank for rank, text in enumerate(errors) if text), None)
    if rank is None:
        return ""
    return (
        f"DeepSpeed {deepspeed.__version__} does not use the checkpoint engine that it was given (rank {rank}: "
        f"{errors[rank]}); 0.19.8 does"
    )


def synchronize(device: torch.device) -> None:
    """Waits until the copies from a device are complete."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
