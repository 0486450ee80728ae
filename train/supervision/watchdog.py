"""Ends a run that hangs or fails, and reports which rank caused it.

A watchdog thread in each rank aborts the process if a phase of a step takes longer than `timeout_s`; a rank that raises
aborts too. The first rank that aborts writes its message, with rank, host, step, cause and samples, to the terminal and
to `exit.json`.
"""

import errno
import faulthandler
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from train.config.exit_codes import EXIT_FAILED
from train.distributed.world import Launch
from train.supervision.rank_progress import Progress, RankStatus, find_stragglers, read_statuses

logger = logging.getLogger(__name__)

# Without "save", which may take long; the collectives in it have timeouts of their own.
_TIMED_PHASES = ("data", "forward", "backward", "agree", "update", "evaluate")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MAX_NAMED_SAMPLES = 12  # in a message; exit.json lists all of them


class RankFailure(RuntimeError):
    """The reason why a run ends.

    Args:
        message: one sentence with rank, host, phase and cause; the samples are appended.
        status: of the rank that caused it.
        samples: names of the samples that it processed; None if they could not be read.

    Attributes:
        details: rank, host, step, micro_step, phase and samples, for exit.json.
    """

    def __init__(self, message: str, status: RankStatus, samples: Sequence[str] | None) -> None:
        super().__init__(message + (_format_samples(samples) if status.step >= 0 else ""))
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

    Attributes:
        progress: this rank's progress file.
        exit_file: of the run.
        get_sample_names: returns the samples of a status; the run sets it when the data is open.
    """

    def __init__(self, run_dir: Path, launch: Launch, timeout_s: float) -> None:
        self.progress = Progress(None, launch.rank)
        self.get_sample_names: Callable[[RankStatus], list[str]] = lambda status: []
        self.exit_file = ExitFile(run_dir)
        self._folder, self._launch, self._timeout_s = run_dir / "log", launch, timeout_s
        self._tick_s = min(5.0, timeout_s / 8)
        self._rank_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self.progress = Progress(self._folder, self._launch.rank)
        self._log = (self._folder / f"rank_{self._launch.rank:03d}.log").open("a")
        # `kill -USR2 PID` dumps the stacks of a rank, or of a worker of its loader, which inherits the handler.
        faulthandler.register(signal.SIGUSR2, file=self._log, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def abort(self, error: Exception | None = None) -> NoReturn:
        """Ends this process, and with it the run, with exit code 1.

        Args:
            error: the exception; None if a phase took longer than `timeout_s`.
        """
        failure = self._make_failure(error)
        is_first = self.exit_file.write(EXIT_FAILED, str(failure), **failure.details)
        # Logged at a level that is not shown in the terminal, where only the first rank prints.
        logger.info("%s", failure, exc_info=error)
        if is_first:
            if error is not None:
                traceback.print_exception(error)
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if error is None:
            self._dump_stacks()
        _exit_process(EXIT_FAILED)

    def exit_now(self, code: int, reason: str) -> NoReturn:
        """Ends this process without waiting for other ranks."""
        if self.exit_file.write(code, reason):
            print(reason, file=sys.stderr, flush=True)
        _exit_process(code)

    def _make_failure(self, error: Exception | None) -> RankFailure:
        status, _ = self.progress.current
        rank = f"rank {status.rank} ({status.host})"
        if error is not None and not _is_collective_error(error):
            message = f"{rank} failed in {status.description}: {_describe_error(error)}"
            return self._make_failure_with_samples(message, status)
        trigger = f"{rank} gave up after timeout_s={self._timeout_s:g}"
        if error is not None:
            trigger = f"{rank} gave up: {_describe_error(error)}"
            self.progress.record_observation(status, waits=True, at=status.at)
            time.sleep(1.0)  # until the other ranks have done the same, except the one that they wait for
        statuses = read_statuses(self._folder, self._launch.size) or [status]
        missing = sorted(set(range(self._launch.size)) - {status.rank for status in statuses})
        stragglers = find_stragglers(statuses)
        if all(straggler.waits for straggler in stragglers):
            target, cause = "one another", " (the network between them, or a collective that not all of them entered)"
            if missing:
                target, cause = f"ranks {', '.join(map(str, missing))}, which left no progress file,", ""
            message = f"ranks wait for {target} in {stragglers[0].description}{cause}; {trigger}"
        else:
            message = f"{_describe_stragglers(stragglers)}; {trigger}"
        return self._make_failure_with_samples(message, stragglers[0])

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
            status, entered_s = self.progress.current
            age_s = now_s - max(entered_s, started_s)
            if age_s > self._tick_s:
                waits, at = _locate_thread(self._rank_thread)
                self.progress.record_observation(status, waits=waits, at=at)
                # A rank that has just left a collective is about to raise its error, which is more specific.
                if age_s > self._timeout_s and status.phase in _TIMED_PHASES and previous == (status, waits):
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


def _locate_thread(thread: int) -> tuple[bool, str]:
    """Returns whether a thread is inside a collective, and its innermost line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, ""
    module = frame.f_globals.get("__name__", "")
    at = f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"
    return module.startswith(("torch.distributed", "deepspeed")), at


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
