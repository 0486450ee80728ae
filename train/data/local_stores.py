"""`data.local_dir`: the mixture's stores, copied once to a disk of each node.

Owns: which process of a node copies, what the others wait for, what is shown meanwhile.
Leaves: copying and proving to `data_recipes.store.local_copy`.
"""

import logging
import socket
import sys
from pathlib import Path

from tqdm import tqdm

from data_recipes.schema.sample import DataError
from data_recipes.store.local_copy import LocalCopy, copy_stores, num_bytes_to_move
from train.config.schema import RunConfig
from train.distributed.world import Launch, heartbeat_mtime, wait_for

logger = logging.getLogger(__name__)


def local_stores(config: RunConfig, launch: Launch) -> dict[str, Path]:
    """Where each source of the mixture lies on this node's disk; empty when `data.local_dir` is null.

    The first process of the node copies what is not there yet; the others wait as long as it gives signs of life.
    Stores that are only excluded stay where they are: they are read once, at the start.

    Raises:
        DataError: a store cannot be copied; see `copy_stores`.
        TimeoutError: the copying process fell silent.
    """
    if config.data.local_dir is None:
        return {}
    root = Path(config.data.local_dir)
    copies = {name: LocalCopy.of(Path(config.data.store_root) / name, root) for name in config.mixture.sources}
    if launch.local_rank == 0:
        _copy(list(copies.values()), _beat(root), show_progress=launch.is_main)
    else:
        wait_for(
            lambda: all(copy.is_there for copy in copies.values()),
            lambda: heartbeat_mtime(_beat(root)),
            what=f"copies of the stores in {root}",
        )
    return {name: copy.place for name, copy in copies.items()}


def _beat(root: Path) -> Path:
    return root / ".beat"


def _copy(copies: list[LocalCopy], beat: Path, *, show_progress: bool) -> None:
    num_bytes = num_bytes_to_move(copies)
    logger.info("copying %.1f GiB of stores to %s, and reading them back", num_bytes / 2**31, beat.parent)
    try:
        with tqdm(
            total=num_bytes,
            desc=f"copying stores to {beat.parent}",
            unit="B",
            unit_scale=True,
            disable=not (show_progress and num_bytes),
        ) as bar:

            def on_bytes(num: int) -> None:
                bar.update(num)
                beat.touch()

            copy_stores(copies, on_bytes, on_wait=beat.touch)
    except DataError as error:
        if not show_progress:  # rank 0 prints what ends the run; this node's trouble may be its own
            print(f"error: node {socket.gethostname()}: {error}", file=sys.stderr)
        raise
    logger.info("the stores are in %s", beat.parent)
