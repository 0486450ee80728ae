"""Checks at the start that the run's checkpoints fit on the disk and can be written in time.

All ranks write a small file at the same time, so the rate that each measures is its share of the file system's.
"""

import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed

from llava_next.formats.atomic import PARTIAL
from train.checkpoint.checkpoint_size import checkpoint_bytes
from train.checkpoint.saver import list_complete
from train.config.schema import RunConfig, SaveConfig
from train.distributed.world import World, all_gather_objects, barrier
from train.supervision.preflight_checks import Check

_TRIAL_BYTES = 2**28
_TRIAL_S = 0.5
_CHUNK = 2**24
_GB = 1e9


@dataclass(frozen=True)
class SaveFindings:
    """What one rank has found.

    Attributes:
        rank_name: rank and host.
        num_bytes: of its files of a checkpoint.
        rate: bytes per second that it wrote and synced while the other ranks did the same.
        free: bytes that are free for checkpoints, those of earlier checkpoints of the run included.
        error: of the trial; empty if it succeeded.
    """

    rank_name: str
    num_bytes: int
    rate: float = 0.0
    free: int = 0
    error: str = ""


def check_saves(config: RunConfig, world: World, engine: deepspeed.DeepSpeedEngine, last_step: int) -> Check:
    """Measures free space and write rate of the checkpoint folder and compares them with what the run will save.

    Every rank must call it.

    Args:
        config: of the run; its folder exists.
        world: of the run.
        engine: which says what is saved.
        last_step: number of steps after which the run ends.
    """
    checkpoints = config.run_dir / "checkpoints"
    num_bytes = checkpoint_bytes(engine, world.rank, world.size)
    rank_name = f"rank {world.rank} ({socket.gethostname()})"
    barrier(world)
    try:
        folder = checkpoints if checkpoints.is_dir() else config.run_dir / "log"
        rate = measure_write_rate(folder / f"step_check_{world.rank:03d}{PARTIAL}", num_bytes)
        findings = SaveFindings(rank_name, num_bytes, rate, _free_bytes(checkpoints, folder))
    except OSError as error:
        findings = SaveFindings(rank_name, num_bytes, error=str(error))
    num_kept = count_kept(config.save, last_step)
    return compare_saves(all_gather_objects(world, findings), num_kept, config, checkpoints)


def compare_saves(findings: Sequence[SaveFindings], num_kept: int, config: RunConfig, checkpoints: Path) -> Check:
    """Returns the check for the findings of all ranks.

    Args:
        findings: in the order of ranks.
        num_kept: most checkpoints that exist at the same time.
        config: has the limits.
        checkpoints: their folder.
    """
    failed = next((rank for rank in findings if rank.error), None)
    if failed is not None:
        fix = "set root= to a folder that all nodes can write"
        return Check("checkpoints", "", f"{failed.rank_name}: {failed.error}; {fix}")
    size, free = sum(rank.num_bytes for rank in findings), min(rank.free for rank in findings)
    seconds = [rank.num_bytes / rank.rate if rank.num_bytes else 0.0 for rank in findings]
    longest_s = max(seconds)
    slowest = findings[seconds.index(longest_s)]
    result = (
        f"{size / _GB:.3g} GB each, written in about {longest_s:.0f} s; up to {num_kept} at a time, "
        f"{free / _GB:.3g} GB free"
    )
    problem = None
    if num_kept * size > free:
        problem = (
            f"{checkpoints} has room for {free / _GB:.3g} GB, and {num_kept} checkpoints of {size / _GB:.3g} GB will "
            f"exist at a time (save.keep={config.save.keep}, save.keep_every={config.save.keep_every}, and the one "
            "that is being written): free some space, keep fewer, or set root= to a larger file system"
        )
    elif longest_s > config.timeout_s:
        problem = (
            f"{slowest.rank_name} wrote {slowest.rate / _GB:.3g} GB/s to {checkpoints.parent}, so its "
            f"{slowest.num_bytes / _GB:.3g} GB of a checkpoint take about {longest_s:.0f} s, and ranks wait at most "
            f"timeout_s={config.timeout_s}: set root= to a faster file system, or raise timeout_s"
        )
    return Check("checkpoints", result, problem)


def count_kept(save: SaveConfig, last_step: int) -> int:
    """Returns the largest number of checkpoints that exist at the same time, the one that is being written included.

    Args:
        save: saves regularly.
        last_step: number of steps after which the run ends and saves.
    """
    steps = [*range(save.every, last_step, save.every), last_step]
    forever = [step for step in steps[: -save.keep - 1] if save.keep_every and step % save.keep_every == 0]
    return min(len(steps), save.keep + 1) + len(forever)


def measure_write_rate(path: Path, num_bytes: int) -> float:
    """Writes a file for half a second, syncs and removes it.

    Args:
        path: of the file.
        num_bytes: at most so many are written, and 256 MiB.

    Returns:
        Bytes per second; infinite if `num_bytes` is 0.

    Raises:
        OSError: it could not be written.
    """
    if num_bytes == 0:
        return float("inf")
    chunk, written, goal = os.urandom(min(_CHUNK, num_bytes)), 0, min(num_bytes, _TRIAL_BYTES)
    started = time.monotonic()
    try:
        with path.open("wb", buffering=0) as file:
            while written < goal and time.monotonic() - started < _TRIAL_S:
                written += file.write(chunk[: goal - written])
                os.fsync(file.fileno())
        return written / max(time.monotonic() - started, 1e-6)
    finally:
        path.unlink(missing_ok=True)


def _free_bytes(checkpoints: Path, folder: Path) -> int:
    earlier = [path for saved in list_complete(checkpoints) for path in saved.rglob("*") if path.is_file()]
    return shutil.disk_usage(folder).free + sum(path.stat().st_size for path in earlier)
