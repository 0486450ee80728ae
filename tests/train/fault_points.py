"""Points at which a test interrupts a process: a phase of a step, a sample, a file operation of a save, a time.

Each function patches the process that calls it, which runs the program afterwards; `fault_runs.py` uses them.
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

FILE_OPERATIONS = (
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
"""File operations of a rank on its checkpoints while it saves, as `watch_file_operations` names them, about in this
order."""
ON_EVERY_RANK = ("half", "sync", "open sums_rank_.json")


def at_phase(phase: str, number: int, callback: Callable[[], None]) -> None:
    """Calls `callback` when this rank enters a phase for the time `number`, counted from 0."""
    from train.supervision.rank_progress import Progress

    enter, calls = Progress.enter, itertools.count()

    def watched(self: Progress, entered: str, step: int, micro_step: int = 0) -> None:
        enter(self, entered, step, micro_step)
        if entered == phase and next(calls) == number:
            callback()

    Progress.enter = watched  # type: ignore[assignment, method-assign]


def at_sample(number: int, callback: Callable[[], None]) -> None:
    """Calls `callback` in the loader's process, before it reads its sample of this number."""
    from data_recipes.mixture.mixture import Mixture

    sample, calls = Mixture.sample, itertools.count()

    def watched(self: Mixture, index: int) -> Any:
        if next(calls) == number:
            callback()
        return sample(self, index)

    Mixture.sample = watched  # type: ignore[method-assign]


def at_file_operation(folder: Path, operation: str, number: int, callback: Callable[[], None]) -> None:
    """Calls `callback` before the file operation of this name and number, see `watch_file_operations`."""
    counts: Counter[str] = Counter()

    def count(seen: str) -> None:
        counts[seen] += 1
        if (seen, counts[seen]) == (operation, number):
            callback()

    watch_file_operations(folder, count)


def watch_file_operations(folder: Path, report: Callable[[str], None]) -> None:
    """Calls `report` before every operation (of `FILE_OPERATIONS`) of this process on files below `folder`.

    `half`: a file of DeepSpeed's is half written. Digits in names are left out.
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
            report("open " + "".join(letter for letter in Path(args[0]).name if not letter.isdigit()))
        elif event == "os.rename" and is_inside(args[0]):
            report("rename")
        elif event in ("os.remove", "os.rmdir", "os.mkdir") and is_inside(args[0], args[-1]):
            report(event.removeprefix("os."))

    def watched_sync(descriptor: int) -> None:
        if is_inside(None, descriptor):
            report("sync")
        sync(descriptor)

    def watched_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        path = getattr(path, "name", path)  # of a file that is written in the background
        if is_inside(path):
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            report("half")
            with Path(path).open("r+b") as file:
                file.write(whole)

    sys.addaudithook(hook)
    os.fsync = watched_sync  # type: ignore[assignment]
    torch.save = watched_save  # type: ignore[assignment]


def run_later(seconds: float, callback: Callable[[], object]) -> None:
    """Calls `callback` in a thread after `seconds`."""
    timer = threading.Timer(seconds, callback)
    timer.daemon = True
    timer.start()
