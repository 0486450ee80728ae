"""The end of a run whose ranks cannot go on: when, and with which words.

A thread in each rank looks every few seconds. If a phase of a step takes longer than `timeout_s`, the rank says who is
late (`rank_progress.py` knows where everybody stands), dumps its stacks into its log and ends; so does a rank that
raises. Of all the ranks that end, the first is heard: its sentence goes to the terminal and into `exit.json`.
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
from train.supervision.rank_progress import Progress, RankStatus, read_statuses, stragglers

logger = logging.getLogger(__name__)

# A save may be long; its collectives have their timeouts.
_TIMED = ("data", "forward", "backward", "agree", "update", "evaluate")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MOST_NAMED = 12  # samples in a sentence; exit.json has all of them


class RankFailure(RuntimeError):
    """Why a run ends: one sentence with rank, host, place, cause and samples; `about` has them one by one.

    `samples` are names; None if they could not be read.
    """

    def __init__(self, sentence: str, place: RankStatus, samples: Sequence[str] | None) -> None:
        super().__init__(sentence + (_listed(samples) if place.step >= 0 else ""))
        self.about: dict[str, Any] = {
            key: getattr(place, key) for key in ("rank", "host", "step", "micro_step", "phase")
        } | {"samples": samples}


class ExitFile:
    """`exit.json` of a run. Of several ranks that fail the first is heard, for the others fail because of it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "exit.json"
        self._earlier_runs = self._stamp()

    def write(self, code: int, reason: str, **about: Any) -> bool:
        """Writes it unless another rank of this run has; says whether this rank's word stands."""
        partial = self._path.with_name(f"exit.{os.getpid()}.partial")
        with self._locked():
            if self._stamp() not in (None, self._earlier_runs):
                return False
            try:
                partial.write_text(json.dumps({"code": code, "reason": reason, **about}) + "\n")
                partial.replace(self._path)
            except OSError as error:
                print(f"exit.json was not written: {error}", file=sys.stderr)
            return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One rank after the other, on file systems that have locks; a lock ends with its process.

        Not for long: a signal may have come to this very process while it was writing.
        """
        with ExitStack() as at_end:
            with suppress(OSError):
                folder = os.open(self._path.parent, os.O_RDONLY)
                at_end.callback(os.close, folder)
                for _ in range(20):
                    with suppress(BlockingIOError):
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.1)
            yield

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


class Watch:
    """Looks after one rank of a run, in a thread, while its `with` block lasts.

    Args:
        run_dir: of the run.
        launch: who this rank is.
        timeout_s: the longest that a phase of a step may take.

    `names` gives the samples of a place; the run sets it as soon as it knows.
    """

    def __init__(self, run_dir: Path, launch: Launch, timeout_s: float) -> None:
        self.progress = Progress(None, launch.rank)
        self.names: Callable[[RankStatus], list[str]] = lambda place: []
        self.exit_file = ExitFile(run_dir)
        self._folder, self._launch, self._timeout_s = run_dir / "log", launch, timeout_s
        self._tick_s = min(5.0, timeout_s / 8)
        self._rank_thread = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def __enter__(self) -> "Watch":
        self.progress = Progress(self._folder, self._launch.rank)
        self._log = (self._folder / f"rank_{self._launch.rank:03d}.log").open("a")
        # `kill -USR2 PID` writes where a rank, or a worker of its loader (which inherits this), stands.
        faulthandler.register(signal.SIGUSR2, file=self._log, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def abort(self, error: Exception | None = None) -> NoReturn:
        """Ends this process, and with it the run.

        Args:
            error: what was raised; None if a phase took longer than `timeout_s`.
        """
        failure = self._failure(error)
        is_first = self.exit_file.write(EXIT_FAILED, str(failure), **failure.about)
        # At a level that stays out of the terminal: there, one rank speaks.
        logger.info("%s", failure, exc_info=error)
        if is_first:
            if error is not None:
                traceback.print_exception(error)
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if error is None:
            self._dump_stacks()
        _end(EXIT_FAILED)

    def exit_at_once(self, code: int, reason: str) -> NoReturn:
        """Ends this process without waiting for anybody."""
        if self.exit_file.write(code, reason):
            print(reason, file=sys.stderr, flush=True)
        _end(code)

    def _failure(self, error: Exception | None) -> RankFailure:
        own, _ = self.progress.now
        if error is not None and not _is_of_a_collective(error):
            return self._named(f"rank {own.rank} ({own.host}) failed in {own.description}: {_cause(error)}", own)
        waited = f"rank {own.rank} ({own.host}) gave up after timeout_s={self._timeout_s:g}"
        if error is not None:
            waited = f"rank {own.rank} ({own.host}) gave up: {_cause(error)}"
            self.progress.note(own, waits=True, at=own.at)
            time.sleep(1.0)  # for the others to do the same: only the one that they miss does not
        places = read_statuses(self._folder, self._launch.size) or [own]
        unseen = sorted(set(range(self._launch.size)) - {place.rank for place in places})
        behind = stragglers(places)
        if all(place.waits for place in behind):
            who = f"ranks {', '.join(map(str, unseen))}, which left no progress file," if unseen else "one another"
            cause = "" if unseen else " (the network between them, or a collective that not all of them take part in)"
            return self._named(f"ranks wait for {who} in {behind[0].description}{cause}; {waited}", behind[0])
        return self._named(f"{_describe_stragglers(behind)}; {waited}", behind[0])

    def _named(self, sentence: str, place: RankStatus) -> RankFailure:
        """With the samples' names, unless the disk that has them is what everybody waits for."""
        found: list[list[str]] = []
        reader = threading.Thread(target=lambda: found.append(self.names(place)), daemon=True)
        reader.start()
        reader.join(10.0)
        return RankFailure(sentence, place, found[0] if found else None)

    def _look(self) -> None:
        looked_s = started_s = time.monotonic()
        before: tuple[RankStatus, bool] | None = None
        while not self._over.wait(self._tick_s):
            now_s = time.monotonic()
            if now_s - looked_s > self._tick_s + 5:
                started_s = now_s  # this process was stopped (Ctrl-Z) and goes on: no phase of it was that long
            looked_s = now_s
            # For the case that this thread gets no turn any more.
            faulthandler.dump_traceback_later(self._timeout_s, file=self._log)
            place, entered_s = self.progress.now
            age_s = now_s - max(entered_s, started_s)
            if age_s > self._tick_s:
                waits, at = _thread_location(self._rank_thread)
                self.progress.note(place, waits=waits, at=at)
                # One that has just come out of a collective brings its error, which says more.
                if age_s > self._timeout_s and place.phase in _TIMED and before == (place, waits):
                    self.abort()
                before = (place, waits)

    def _dump_stacks(self) -> None:
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        if self.progress.now[0].phase == "data":
            for worker in multiprocessing.active_children():
                with suppress(OSError):
                    os.kill(worker.pid or 0, signal.SIGUSR2)
            time.sleep(0.5)


def _end(code: int) -> NoReturn:
    for worker in multiprocessing.active_children():
        worker.kill()
    # Not by way of the process group's clean-up, which would wait for the others.
    os._exit(code)


def _describe_stragglers(behind: Sequence[RankStatus]) -> str:
    first = behind[0]
    text = f"rank {first.rank} ({first.host}) has been in {first.description} for {first.age_s:.0f} s"
    if first.at:
        text += f", at {first.at}"
    if time.time() - max(first.seen, first.since) > 15:
        text += ", and its process gives no sign of life"
    if len(behind) > 1:
        text += "; so has rank " + ", ".join(f"{place.rank} ({place.host})" for place in behind[1:])
    return text


def _thread_location(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and its innermost line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, ""
    module = frame.f_globals.get("__name__", "")
    at = f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"
    return module.startswith(("torch.distributed", "deepspeed")), at


def _is_of_a_collective(error: Exception) -> bool:
    """Whether an error only says that other ranks did not come: gloo has no type of its own for it."""
    # The second are gloo's words too, for a pair that a timeout of another one has closed.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "pair closure"))


def _cause(error: Exception) -> str:
    """Type and message in one line; a loader's worker sends its own traceback, whose last line says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback" in str(error):
        return lines[-1]
    cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        cause += " (make room, or choose a root=... that can be written, and run the same command again)"
    return cause


def _listed(samples: Sequence[str] | None) -> str:
    if samples is None:
        return "; its samples could not be read"
    if not samples:
        return "; it has no sample there"
    more = f" and {len(samples) - _MOST_NAMED} more (exit.json has all)" if len(samples) > _MOST_NAMED else ""
    return f"; its samples: {', '.join(samples[:_MOST_NAMED])}{more}"
