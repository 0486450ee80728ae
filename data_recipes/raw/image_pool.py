"""Loads the images of samples in worker processes, in order.

This module imports neither `datasets` nor numpy, so that the worker processes stay small.
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
from typing import Any, TypeVar

from data_recipes.raw.image_files import ImageError, LoadedImage, load_image
from data_recipes.schema.sample import ImageReference, Reason, Reject, Sample

_CHUNK_SAMPLES = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ImagePool:
    """A pool of processes that load the images of samples. Use it as a context manager.

    With one worker, images are loaded in the calling process. At most a few chunks per worker are pending at any time,
    so memory does not grow with the number of samples. Create the pool before starting threads: workers are forked,
    because spawned workers would have to import the calling program.

    Args:
        num_workers: number of processes.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._executor: ProcessPoolExecutor | None = None
        if num_workers > 1:
            context = multiprocessing.get_context("fork")
            self._others = set(multiprocessing.active_children())
            self._is_cancelled = context.RawValue("b", 0)
            self._executor = ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(), self._is_cancelled))

    def __enter__(self) -> "ImagePool":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if error_type is KeyboardInterrupt:  # only the long-running functions of `map_items` react to the signal
            self._is_cancelled.value = 1
            for worker in set(multiprocessing.active_children()) - self._others:
                if worker.pid is not None:
                    os.kill(worker.pid, signal.SIGINT)
        # Chunks are small, so running ones are awaited. If workers were killed, the executor could block on its pipes.
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map_items(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Apply a function to each item in the worker processes and return the results in order.

        Args:
            function: a function that can be pickled. Ctrl-C interrupts it.
            items: its arguments.
        """
        if self._executor is None:
            return [function(item) for item in items]
        return list(self._executor.map(partial(_run_interruptible, function), items))

    def load_in_order(self, items: Iterable[Sample | Reject]) -> Iterator[tuple[Sample, list[LoadedImage]] | Reject]:
        """Yield each sample with its loaded images, or a `Reject` if one is invalid. Rejects are passed through."""
        source = iter(items)
        pending: deque[tuple[list[Sample | Reject], Future[list[_Outcome]] | list[_Outcome]]] = deque()
        max_pending = 2 * self._num_workers if self._executor else 0
        while chunk := list(itertools.islice(source, _CHUNK_SAMPLES)):
            image_lists = [item.images for item in chunk if isinstance(item, Sample)]
            outcome = self._executor.submit(_load_chunk, image_lists) if self._executor else _load_chunk(image_lists)
            pending.append((chunk, outcome))
            while len(pending) > max_pending:
                yield from _join_chunk(*pending.popleft())
        while pending:
            yield from _join_chunk(*pending.popleft())


# The images of one sample, or the reason and detail of the first error. ImageError itself cannot be unpickled, because
# its constructor has two arguments.
_Outcome = list[LoadedImage] | tuple[Reason, str]


def _join_chunk(
    chunk: list[Sample | Reject], outcome: "Future[list[_Outcome]] | list[_Outcome]"
) -> Iterator[tuple[Sample, list[LoadedImage]] | Reject]:
    outcomes = iter(outcome.result() if isinstance(outcome, Future) else outcome)
    for item in chunk:
        if isinstance(item, Reject):
            yield item
            continue
        loaded = next(outcomes)
        yield (Reject(item.id, loaded[0], loaded[1], item.location) if isinstance(loaded, tuple) else (item, loaded))


def _load_chunk(image_lists: list[tuple[ImageReference, ...]]) -> list[_Outcome]:
    outcomes: list[_Outcome] = []
    for images in image_lists:
        try:
            outcomes.append([load_image(image) for image in images])
        except ImageError as error:
            outcomes.append((error.reason, error.detail))
    return outcomes


_is_cancelled: Any = None


def _start_worker(parent: int, is_cancelled: Any) -> None:
    global _is_cancelled
    _is_cancelled = is_cancelled
    exit_with_parent(parent)


def _run_interruptible(function: Callable[[_Item], _Result], item: _Item) -> _Result:
    """Call `function(item)` in a worker with Ctrl-C enabled, unless the pool has been cancelled."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _is_cancelled.value:  # set before SIGINT is sent, so checking it here misses no signal
            raise KeyboardInterrupt
        return function(item)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def exit_with_parent(parent: int) -> None:
    """Initialize a worker process: it ignores Ctrl-C, which the parent handles, and exits if the parent is killed.

    Args:
        parent: process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
