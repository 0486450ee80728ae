"""Ends a run that hangs or fails, and reports which rank caused it.

A watchdog thread in each rank aborts the process if a phase of a step takes longer than `timeout_s`, or if a checkpoint
that is being written makes no progress for that time; a rank that raises aborts too. The first rank that aborts writes
its message, with rank, host, step, cause and samples, to the terminal and to `exit.json`.
"""

import errno
import faulthandler
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch.distributed as dist

from train.config.exit_codes import EXIT_FAILED, EXIT_USAGE
from train.distributed.launch import Launch
from train.supervision import flight_recorder
from train.supervision.rank_progress import Progress, RankStatus, find_stragglers, read_statuses
from train.supervision.run_lock import RunLock
from train.supervision.step_errors import CorruptionError
from train.supervision.thread_location import locate_thread

logger = logging.getLogger(__name__)

# Without "save", which may take long; the collectives in it have timeouts of their own.
_TIMED_PHASES = ("data", "forward", "backward", "agree", "update", "evaluate")
_JOIN_MARGIN_S = 15.0
_ABORT_LIMIT_S = 60.0  # for reporting, whose files may be on the file system that hangs
_SAME_MISTAKE_S = 5  # how long another rank waits for rank 0 to report the same mistake
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MAX_NAMED_SAMPLES = 12  # in a message; exit.json lists all of them


class RankFailure(RuntimeError):
    """The reason why a run ends.

    Args:
        message: one sentence with rank, host, phase and cause; the samples are appended, except those of a save.
        status: of the rank that caused it.
        samples: names of the samples that it processed; None if they could not be read.

    Attributes:
        details: rank, host, step, micro_step, phase and samples, for exit.json.
    """

    def __init__(self, message: str, status: RankStatus, samples: Sequence[str] | None) -> None:
        processes_samples = status.step >= 0 and status.phase != "save"
        super().__init__(message + (_format_samples(samples) if processes_samples else ""))
        self.details: dict[str, Any] = {
            key: getattr(status, key) for key in ("rank", "host", "step", "micro_step", "phase")
        } | {"samples": samples}


class ExitFile:
    """The file `exit.json` of a run.

    If several ranks fail, only the first writes it, since the others fail because of the first.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "exit.json"
        self._initial_stat = self._read_stat()

    def read_reason(self) -> str | None:
        """The reason that a rank of this run has written; None if none has."""
        with suppress(OSError, ValueError):
            if self._read_stat() not in (None, self._initial_stat):
                return str(json.loads(self._path.read_text())["reason"])
        return None

    def write(self, code: int, reason: str, **details: Any) -> bool:
        """Writes the file unless another rank of this run has written it; returns whether this rank was the first."""
        partial = self._path.with_name(f"exit.{os.getpid()}.partial")
        with self._lock():
            if self._read_stat() not in (None, self._initial_stat):
                return False
            try:
                partial.write_text(json.dumps({"code": code, "reason": reason, **details}) + "\n")
                partial.replace(self._path)
            except OSError as error:
                print(f"{self._path} could not be written: {error}", file=sys.stderr)
            return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Holds a lock on the run folder where the file system has locks; a lock ends with its process.

        Waits for at most two seconds: a signal handler may call this while the interrupted code holds the lock.
        """
        with ExitStack() as stack:
            with suppress(OSError):
                folder = os.open(self._path.parent, os.O_RDONLY)
                stack.callback(os.close, folder)
                for _ in range(20):
                    with suppress(BlockingIOError):
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.1)
            yield

    def _read_stat(self) -> tuple[int, int] | None:
        """Inode and modification time in ns; None where there is no file."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns


class Watchdog:
    """Context manager that supervises one rank of a run in a thread.

    Args:
        run_dir: of the run.
        launch: rank and number of ranks.
        timeout_s: longest duration of a phase of a step, in seconds.
        join_timeout_s: longest duration of the ranks' first meeting, in seconds.

    Attributes:
        progress: this rank's progress, in a file once the folder is open.
        exit_file: of the run; None until the folder is open, since another run may be active in it.
        get_sample_names: returns the samples of a status; the run sets it when the data is open.
    """

    def __init__(self, run_dir: Path, launch: Launch, timeout_s: float, join_timeout_s: float) -> None:
        self.progress = Progress(None, launch.rank)
        self.get_sample_names: Callable[[RankStatus], list[str]] = lambda status: []
        self.exit_file: ExitFile | None = None
        self._run_dir, self._folder, self._launch = run_dir, run_dir / "log", launch
        # `_join` of world.py has the same limit, and a more specific message.
        self._limits_s = dict.fromkeys(_TIMED_PHASES, timeout_s) | {"join": join_timeout_s + _JOIN_MARGIN_S}
        self._timeout_s = timeout_s
        self._tick_s = min(5.0, timeout_s / 8)
        self._lock = RunLock(run_dir)
        self._log: TextIO = sys.stderr
        self._rank_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def open_folder(self) -> None:
        """Takes the run folder for this run. Rank 0 calls it before the ranks meet, the others afterwards.

        Raises:
            RunActiveError: another run is active in it.
        """
        if self._launch.is_main:
            self._lock.acquire()
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*.progress"):  # of an earlier run, which may have had more ranks
                path.unlink(missing_ok=True)
        else:
            self._lock.join()
        self.progress.open(self._folder)
        self.exit_file = ExitFile(self._run_dir)
        self._log = (self._folder / f"rank_{self._launch.rank:03d}.log").open("a")
        # `kill -USR2 PID` dumps the stacks of a rank, or of a worker of its loader, which inherits the handler.
        faulthandler.register(signal.SIGUSR2, file=self._log, all_threads=True)

    def close_folder(self) -> None:
        """Removes this rank's progress file and gives the folder back."""
        self.progress.remove()
        self._lock.release(is_main=self._launch.is_main)

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def abort(self, error: Exception | None = None, *, failure: RankFailure | None = None) -> NoReturn:
        """Ends this process, and with it the run, with exit code 1.

        Args:
            error: the exception; None if a phase took longer than `timeout_s`.
            failure: the reason, where it is already known.
        """
        failure = failure or self._make_failure(error)
        # Logged at a level that is not shown in the terminal, where only the first rank prints.
        logger.info("%s", failure, exc_info=error)
        if self._report(EXIT_FAILED, str(failure), **failure.details):
            if error is not None:
                traceback.print_exception(error)
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if error is None:
            self._dump_stacks()
        if error is None or _is_collective_error(error):
            flight_recorder.dump(self._folder, self._launch.rank, self._log)
        _exit_process(EXIT_FAILED)

    def exit_now(self, code: int, reason: str) -> NoReturn:
        """Ends this process without waiting for other ranks."""
        if self._report(code, reason):
            print(reason, file=sys.stderr, flush=True)
        _exit_process(code)

    def report_mistake(self, error: Exception) -> None:
        """Writes and prints a user's mistake, once if all ranks have made it.

        Another rank than 0 adds its rank and host: only its node may have the mistake, for example a missing folder.
        """
        reason = str(error)
        if not self._launch.is_main:
            for _ in range(_SAME_MISTAKE_S * 10):  # rank 0 is about to write the same
                if self.exit_file is None or self.exit_file.read_reason() is not None:
                    break
                time.sleep(0.1)
            if self.exit_file is not None and self.exit_file.read_reason() == reason:
                return
            reason = f"rank {self._launch.rank} ({socket.gethostname()}): {reason}"
        if self._report(EXIT_USAGE, reason, step=self.progress.current[0].step) or not self._launch.is_main:
            print(f"error: {reason}", file=sys.stderr, flush=True)

    def _report(self, code: int, reason: str, **details: Any) -> bool:
        """Writes exit.json; returns whether this rank is to print, which is the first of the run's.

        Before the folder is open, one rank of each host prints.
        """
        if self.exit_file is None:
            return self._launch.local_rank == 0
        return self.exit_file.write(code, reason, **details)

    def _make_failure(self, error: Exception | None) -> RankFailure:
        status, _ = self.progress.current
        rank = f"rank {status.rank} ({status.host})"
        if isinstance(error, CorruptionError):  # every rank raises it and may be the first to report
            status = replace(status, rank=error.rank, host=error.host)
            return self._make_failure_with_samples(_describe_error(error), status)
        if error is not None and not _is_collective_error(error):
            message = f"{rank} failed in {status.description}: {_describe_error(error)}"
            return self._make_failure_with_samples(message, status)
        key, limit_s = (
            ("join_timeout_s", self._limits_s["join"] - _JOIN_MARGIN_S)
            if status.phase == "join"
            else ("timeout_s", self._timeout_s)
        )
        trigger = f"{rank} gave up after {key}={limit_s:g}"
        if error is not None:
            trigger = f"{rank} gave up: {_describe_error(error)}"
            self.progress.record_observation(status, waits=True, at=status.at)
            time.sleep(1.0)  # until the other ranks have done the same, except the one that they wait for
        statuses = (read_statuses(self._folder, self._launch.size) if self.exit_file else []) or [status]
        missing = sorted(set(range(self._launch.size)) - {status.rank for status in statuses})
        stragglers = find_stragglers(statuses)
        if all(straggler.waits for straggler in stragglers):
            target, cause = "one another", _list_causes(statuses, stragglers)
            if missing:
                target, cause = f"ranks {', '.join(map(str, missing))}, which left no progress file,", ""
            message = f"ranks wait for {target} in {stragglers[0].description}{cause}; {trigger}"
        else:
            message = f"{_describe_stragglers(stragglers)}; {trigger}"
        return self._make_failure_with_samples(message, stragglers[0])

    def _check_write(self, now_s: float, started_s: float) -> None:
        """Aborts if the checkpoint that is being written has made no progress for `timeout_s`."""
        write = self.progress.last_write()
        if write is None or now_s - max(write[1], started_s) <= self._timeout_s:
            return
        status, _ = self.progress.current
        failure = RankFailure(
            f"rank {status.rank} ({status.host}) has written nothing of {write[0]} for timeout_s={self._timeout_s:g} "
            "seconds; check that file system, and run the same command again",
            replace(status, phase="save"),
            [],
        )
        # The files of the report may be on the file system that hangs.
        threading.Thread(target=self._exit_later, args=(str(failure),), daemon=True).start()
        self.abort(failure=failure)

    def _exit_later(self, reason: str) -> NoReturn:
        time.sleep(_ABORT_LIMIT_S)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        _exit_process(EXIT_FAILED)

    def _make_failure_with_samples(self, message: str, status: RankStatus) -> RankFailure:
        """Adds the names of the samples, unless reading them takes longer than 10 s because the disk hangs."""
        names: list[list[str]] = []
        reader = threading.Thread(target=lambda: names.append(self.get_sample_names(status)), daemon=True)
        reader.start()
        reader.join(10.0)
        return RankFailure(message, status, names[0] if names else None)

    def _supervise(self) -> None:
        """The watchdog thread: records observations and aborts after `timeout_s`."""
        last_tick_s = started_s = time.monotonic()
        previous: tuple[RankStatus, bool] | None = None
        while not self._stopped.wait(self._tick_s):
            now_s = time.monotonic()
            if now_s - last_tick_s > self._tick_s + 5:
                started_s = now_s  # the process was suspended (Ctrl-Z): that time does not count
            last_tick_s = now_s
            # Dumps the stacks even if this thread is no longer scheduled.
            faulthandler.dump_traceback_later(self._timeout_s, file=self._log)
            self._lock.touch()
            if self._launch.launcher_pid not in (None, os.getppid()):
                rank = f"rank {self._launch.rank} ({socket.gethostname()})"
                self.exit_now(
                    EXIT_FAILED, f"{rank} ends, because its launcher (process {self._launch.launcher_pid}) has ended"
                )
            self._check_write(now_s, started_s)
            status, entered_s = self.progress.current
            age_s = now_s - max(entered_s, started_s)
            if age_s > self._tick_s:
                waits, waits_for_device, at = locate_thread(self._rank_thread)
                self.progress.record_observation(status, waits=waits, at=at, waits_for_device=waits_for_device)
                # A rank that has just left a collective is about to raise its error, which is more specific.
                if age_s > self._limits_s.get(status.phase, float("inf")) and previous == (status, waits):
                    self.abort()
                previous = (status, waits)

    def _dump_stacks(self) -> None:
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        if self.progress.current[0].phase == "data":
            for worker in multiprocessing.active_children():
                with suppress(OSError):
                    os.kill(worker.pid or 0, signal.SIGUSR2)
            time.sleep(0.5)


def _exit_process(code: int) -> NoReturn:
    for worker in multiprocessing.active_children():
        worker.kill()
    # Without destroying the process group, which would wait for the other ranks.
    os._exit(code)


def _describe_stragglers(stragglers: Sequence[RankStatus]) -> str:
    first = stragglers[0]
    text = f"rank {first.rank} ({first.host}) has been in {first.description} for {first.age_s:.0f} s"
    if first.at:
        text += f", at {first.at}"
    if time.time() - max(first.seen, first.since) > 15:
        text += ", and its process no longer updates its progress file"
    if len(stragglers) > 1:
        others = ", ".join(f"{status.rank} ({status.host})" for status in stragglers[1:])
        text += f"; the same holds for rank(s) {others}"
    return text


def _list_causes(statuses: Sequence[RankStatus], stragglers: Sequence[RankStatus]) -> str:
    """Returns why ranks may all wait, and which of them wait for their device while the others have reached a
    collective on the host."""
    if not stragglers[0].waits_for_device:
        return " (the network between them, or a collective that not all of them entered)"
    text = " (the network between them, a collective that not all of them entered, or a device that hangs)"
    if len(stragglers) < len(statuses):
        names = ", ".join(f"{status.rank} ({status.host})" for status in stragglers)
        text += f", and rank(s) {names} for their device"
    return text


def _is_collective_error(error: Exception) -> bool:
    """Whether an error only says that other ranks did not take part. Gloo's errors have no type of their own."""
    # Gloo reports "pair closure" for a connection that the timeout of another one has closed.
    return isinstance(error, dist.DistError) or any(text in str(error) for text in ("gloo", "pair closure"))


def _describe_error(error: Exception) -> str:
    """Returns type and message in one line; of a loader worker's traceback, the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error):
        return lines[-1]
    cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        cause += " (free some space, or choose a writable root=..., and run the same command again)"
    return cause


def _format_samples(samples: Sequence[str] | None) -> str:
    if samples is None:
        return "; its samples could not be read"
    if not samples:
        return "; its row has no sample"
    more = (
        f" and {len(samples) - _MAX_NAMED_SAMPLES} more (exit.json has all)"
        if len(samples) > _MAX_NAMED_SAMPLES
        else ""
    )
    return f"; its samples: {', '.join(samples[:_MAX_NAMED_SAMPLES])}{more}"
