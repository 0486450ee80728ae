"""Progress files: each rank records its step, micro-step and phase, so that any rank can tell which ranks are late.

A rank rewrites `log/rank_NNN.progress` in place. Its first line changes with every phase; the second has what the
watchdog observed last, for example whether the rank waits in a collective. Reading them needs the run folder only.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data_recipes.mixture.mixture import Mixture
from train.data.loader import Planner

PHASES = {
    "join": "joining the process group",
    "start": "starting",
    "data": "waiting for its data",
    "forward": "forward",
    "backward": "backward",
    "agree": "all-reducing losses",
    "update": "the optimizer step",
    "evaluate": "the held-out loss and answers",
    "save": "saving",
    "end": "writing the result",
}
"""Phases in the order of a step, with the descriptions that messages use."""
ROW_PHASES = ("data", "forward", "backward")
"""The phases that process one row; the others concern the whole step."""
_LINE = 320  # bytes of each of the two lines, which are padded so that they can be rewritten in place


@dataclass(frozen=True)
class RankStatus:
    """The progress of a rank. Times are seconds since the epoch.

    Attributes:
        rank, host: of the process.
        step: from 0; -1 before the first.
        micro_step: from 0; meaningful in the phases of a row.
        phase: a key of `PHASES`.
        since: when the phase began.
        waits: whether the watchdog saw the rank inside a collective, or waiting for its device.
        waits_for_device: whether it was the device.
        at: the innermost line of the main thread that the watchdog saw.
        seen: when the watchdog looked.
        held_s: seconds that the phase had lasted then, on the monotonic clock.
    """

    rank: int
    host: str
    step: int
    micro_step: int
    phase: str
    since: float
    waits: bool = False
    waits_for_device: bool = False
    at: str = ""
    seen: float = 0.0
    held_s: float | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """A key that increases as the rank makes progress."""
        micro_step = self.micro_step if self.phase in ROW_PHASES else 2**31
        return self.step, micro_step, list(PHASES).index(self.phase)

    @property
    def age_s(self) -> float:
        """Seconds that the rank has been in the phase; a jump of the clock since `seen` is included."""
        now = time.time()
        return max(0.0, now - self.since if self.held_s is None else self.held_s + now - self.seen)

    @property
    def description(self) -> str:
        """Step, micro-step and phase as messages name them."""
        if self.step < 0:
            return PHASES[self.phase]
        micro_step = f", micro-step {self.micro_step}" if self.phase in ROW_PHASES else ""
        return f"step {self.step}{micro_step}, {PHASES[self.phase]}"


class Progress:
    """Writes this rank's progress file.

    Args:
        folder: folder of the files of all ranks; None keeps the status in memory only.
        rank: of this process.

    Attributes:
        last_write: returns the checkpoint that a thread of this process is writing and when it last made progress, in
            seconds on the monotonic clock; None if it writes none.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.last_write: Callable[[], tuple[Path, float] | None] = lambda: None
        self._rank, self._host = rank, socket.gethostname()
        self._path: Path | None = None
        self._file: int | None = None
        self.enter("start", -1)
        if folder:
            self.open(folder)

    def open(self, folder: Path) -> None:
        """Begins to write the file, which an earlier run may have left."""
        self._path = progress_path(folder, self._rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o666)
        status = self._current[0]
        self.enter(status.phase, status.step, status.micro_step)
        self.record_observation(self._current[0], waits=False, at="")

    @property
    def current(self) -> tuple[RankStatus, float]:
        """The status of this rank, and when its phase began on the monotonic clock, in seconds."""
        return self._current

    def enter(self, phase: str, step: int, micro_step: int = 0) -> None:
        """Records that this rank begins a phase. Writes a few bytes to the page cache and never raises."""
        # `since` is not rounded: it identifies the phase of an observation, and two phases can begin in a millisecond.
        status = RankStatus(self._rank, self._host, step, micro_step, phase, time.time())
        self._current = (status, time.monotonic())
        self._write(
            0,
            f'{{"rank": {self._rank}, "host": "{self._host}", "step": {step}, "micro_step": {micro_step}, '
            f'"phase": "{phase}", "since": {status.since}}}',
        )

    def record_observation(self, status: RankStatus, *, waits: bool, at: str, waits_for_device: bool = False) -> None:
        """Records what the watchdog saw while the rank had this status, and syncs it to disk for other hosts.

        Args:
            waits: whether the rank was inside a collective, or waited for its device.
            at: the innermost line of its main thread.
            waits_for_device: whether it was the device.
        """
        current, entered_s = self._current
        held_s = round(time.monotonic() - entered_s, 3) if current == status else None
        observation = {
            "since": status.since,
            "waits": waits,
            "waits_for_device": waits_for_device,
            "at": at[-120:],
            "seen": round(time.time(), 3),
            "held_s": held_s,
        }
        self._write(_LINE, json.dumps(observation))
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file)

    def remove(self) -> None:
        """Removes the file. A run that failed keeps its files for inspection."""
        if self._file is not None and self._path is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)

    def _write(self, offset: int, line: str) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, line.encode().ljust(_LINE - 1) + b"\n", offset)


def progress_path(folder: Path, rank: int) -> Path:
    """Returns the path of a rank's progress file."""
    return folder / f"rank_{rank:03d}.progress"


def read_statuses(folder: Path, num_ranks: int) -> list[RankStatus]:
    """Reads the status of every rank; ranks whose file is missing or cannot be parsed are omitted."""
    statuses = []
    for rank in range(num_ranks):
        with suppress(OSError, ValueError, TypeError, KeyError):
            first, second = progress_path(folder, rank).read_text().splitlines()
            status, observation = RankStatus(**json.loads(first)), json.loads(second)
            is_of_this_phase = observation.pop("since") == status.since
            statuses.append(replace(status, **(observation if is_of_this_phase else {"seen": observation["seen"]})))
    return statuses


def find_stragglers(statuses: Sequence[RankStatus]) -> list[RankStatus]:
    """Returns the ranks that the others wait for: those with the least progress among the ranks that do not wait.

    If every rank waits, those that wait for their device come before those inside a collective: the device of a rank
    that has reached a collective on the host has finished its part of the earlier ones.
    """
    candidates = [status for status in statuses if not status.waits]
    candidates = candidates or [status for status in statuses if status.waits_for_device] or list(statuses)
    least = min(status.order for status in candidates)
    return [status for status in candidates if status.order == least]


def list_sample_names(planner: Planner, mixture: Mixture, status: RankStatus) -> list[str]:
    """Returns the samples that a rank processes, as `source:id`; outside the phases of a row, those of the step."""
    if status.step < 0 or status.phase == "evaluate":
        return []
    plan = replace(planner, rank=status.rank).plan(status.step)
    positions = plan.rows[status.micro_step] if status.phase in ROW_PHASES else plan.samples
    texts = [mixture.text(int(number)) for number in planner.table.rows["sample"][positions]]
    return [f"{text.source}:{text.id}" for text in texts]
