"""Copies the mixture's stores to a local disk of each node, if `data.local_dir` is set.

One process of each node copies while the others wait. `data_recipes.store.local_copy` copies and verifies the files.
"""

import logging
import socket
import sys
from pathlib import Path

from tqdm import tqdm

from data_recipes.schema.sample import DataError
from data_recipes.store.local_copy import LocalCopy, copy_stores, count_copy_bytes
from train.config.schema import RunConfig
from train.distributed.launch import Launch
from train.distributed.world import heartbeat_mtime, wait_for

logger = logging.getLogger(__name__)


def prepare_local_stores(config: RunConfig, launch: Launch) -> dict[str, Path]:
    """Copies missing stores to the local disk and returns their paths by source; empty if `data.local_dir` is null.

    The first process of the node copies; the others wait while its heartbeat is updated. Stores in `exclude` are not
    copied, since they are read only once, at the start.

    Raises:
        DataError: a store cannot be copied; see `copy_stores`.
        TimeoutError: the heartbeat of the copying process stopped.
    """
    if config.data.local_dir is None:
        return {}
    root = Path(config.data.local_dir)
    copies = {name: LocalCopy.from_store(Path(config.data.store_root) / name, root) for name in config.mixture.sources}
    if launch.local_rank == 0:
        _copy(list(copies.values()), _heartbeat(root), show_progress=launch.is_main)
    else:
        wait_for(
            lambda: all(copy.is_complete for copy in copies.values()),
            lambda: heartbeat_mtime(_heartbeat(root)),
            what=f"copies of the stores in {root}",
        )
    return {name: copy.path for name, copy in copies.items()}


def _heartbeat(root: Path) -> Path:
    return root / ".beat"


def _copy(copies: list[LocalCopy], heartbeat: Path, *, show_progress: bool) -> None:
    num_bytes = count_copy_bytes(copies)
    logger.info("copying %.1f GiB of stores to %s, and verifying them", num_bytes / 2**31, heartbeat.parent)
    try:
        with tqdm(
            total=num_bytes,
            desc=f"copying stores to {heartbeat.parent}",
            unit="B",
            unit_scale=True,
            disable=not (show_progress and num_bytes),
        ) as bar:

            def on_bytes(num: int) -> None:
                bar.update(num)
                heartbeat.touch()

            copy_stores(copies, on_bytes, on_wait=heartbeat.touch)
    except DataError as error:
        if not show_progress:  # rank 0 prints its own error only
            print(f"error: node {socket.gethostname()}: {error}", file=sys.stderr)
        raise
    logger.info("copied the stores to %s", heartbeat.parent)
