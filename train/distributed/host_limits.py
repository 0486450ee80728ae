"""Limits of a host that a run would meet hours later: open files, and the shared memory that batches pass through."""

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from train.config.schema import RunConfig

_SUFFICIENT_OPEN_FILES = 65_536
_SHARED_MEMORY = Path("/dev/shm")
_USUAL_TILE = 384  # pixels; a tower's file may leave the side of a tile to the tower's own config


@dataclass(frozen=True)
class HostLimits:
    """The limits of one rank and what it needs of them.

    Attributes:
        open_files: the soft limit; None if there is none.
        shared_memory: free bytes of /dev/shm; None if there is no such file system.
        shared_memory_needed: bytes of the batches that this rank's workers have ready at most.
    """

    open_files: int | None = None
    shared_memory: int | None = None
    shared_memory_needed: int = 0


def raise_open_files_limit() -> None:
    """Raises this process's soft limit on open files as far as its hard limit allows, at most to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = _SUFFICIENT_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _SUFFICIENT_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def read_host_limits(config: RunConfig) -> HostLimits:
    """The limits of this process.

    A row has `packing.max_tiles` tiles of 3 x side x side bytes, and about eight int64 values a token.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    side = config.model.vision_tower.tile or _USUAL_TILE
    row = config.packing.max_tiles * 3 * side**2 + config.packing.max_tokens * 8 * 8
    return HostLimits(
        None if soft == resource.RLIM_INFINITY else soft,
        shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        config.data.workers * config.data.prefetch * row,
    )
