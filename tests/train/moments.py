"""Moments at which a test interrupts a process: a phase of a step, a sample, a file operation of a save, a time.

Each function patches the process that calls it, which runs the program afterwards; `disasters.py` uses them.
"""

import itertools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ACTS = (
    *(
        "mkdir",
        "half",
        "open config.yaml",
        "open run_state.json",
        "open sums_rank_.json",
        "sync",
        "open sums.json.partial",
    ),
    *("rename", "remove", "rmdir"),
)
"""What a rank does to its checkpoints while it saves, as `watch_acts` says it, about in this order."""
OF_EVERY_RANK = ("half", "sync", "open sums_rank_.json")


def at_phase(phase: str, number: int, strike: Callable[[], None]) -> None:
    """Calls `strike` when this rank enters a phase that it has entered `number` times before."""
    from train.supervision.rank_progress import Progress

    enter, calls = Progress.enter, itertools.count()

    def watched(self: Progress, entered: str, step: int, micro_step: int = 0) -> None:
        enter(self, entered, step, micro_step)
        if entered == phase and next(calls) == number:
            strike()

    Progress.enter = watched  # type: ignore[assignment, method-assign]


def at_sample(number: int, strike: Callable[[], None]) -> None:
    """Calls `strike` in the loader's process, before it reads its sample of this number."""
    from data_recipes.mixture.mixture import Mixture

    sample, calls = Mixture.sample, itertools.count()

    def watched(self: Mixture, index: int) -> Any:
        if next(calls) == number:
            strike()
        return sample(self, index)

    Mixture.sample = watched  # type: ignore[method-assign]


def at_act(folder: Path, act: str, number: int, strike: Callable[[], None]) -> None:
    """Calls `strike` before the file operation of this name and number, see `watch_acts`."""
    counts: Counter[str] = Counter()

    def see(seen: str) -> None:
        counts[seen] += 1
        if (seen, counts[seen]) == (act, number):
            strike()

    watch_acts(folder, see)


def watch_acts(folder: Path, see: Callable[[str], None]) -> None:
    """Calls `see` with every act (of `ACTS`) of this process on what lies below `folder`, before it is done.

    `half`: a file of DeepSpeed's is half written. Numbers in names are left out.
    """
    import torch

    inside, sync, save = str(folder), os.fsync, torch.save

    def is_inside(path: object, descriptor: object = -1) -> bool:
        if isinstance(descriptor, int) and descriptor >= 0:
            with suppress(OSError):
                return str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(inside)
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(inside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[1], str) and "w" in args[1] and is_inside(args[0]):
            see("open " + "".join(letter for letter in Path(args[0]).name if not letter.isdigit()))
        elif event == "os.rename" and is_inside(args[0]):
            see("rename")
        elif event in ("os.remove", "os.rmdir", "os.mkdir") and is_inside(args[0], args[-1]):
            see(event.removeprefix("os."))

    def watched_sync(descriptor: int) -> None:
        if is_inside(None, descriptor):
            see("sync")
        sync(descriptor)

    def watched_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if is_inside(path):
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            see("half")
            Path(path).write_bytes(whole)

    sys.addaudithook(hook)
    os.fsync = watched_sync  # type: ignore[assignment]
    torch.save = watched_save  # type: ignore[assignment]


def later(seconds: float, strike: Callable[[], object]) -> None:
    """Calls `strike` in a thread after these seconds."""
    timer = threading.Timer(seconds, strike)
    timer.daemon = True
    timer.start()
