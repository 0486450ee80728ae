"""Writes checkpoints, which are either complete or absent, and finds the newest valid one.

All ranks wait while their tensors are copied to host memory (`background_copy.py`). Training then continues while a
thread of each rank writes, hashes and syncs its files in a partial folder; when all ranks have finished, rank 0 writes
`sums.json` and renames the folder. Where the copy is not possible, all ranks wait while DeepSpeed writes its files, and
the threads only sync and hash them. A checkpoint is hashed again before it is loaded.

    step_000500/engine/...      DeepSpeed's files: trained parameters and optimizer; frozen ones come from `init_from`
                config.yaml     the resolved configuration
                run_state.json  the step, and what a resumed run is compared with
                sums.json       size and sha256 of all of these
"""

import json
import logging
import shutil
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from llava_next.file_access import permission_problem
from llava_next.formats.atomic import PARTIAL, REMOVED, partial_path, retire_directory
from train.checkpoint import atomic_folder, background_copy
from train.checkpoint.host_copy import HostCopy
from train.config.schema import ConfigError, SaveConfig
from train.distributed.world import World, all_gather_objects, barrier, broadcast_from_main

logger = logging.getLogger(__name__)

ENGINE = "engine"
_SAFE_GLOBALS = {
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
}
VISIBILITY_TIMEOUT_S = 90.0
"""How long a rank waits to see a checkpoint that rank 0 sees: NFS caches folder contents for up to a minute."""
_REPORTED_WAIT_S, _FAILURE_WAIT_S = 1.0, 10.0
_STATE, _CONFIG = "run_state.json", "config.yaml"


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier ones are unchanged."""


@dataclass(frozen=True)
class RunState:
    """The state of a run that a resumed run is compared with; the content of run_state.json.

    Attributes:
        step: number of finished steps.
        data_fingerprint: of mixture and processor.
        layout: what DeepSpeed's files depend on: number of ranks, ZeRO stage and some options.
        dtype: of the weights, for example "bfloat16".
        groups: name, part, peak_lr, weight_decay, betas and eps of each optimizer group.
        updates: number of applied updates; less than `step` if steps were skipped.
        frozen: sha256 of the frozen parameters by part; the checkpoint does not contain them.
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
    """A file of a checkpoint contains something that a run does not write."""


class Saver:
    """Writes the checkpoints of a run. Every rank must make the same calls.

    Args:
        folder: of all checkpoints; shared by all ranks.
        world: of the run.
        save: which checkpoints are kept.
    """

    def __init__(self, folder: Path, world: World, save: SaveConfig) -> None:
        self._folder, self._world, self._save = folder, world, save
        self._copying: background_copy.CopyingEngine | None = None
        self._partial: Path | None = None
        self._write_thread: threading.Thread | None = None
        self._remove_thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._started_s = self._progress_s = 0.0

    @property
    def is_ready_to_commit(self) -> bool:
        """Whether this rank has written, synced and hashed its files of an uncommitted checkpoint, or has failed to."""
        return self._write_thread is not None and not self._write_thread.is_alive()

    def last_progress(self) -> tuple[Path, float] | None:
        """The checkpoint that this rank's thread is writing, and when it last wrote or read some bytes, in seconds on
        the monotonic clock. None if it is not writing."""
        thread, partial = self._write_thread, self._partial
        if thread is None or partial is None or not thread.is_alive():
            return None
        return atomic_folder.final_path(partial), self._progress_s

    def write_in_background(self, engine: deepspeed.DeepSpeedEngine) -> str:
        """Makes the saves of this engine copy to host memory, where that is possible. Call it before the first step.

        Returns:
            A sentence for the log: how saves are written, and why.
        """
        self._copying, sentence = background_copy.enable(engine, self._folder, self._world)
        return sentence

    def write(self, engine: deepspeed.DeepSpeedEngine, state: RunState, config_yaml: str) -> float:
        """Copies this rank's tensors, or writes its files; `commit` or `wait` completes the checkpoint.

        Waits first until the previous checkpoint is complete.

        Returns:
            The seconds that it took.

        Raises:
            SaveError: the disk is full or the folder is not writable.
        """
        called = time.monotonic()
        self.wait()
        started = self._started_s = time.monotonic()
        partial = partial_path(self._folder / checkpoint_name(state.step))
        try:
            if self._world.is_main:
                remove_unfinished(self._folder)
                (partial / ENGINE).mkdir(parents=True)
            barrier(self._world)
            engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            background_copy.synchronize(self._world.device)
            if self._world.is_main:
                (partial / _CONFIG).write_text(config_yaml)
                (partial / _STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            raise self._make_error(partial, error) from error
        self._partial, self._error = partial, None
        self._report_progress()
        self._write_thread = threading.Thread(target=self._write_files, args=(partial,), daemon=True, name="save")
        self._write_thread.start()
        finished = time.monotonic()
        self._log_stall(state.step, waited_s=started - called, stalled_s=finished - called)
        return finished - called

    def commit(self) -> Path | None:
        """Completes the checkpoint: rank 0 writes sums.json and renames the folder. Every rank must call it.

        Must be called when `is_ready_to_commit` is true on every rank. Returns the folder; None if nothing was written.

        Raises:
            SaveError: on every rank, if one of them could not write its files.
        """
        if self._write_thread is None or self._partial is None:
            return None
        self._write_thread.join()
        partial, self._partial, self._write_thread = self._partial, None, None
        error = self._make_error(partial, self._error) if self._error is not None else None
        errors = all_gather_objects(self._world, error)
        first = next((each for each in errors if each is not None), None)
        if first is not None:
            raise first from self._error
        broadcast_from_main(self._world, lambda: self._commit(partial))
        path = atomic_folder.final_path(partial)
        logger.info("%s is complete; saving took %.1f s", path, time.monotonic() - self._started_s)
        return path

    def find_failure(self) -> SaveError | None:
        """Returns why this rank could not write its files of an uncommitted checkpoint; None if it could, or is still
        writing."""
        if self._write_thread is None or self._partial is None:
            return None
        self._write_thread.join(_FAILURE_WAIT_S)  # a thread whose write has failed is about to end
        return self._make_error(self._partial, self._error) if self._error is not None else None

    def wait(self) -> None:
        """Waits until a checkpoint that is being written is complete on all ranks, and old ones are removed.

        Raises:
            SaveError: as `commit` does.
        """
        if self._write_thread is not None:
            self._write_thread.join()
            barrier(self._world)
            self.commit()
        if self._remove_thread is not None:
            self._remove_thread.join()

    def _write_files(self, partial: Path) -> None:
        """The thread: writes the copied files, and syncs and hashes all files of this rank."""
        sums, copies = {}, self._copying.copies if self._copying is not None else {}
        try:
            for path, copy in copies.items():
                write = partial_function(_save_copy, copy)
                sums[path.relative_to(partial).as_posix()] = atomic_folder.write_hashed(
                    path, write, on_progress=self._report_progress
                )
            atomic_folder.seal(partial, self._world.rank, sums, on_progress=self._report_progress)
        except Exception as error:
            self._error = error

    def _report_progress(self) -> None:
        self._progress_s = time.monotonic()

    def _log_stall(self, step: int, *, waited_s: float, stalled_s: float) -> None:
        if waited_s > _REPORTED_WAIT_S and self._world.is_main:
            logger.warning(
                "the save after step %d stalled training for %.1f s, of which it waited %.1f s for the previous "
                "checkpoint to be written: raise save.every (now %d), or use a faster disk",
                step,
                stalled_s,
                waited_s,
                self._save.every,
            )
        logger.info("the save after step %d stalled training for %.1f s", step, stalled_s)

    def _commit(self, partial: Path) -> None:
        try:
            atomic_folder.commit(partial, self._world.size)
            self._remove_old()
        except (OSError, ValueError) as error:
            raise self._make_error(partial, error) from error

    def _remove_old(self) -> None:
        """Renames old checkpoints and removes their files in a thread, since they may have hundreds of GB."""
        every = self._save.keep_every
        old = [
            path for path in list_complete(self._folder)[: -self._save.keep] if not every or _parse_step(path) % every
        ]
        retired = [retire_directory(path) for path in old]
        if self._remove_thread is not None:
            self._remove_thread.join()
        self._remove_thread = threading.Thread(target=_remove_all, args=(retired,), daemon=True, name="remove")
        self._remove_thread.start()

    def _make_error(self, partial: Path, error: Exception) -> SaveError:
        rank = f"rank {self._world.rank} ({socket.gethostname()}): " if self._world.size > 1 else ""
        newest = find_newest(self._folder)
        fallback = f"the newest complete checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        try:
            free = f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB are free"
        except OSError as unreadable:
            free = str(unreadable)
        return SaveError(
            f"{atomic_folder.final_path(partial)} could not be saved: {rank}{' '.join(str(error).split())} ({free}); "
            f"{fallback}. Free some space, or choose another root=..., and run the same command again"
        )


def _save_copy(copy: HostCopy, file: Any) -> None:
    torch.save(copy.restore(), file)


def latest_valid(folder: Path, world: World) -> Path | None:
    """Returns the newest checkpoint whose files are intact, or None. Every rank must call it; each reads a share.

    Rank 0 lists the checkpoints. A damaged one is logged and renamed to `NAME.damaged`, and the previous one is tried.

    Raises:
        ConfigError: a rank does not see a checkpoint that rank 0 sees, with the rank and its host; or a rank may not
            read a file of one, which is then not considered damaged.
    """

    def recover_and_list() -> list[Path]:
        denied = permission_problem(folder)
        if denied:
            raise ConfigError(denied)
        _commit_sealed(folder)
        remove_unfinished(folder)
        return list_complete(folder)

    for path in reversed(broadcast_from_main(world, recover_and_list)):
        _wait_until_visible(path, world)
        damage = [text for text in all_gather_objects(world, corrupt_files(path, world.rank, world.size)) if text]
        if not damage:
            return path
        denied = [text for text in all_gather_objects(world, permission_problem(path, depth=2)) if text]
        if denied:
            raise ConfigError(denied[0])
        if world.is_main:
            logger.warning("checkpoint %s is damaged (%s); trying the previous one", path, "; ".join(damage[:3]))
            renamed = path.with_name(path.name + ".damaged")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
        barrier(world)
    return None


def _wait_until_visible(path: Path, world: World) -> None:
    """Waits until every rank sees a checkpoint, since a network file system may show it late."""
    deadline_s = time.monotonic() + VISIBILITY_TIMEOUT_S
    while not atomic_folder.is_complete(path) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    rank_name = f"rank {world.rank} ({socket.gethostname()})"
    missing = [name for name in all_gather_objects(world, "" if atomic_folder.is_complete(path) else rank_name) if name]
    if missing:
        raise ConfigError(
            f"{path} exists on rank 0 but not on {', '.join(missing)} after {VISIBILITY_TIMEOUT_S:.0f} s; set root= "
            "to a folder that all nodes share, or start again if the file system was only slow"
        )


def corrupt_files(path: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """Reads this rank's share of a checkpoint's files and describes the first that is damaged; empty if none is."""
    damage = atomic_folder.corrupt_files(path, rank, num_ranks)
    if not damage and rank == 0:
        try:
            read_state(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            damage = f"{type(error).__name__}: {error}"
    return damage


def list_complete(folder: Path) -> list[Path]:
    """Returns the complete checkpoints, the newest last. Their files are not verified; see `latest_valid`."""
    # A .partial folder may have every file, if the process was killed just before the rename.
    paths = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted((path for path in paths if atomic_folder.is_complete(path)), key=_parse_step)


def find_newest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint, or None."""
    paths = list_complete(folder)
    return paths[-1] if paths else None


def read_state(path: Path) -> RunState:
    """Reads run_state.json of a checkpoint."""
    values: dict[str, Any] = json.loads((path / _STATE).read_text())
    return RunState(**values)


def config_path(path: Path) -> Path:
    """Returns the path of the configuration that a checkpoint was written with."""
    return path / _CONFIG


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a checkpoint after `step` steps."""
    return f"step_{step:06d}"


def refuse_unsafe_pickles(path: Path) -> None:
    """Raises SaveFormatError if one of DeepSpeed's files could run code when DeepSpeed unpickles it.

    The files may name only a few types of DeepSpeed, besides those that torch considers safe.
    """
    for file in sorted((path / ENGINE).rglob("*.pt")):
        unsafe = set(get_unsafe_globals_in_checkpoint(file)) - _SAFE_GLOBALS
        if unsafe:
            raise SaveFormatError(
                f"{file} names {min(unsafe)}, which no checkpoint needs: loading it could run code. It was not written "
                "by a run; remove the checkpoint and find out where it comes from"
            )


def remove_unfinished(folder: Path) -> None:
    """Removes the partial files of killed saves, removals and conversions."""
    for pattern in (f"step_*{PARTIAL}", f"step_*{REMOVED}", "step_*.universal*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _commit_sealed(folder: Path) -> None:
    """Commits checkpoints whose files were all synced and hashed when the run was killed."""
    for partial in sorted(folder.glob(f"step_*{PARTIAL}")):
        try:
            num_ranks = read_state(partial).layout["num_ranks"]
            atomic_folder.commit(partial, num_ranks)
            logger.warning("%s had all of its files and is now complete", partial)
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.info("%s is incomplete and is removed: %s", partial, error)


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # files that remain are removed at the next save


def _parse_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
