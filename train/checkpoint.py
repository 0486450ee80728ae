"""Checkpoints on disk: complete and whole, or not there.

A save has two parts. While every rank waits, DeepSpeed writes its files aside. Then training goes on, and a thread of
each rank brings its files to the disk and sums them up (sha256); when all have (the step's collective says so), the
first rank writes `sums.json` and gives the folder its name. What is read back is summed up again before it is loaded.

    step_000500/engine/...      DeepSpeed's own files: trained parts and optimizer; frozen parts are `init_from`'s
                config.yaml     the resolved configuration
                run_state.json  the step, and what a run that goes on must agree with
                sums.json       bytes and sha256 of all of these

Going on from one is `resume.py`'s.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
from torch.serialization import get_unsafe_globals_in_checkpoint

from train.config import SaveConfig
from train.world import World, barrier, share

logger = logging.getLogger(__name__)

ENGINE = "engine"
_HARMLESS = {
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
}
_STATE, _CONFIG, _SUMS = "run_state.json", "config.yaml", "sums.json"


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
        partial = self._folder / f"{place_name(state.step)}.partial"
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
        place = partial.with_name(partial.name.removesuffix(".partial"))
        try:
            if self._error is not None:
                raise self._error
            if self._world.is_main:
                _give_name(partial, place, self._world.size)
                self._remove_old()
        except (OSError, ValueError) as error:
            raise self._failed(partial, error) from error
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
            own = [path for path in _files(partial) if _owner(path) == self._world.rank]
            sums = {path.relative_to(partial).as_posix(): _sum(path, sync=True) for path in own}
            _write_synced(_rank_sums(partial, self._world.rank), json.dumps(sums))
        except Exception as error:
            self._error = error

    def _remove_old(self) -> None:
        """Takes the names of old ones away, and lets their files go beside the next steps: they may be a hundred GB."""
        every = self._save.keep_every
        old = [place for place in complete(self._folder)[: -self._save.keep] if not every or _step(place) % every]
        unnamed = [_unname(place) for place in old]
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
            f"{partial.with_suffix('')} could not be saved: {' '.join(str(error).split())} ({free}); {kept}. Make "
            "room, or choose another root=..., and run the same command again"
        )


def find_sound(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what was written, or None. Every rank must call it; each reads a share.

    A damaged one is named, gets `.damaged` behind its name, and the one before it is tried.
    """
    if world.is_main:
        _finish_sealed(folder)
        remove_unfinished(folder)
    barrier(world)
    for place in reversed(complete(folder)):
        found = [told for told in share(world, damage(place, world.rank, world.size)) if told]
        if not found:
            return place
        if world.is_main:
            logger.warning("checkpoint %s is damaged (%s); the one before it is tried", place, "; ".join(found[:3]))
            aside = place.with_name(place.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        barrier(world)
    return None


def complete(folder: Path) -> list[Path]:
    """The checkpoints that are there, the newest last; whether they are sound `find_sound` tells."""
    # By number, and not .partial: a write that was killed just before its rename holds every file.
    found = [place for place in folder.glob("step_*") if place.name.removeprefix("step_").isdigit()]
    return sorted((place for place in found if (place / _SUMS).is_file()), key=_step)


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


def refuse_code(place: Path) -> None:
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
    for pattern in ("step_*.partial", "step_*.removed", "step_*.universal*"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _give_name(partial: Path, place: Path, num_ranks: int) -> None:
    """Makes a checkpoint of the files that every rank has sealed.

    Raises:
        OSError: a rank has not, or the disk fails.
        ValueError: a file is there that no rank has summed up, or the other way round.
    """
    if not (partial / _SUMS).is_file():
        sums: dict[str, Any] = {}
        for rank in range(num_ranks):
            sums |= json.loads(_rank_sums(partial, rank).read_text())
        unsummed = {path.relative_to(partial).as_posix() for path in _files(partial)} ^ set(sums)
        if unsummed:
            raise ValueError(f"no rank has written, or summed up, {', '.join(sorted(unsummed))}")
        unfinished = partial / f"{_SUMS}.partial"
        _write_synced(unfinished, json.dumps(sums, indent=1, sort_keys=True) + "\n")
        unfinished.rename(partial / _SUMS)
    for rank in range(num_ranks):
        _rank_sums(partial, rank).unlink(missing_ok=True)
    for folder in (partial / ENGINE, partial):
        _sync_folder(folder)
    if place.exists():  # from before the run went back to an earlier one
        shutil.rmtree(_unname(place))
    partial.rename(place)
    _sync_folder(place.parent)


def _finish_sealed(folder: Path) -> None:
    """Names what a killed run had brought to the disk whole, and had no step left to name."""
    for partial in sorted(folder.glob("step_*.partial")):
        try:
            num_ranks = read_state(partial).layout["num_ranks"]
            _give_name(partial, partial.with_name(partial.name.removesuffix(".partial")), num_ranks)
            logger.warning("%s was whole but for its name, and has it now", partial)
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.info("%s is not whole, and is removed: %s", partial, error)


def damage(place: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files, the first of them by name; empty where nothing is.

    Every byte of them is read.
    """
    try:
        sums = json.loads((place / _SUMS).read_text())
        for name, expected in sorted(sums.items())[rank::num_ranks]:
            path = place / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, {expected['bytes']:,} were written"
            if _sum(path) != expected:
                return f"{name} has other bytes than were written (sha256)"
        if rank == 0:
            read_state(place)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _unname(place: Path) -> Path:
    """The first act of a removal: a kill in its middle then leaves nothing that looks like a checkpoint."""
    unnamed = place.with_name(f"{place.name}.removed")
    place.rename(unnamed)
    return unnamed


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # what is left goes at the next save


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step_"))


def _files(partial: Path) -> list[Path]:
    return [path for path in sorted(partial.rglob("*")) if path.is_file() and not path.name.startswith("sums")]


def _owner(path: Path) -> int:
    """The rank that has written a file: DeepSpeed's names say it, the others are the first rank's."""
    in_engine = path.as_posix().rpartition(f"/{ENGINE}/")[2]
    found = re.search(r"(?:zero_pp_rank_|offloaded_tensors/rank)(\d+)", in_engine)
    return int(found.group(1)) if found else 0


def _rank_sums(partial: Path, rank: int) -> Path:
    return partial / f"sums_rank_{rank:03d}.json"


def _sum(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
