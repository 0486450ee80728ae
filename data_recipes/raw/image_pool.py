"""The pictures of samples, loaded in processes and handed back in order.

Owns: the pool, how much of a stream is under way, what becomes of the processes on Ctrl-C and when the program dies.
Leaves: what a good picture is to `image_files.py`.
This module imports neither `datasets` nor numpy, so that the processes it starts stay small.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_recipes.raw.image_files import LoadedPicture, PictureError, load
from data_recipes.schema.sample import Reason, Reject, Sample

_CHUNK_SAMPLES = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class PicturePool:
    """Loads the pictures of samples in `num_workers` processes and hands them back in the order they came.

    With one worker everything happens in this process. At most a few chunks per worker are under way at any
    time, so memory does not grow with the number of samples. Open it before other threads are started:
    workers are forked, because a spawned one would import the whole calling program first.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._executor: ProcessPoolExecutor | None = None
        if num_workers > 1:
            context = multiprocessing.get_context("fork")
            self._others = set(multiprocessing.active_children())
            self._is_over = context.RawValue("b", 0)
            self._executor = ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(), self._is_over))

    def __enter__(self) -> "PicturePool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if kind is KeyboardInterrupt:  # heeded where a worker may be busy for long: in `run_all`
            self._is_over.value = 1
            for worker in set(multiprocessing.active_children()) - self._others:
                if worker.pid is not None:
                    os.kill(worker.pid, signal.SIGINT)
        # What waits is not begun, what is begun ends by itself: a chunk is small, and a pool whose workers are killed
        # may wait for ever for its own pipes.
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run_all(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`function` of each item, in order, in the same processes; it must be importable by name.

        It may take long: Ctrl-C ends it.
        """
        if self._executor is None:
            return [function(item) for item in items]
        return list(self._executor.map(partial(_heeding_ctrl_c, function), items))

    def load_in_order(self, items: Iterable[Sample | Reject]) -> Iterator[tuple[Sample, list[LoadedPicture]] | Reject]:
        """Each sample with its loaded pictures, or a `Reject` if one cannot be used. Rejects pass."""
        source = iter(items)
        under_way: deque[tuple[list[Sample | Reject], Future[list[_Outcome]] | list[_Outcome]]] = deque()
        most_under_way = 2 * self._num_workers if self._executor else 0
        while chunk := list(itertools.islice(source, _CHUNK_SAMPLES)):
            wanted = [item.pictures for item in chunk if isinstance(item, Sample)]
            outcome = self._executor.submit(_load_chunk, wanted) if self._executor else _load_chunk(wanted)
            under_way.append((chunk, outcome))
            while len(under_way) > most_under_way:
                yield from _join(*under_way.popleft())
        while under_way:
            yield from _join(*under_way.popleft())


# The pictures of one sample, or why they cannot be used. Exceptions with two arguments do not survive
# pickling.
_Outcome = list[LoadedPicture] | tuple[Reason, str]


def _join(
    chunk: list[Sample | Reject], outcome: "Future[list[_Outcome]] | list[_Outcome]"
) -> Iterator[tuple[Sample, list[LoadedPicture]] | Reject]:
    outcomes = iter(outcome.result() if isinstance(outcome, Future) else outcome)
    for item in chunk:
        if isinstance(item, Reject):
            yield item
            continue
        loaded = next(outcomes)
        yield (Reject(item.id, loaded[0], loaded[1], item.place) if isinstance(loaded, tuple) else (item, loaded))


def _load_chunk(wanted: list[tuple[Path | bytes, ...]]) -> list[_Outcome]:
    outcomes: list[_Outcome] = []
    for pictures in wanted:
        try:
            outcomes.append([load(picture) for picture in pictures])
        except PictureError as error:
            outcomes.append((error.reason, error.detail))
    return outcomes


_is_over: Any = None


def _start_worker(parent: int, is_over: Any) -> None:
    global _is_over
    _is_over = is_over
    follow_parent(parent)


def _heeding_ctrl_c(function: Callable[[_Item], _Result], item: _Item) -> _Result:
    """`function(item)` in a worker, which else ignores Ctrl-C; after it nothing more is begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _is_over.value:  # looked at where the signal would be heeded: it comes after this was set
            raise KeyboardInterrupt
        return function(item)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def follow_parent(parent: int) -> None:
    """First call of a pool's worker: Ctrl-C is the parent's to handle, and a killed parent takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
