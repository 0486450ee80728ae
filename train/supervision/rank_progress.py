"""Where every rank stands, so that any of them can say who has not arrived.

Each rank keeps `log/rank_NNN.progress`, two lines rewritten in place: step, micro-step and phase at every change, and
what its watch last found (whether it waits for other ranks). No message is needed to read it, only the run's folder.
When to look, and what to do then, is `watchdog.py`'s.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data_recipes.mixture.mixture import Mixture
from train.data.loader import Planner

PHASES = {
    "start": "starting",
    "data": "waiting for its data",
    "forward": "forward",
    "backward": "backward",
    "agree": "adding up losses",
    "update": "the optimizer's step",
    "evaluate": "the held-out loss and answers",
    "save": "saving",
    "end": "writing the result",
}
"""What a rank does, in the order of a step, and how it is said."""
OF_A_ROW = ("data", "forward", "backward")
"""The phases in which a rank is busy with one row; in the others it is with the whole step."""
_LINE = 320  # bytes of each of the two lines, which are padded so that they can be rewritten in place


@dataclass(frozen=True)
class RankStatus:
    """Where a rank stands. Times are seconds since the epoch; `step` counts from 0 and is -1 before the first.

    `waits`, `at`, `seen` and `held_s` are what its watch last found: whether the rank is inside a collective, where in
    the code its main thread is, when that was, and how long it had stood there by a clock that does not jump.
    """

    rank: int
    host: str
    step: int
    micro_step: int
    phase: str
    since: float
    waits: bool = False
    at: str = ""
    seen: float = 0.0
    held_s: float | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Grows as the rank goes on."""
        micro_step = self.micro_step if self.phase in OF_A_ROW else 2**31
        return self.step, micro_step, list(PHASES).index(self.phase)

    @property
    def age_s(self) -> float:
        """For how long it has stood there, as far as can be known: a clock that jumped since it was seen shows."""
        now = time.time()
        return max(0.0, now - self.since if self.held_s is None else self.held_s + now - self.seen)

    @property
    def description(self) -> str:
        """Step, micro-step and phase as a person reads them."""
        if self.step < 0:
            return PHASES[self.phase]
        micro_step = f", micro-step {self.micro_step}" if self.phase in OF_A_ROW else ""
        return f"step {self.step}{micro_step}, {PHASES[self.phase]}"


class Progress:
    """This rank's progress file.

    Args:
        folder: where the files of all ranks lie; None keeps the place in memory only.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._rank, self._host = rank, socket.gethostname()
        self._path = progress_path(folder, rank) if folder else None
        self._file: int | None = None
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)  # an earlier run's
            self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o644)
        self.enter("start", -1)
        self.note(self.now[0], waits=False, at="")

    @property
    def now(self) -> tuple[RankStatus, float]:
        """Where this rank stands, and since when on the monotonic clock."""
        return self._now

    def enter(self, phase: str, step: int, micro_step: int = 0) -> None:
        """This rank begins a phase. One small write into the page cache; it never raises, as it may not end a run."""
        # Not rounded: by its time a note is told to be of this phase, and two phases can lie within a millisecond.
        place = RankStatus(self._rank, self._host, step, micro_step, phase, time.time())
        self._now = (place, time.monotonic())
        self._write(
            0,
            f'{{"rank": {self._rank}, "host": "{self._host}", "step": {step}, "micro_step": {micro_step}, '
            f'"phase": "{phase}", "since": {place.since}}}',
        )

    def note(self, place: RankStatus, *, waits: bool, at: str) -> None:
        """What the watch found while the rank stood there; brought to the disk, for readers on other hosts."""
        now, entered_s = self._now
        held_s = round(time.monotonic() - entered_s, 3) if now == place else None
        found = {"since": place.since, "waits": waits, "at": at[-120:], "seen": round(time.time(), 3), "held_s": held_s}
        self._write(_LINE, json.dumps(found))
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file)

    def remove(self) -> None:
        """After a run that did not fail; the files of one that did stay, for whoever looks."""
        if self._file is not None and self._path is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)

    def _write(self, offset: int, line: str) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, line.encode().ljust(_LINE - 1) + b"\n", offset)


def progress_path(folder: Path, rank: int) -> Path:
    """The progress file of a rank."""
    return folder / f"rank_{rank:03d}.progress"


def read_statuses(folder: Path, num_ranks: int) -> list[RankStatus]:
    """Where the ranks stand; those whose file is not there, or cannot be read just now, are left out."""
    places = []
    for rank in range(num_ranks):
        with suppress(OSError, ValueError, TypeError, KeyError):
            first, second = progress_path(folder, rank).read_text().splitlines()
            place, found = RankStatus(**json.loads(first)), json.loads(second)
            is_of_this_phase = found.pop("since") == place.since
            places.append(replace(place, **(found if is_of_this_phase else {"seen": found["seen"]})))
    return places


def stragglers(places: Sequence[RankStatus]) -> list[RankStatus]:
    """Those that the others wait for: the least far of the ranks that are not inside a collective.

    If all are inside one, the least far of all.
    """
    candidates = [place for place in places if not place.waits] or list(places)
    first = min(place.order for place in candidates)
    return [place for place in candidates if place.order == first]


def sample_names(planner: Planner, mixture: Mixture, place: RankStatus) -> list[str]:
    """The samples that a rank has in hand where it stands, as `source:id`; the whole step's where ranks meet."""
    if place.step < 0 or place.phase == "evaluate":
        return []
    plan = replace(planner, rank=place.rank).plan(place.step)
    positions = plan.rows[place.micro_step] if place.phase in OF_A_ROW else plan.samples
    texts = [mixture.text(int(number)) for number in planner.table.rows["sample"][positions]]
    return [f"{text.source}:{text.id}" for text in texts]
