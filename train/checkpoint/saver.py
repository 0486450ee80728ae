"""Checkpoints on disk: complete and whole, or not there.

A save has two parts. While every rank waits, DeepSpeed writes its files aside. Then training goes on, and a thread of
each rank brings its files to the disk and sums them up (sha256); when all have (the step's collective says so), the
first rank writes `sums.json` and gives the folder its name. What is read back is summed up again before it is loaded.

    step_000500/engine/...      DeepSpeed's own files: trained parts and optimizer; frozen parts are `init_from`'s
                config.yaml     the resolved configuration
                run_state.json  the step, and what a run that goes on must agree with
                sums.json       bytes and sha256 of all of these

Sealing, names and sums are `atomic_folder.py`'s, going on from a checkpoint is `resume.py`'s.
"""

import json
import logging
import shutil
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
from torch.serialization import get_unsafe_globals_in_checkpoint

from train.checkpoint import atomic_folder
from train.config.schema import ConfigError, SaveConfig
from train.distributed.world import World, all_gather_objects, barrier, broadcast_from_main

logger = logging.getLogger(__name__)

ENGINE = "engine"
_HARMLESS = {
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
}
LAG_PATIENCE_S = 90.0
"""How long a rank waits to see a checkpoint that rank 0 sees: NFS keeps what it knows of a folder up to a minute."""
_STATE, _CONFIG = "run_state.json", "config.yaml"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass(frozen=True)
class RunState:
    """What a run must agree with to go on from its checkpoint.

    Attributes:
        step: optimizer steps that are done.
        data_fingerprint: of mixture and processor.
        layout: what the engine's files depend on: number of ranks, ZeRO stage and the like.
        dtype: of the weights, as a word.
        groups: of the live optimizer: name, peak_lr and weight_decay of each.
        updates: how often the optimizer has been applied; less than `step` where steps were skipped.
        frozen: sha256 of the frozen parameters of each part, which the checkpoint does not hold.
        versions: of the packages and of this code.
    """

    step: int
    data_fingerprint: str
    layout: dict[str, Any]
    dtype: str
    groups: list[dict[str, Any]]
    updates: int
    frozen: dict[str, str]
    versions: dict[str, str]


class SaveFormatError(RuntimeError):
    """A checkpoint's file holds what no run writes."""


class Saver:
    """Writes the checkpoints of a run. Every rank has one and makes the same calls.

    Args:
        folder: of the checkpoints.
        world: this rank among the others, which all see the folder.
        save: which ones are kept.
    """

    def __init__(self, folder: Path, world: World, save: SaveConfig) -> None:
        self._folder, self._world, self._save = folder, world, save
        self._partial: Path | None = None
        self._sealing: threading.Thread | None = None
        self._removing: threading.Thread | None = None
        self._error: Exception | None = None
        self._began_s = 0.0

    @property
    def is_sealed(self) -> bool:
        """Whether this rank's files of an unnamed checkpoint are on the disk, or could not be brought there."""
        return self._sealing is not None and not self._sealing.is_alive()

    def write(self, engine: deepspeed.DeepSpeedEngine, state: RunState, config_yaml: str) -> float:
        """Writes this rank's files, aside; `finish` or `wait` gives the folder its name. Returns the seconds it took.

        Raises:
            SaveError: the disk is full, or the folder cannot be written into.
        """
        self.wait()
        started = self._began_s = time.monotonic()
        partial = atomic_folder.partial_of(self._folder / place_name(state.step))
        try:
            if self._world.is_main:
                remove_unfinished(self._folder)
                (partial / ENGINE).mkdir(parents=True)
            barrier(self._world)
            engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            if self._world.is_main:
                (partial / _CONFIG).write_text(config_yaml)
                (partial / _STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where a disk is full
            raise self._failed(partial, error) from error
        self._partial, self._error = partial, None
        self._sealing = threading.Thread(target=self._seal, args=(partial,), daemon=True, name="seal")
        self._sealing.start()
        return time.monotonic() - started

    def finish(self) -> Path | None:
        """Gives the checkpoint its name. To be called when every rank `is_sealed`; returns the folder.

        Raises:
            SaveError: this rank's files did not reach the disk.
        """
        if self._sealing is None or self._partial is None:
            return None
        self._sealing.join()
        partial, self._partial, self._sealing = self._partial, None, None
        try:
            if self._error is not None:
                raise self._error
            if self._world.is_main:
                atomic_folder.commit(partial, self._world.size)
                self._remove_old()
        except (OSError, ValueError) as error:
            raise self._failed(partial, error) from error
        place = atomic_folder.place_of(partial)
        logger.info("%s is complete, %.1f s after it was begun", place, time.monotonic() - self._began_s)
        return place

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, for every rank, and for old ones to be gone.

        Raises:
            SaveError: as `finish` does.
        """
        if self._sealing is not None:
            self._sealing.join()
            barrier(self._world)
            self.finish()
            barrier(self._world)
        if self._removing is not None:
            self._removing.join()

    def _seal(self, partial: Path) -> None:
        try:
            atomic_folder.seal(partial, self._world.rank)
        except Exception as error:
            self._error = error

    def _remove_old(self) -> None:
        """Takes the names of old ones away, and lets their files go beside the next steps: they may be a hundred GB."""
        every = self._save.keep_every
        old = [place for place in complete(self._folder)[: -self._save.keep] if not every or _step(place) % every]
        unnamed = [atomic_folder.retire(place) for place in old]
        if self._removing is not None:
            self._removing.join()
        self._removing = threading.Thread(target=_remove_all, args=(unnamed,), daemon=True, name="remove")
        self._removing.start()

    def _failed(self, partial: Path, error: Exception) -> SaveError:
        last = newest(self._folder)
        kept = f"the newest complete one is {last}" if last else "there is none before it"
        try:
            free = f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB are free there"
        except OSError as unreadable:
            free = str(unreadable)
        return SaveError(
            f"{atomic_folder.place_of(partial)} could not be saved: {' '.join(str(error).split())} ({free}); {kept}. "
            "Make room, or choose another root=..., and run the same command again"
        )


def latest_valid(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what was written, or None. Every rank must call it; each reads a share.

    Rank 0 says which ones there are. A damaged one is named, gets `.damaged` behind its name, and the one before it is
    tried.

    Raises:
        ConfigError: a rank does not see a checkpoint that rank 0 sees; names the rank and its host.
    """

    def listed() -> list[Path]:
        _finish_sealed(folder)
        remove_unfinished(folder)
        return complete(folder)

    for place in reversed(broadcast_from_main(world, listed)):
        _wait_until_seen(place, world)
        found = [told for told in all_gather_objects(world, corrupt_files(place, world.rank, world.size)) if told]
        if not found:
            return place
        if world.is_main:
            logger.warning("checkpoint %s is damaged (%s); the one before it is tried", place, "; ".join(found[:3]))
            aside = place.with_name(place.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        barrier(world)
    return None


def _wait_until_seen(place: Path, world: World) -> None:
    """Gives a network file system time to show a checkpoint to every rank: one that lags is not damaged."""
    deadline_s = time.monotonic() + LAG_PATIENCE_S
    while not atomic_folder.is_complete(place) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    blind = [
        each for each in all_gather_objects(world, None if atomic_folder.is_complete(place) else _who(world)) if each
    ]
    if blind:
        raise ConfigError(
            f"{place} is there on rank 0 and not on {', '.join(blind)} after {LAG_PATIENCE_S:.0f} s: the run's folder "
            "(root) must be one that all nodes share; mount it there, choose another root=..., or start again if that "
            "file system only lags"
        )


def _who(world: World) -> str:
    return f"rank {world.rank} ({socket.gethostname()})"


def corrupt_files(place: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files, the first of them by name; empty where nothing is.

    Every byte of them is read.
    """
    found = atomic_folder.corrupt_files(place, rank, num_ranks)
    if not found and rank == 0:
        try:
            read_state(place)
        except (OSError, ValueError, TypeError, KeyError) as error:
            found = f"{type(error).__name__}: {error}"
    return found


def complete(folder: Path) -> list[Path]:
    """The checkpoints that are there, the newest last; whether they are sound `latest_valid` tells."""
    # By number, and not .partial: a write that was killed just before its rename holds every file.
    found = [place for place in folder.glob("step_*") if place.name.removeprefix("step_").isdigit()]
    return sorted((place for place in found if atomic_folder.is_complete(place)), key=_step)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def read_state(place: Path) -> RunState:
    """What a checkpoint says of itself."""
    values: dict[str, Any] = json.loads((place / _STATE).read_text())
    return RunState(**values)


def config_path(place: Path) -> Path:
    """The configuration that a checkpoint was written with."""
    return place / _CONFIG


def place_name(step: int) -> str:
    """The folder's name of a checkpoint after `step` steps."""
    return f"step_{step:06d}"


def refuse_unsafe_pickles(place: Path) -> None:
    """Raises SaveFormatError if a file of DeepSpeed's would run code when it is unpickled, as DeepSpeed does.

    Only its own few types may be named in them, besides what torch itself holds to be harmless.
    """
    for path in sorted((place / ENGINE).rglob("*.pt")):
        named = set(get_unsafe_globals_in_checkpoint(path)) - _HARMLESS
        if named:
            raise SaveFormatError(
                f"{path} names {min(named)}, which no checkpoint needs: loading it could run code. It was not written "
                "by a run; remove that checkpoint, and find out who has"
            )


def remove_unfinished(folder: Path) -> None:
    """Removes what killed saves, removals and conversions have left behind."""
    for pattern in (f"step_*{atomic_folder.PARTIAL}", f"step_*{atomic_folder.REMOVED}", "step_*.universal*"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _finish_sealed(folder: Path) -> None:
    """Names what a killed run had brought to the disk whole, and had no step left to name."""
    for partial in sorted(folder.glob(f"step_*{atomic_folder.PARTIAL}")):
        try:
            num_ranks = read_state(partial).layout["num_ranks"]
            atomic_folder.commit(partial, num_ranks)
            logger.warning("%s was whole but for its name, and has it now", partial)
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.info("%s is not whole, and is removed: %s", partial, error)


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # what is left goes at the next save


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step_"))
