"""Reports the progress of a fetch: a progress bar on a terminal, otherwise a line every half minute."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from data_recipes.writing.progress import format_bytes

_SECONDS_BETWEEN_LINES = 30.0


class Stopped(BaseException):
    """Raised inside a transfer when the program ends; no `Exception`, so that no library retries the transfer."""


class ByteProgress:
    """Counts received bytes; threads may share it. Use it as a context manager.

    After `stop`, the next `add` of every thread raises `Stopped`, which ends its transfer.
    """

    def __init__(self, name: str, total: int | None) -> None:
        """Start the measurement.

        Args:
            name: what is fetched.
            total: bytes to receive; None if a size is not known.
        """
        self._name = name
        self._total = total
        self._num_bytes = 0
        self._started = self._last = time.monotonic()
        self._mutex = threading.Lock()
        self._stopped = threading.Event()
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not self._is_terminal
        )

    def add(self, num_bytes: int) -> None:
        """Count received bytes; a negative number if some are received again."""
        if self._stopped.is_set():
            raise Stopped
        with self._mutex:
            self._num_bytes += num_bytes
            if self._is_terminal:
                self._bar.update(num_bytes)
            elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                print(self.format_line(), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the transfers of all threads."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Wait before a transfer is tried again; raises `Stopped` at once after `stop`."""
        if self._stopped.wait(seconds):
            raise Stopped

    def format_line(self) -> str:
        """Format `vicuna_7b: 1.2 GiB of 12.6 GiB (9 %), 85.0 MiB/s, 2 min left`."""
        rate = self._num_bytes / max(1e-3, time.monotonic() - self._started)
        text = f"{self._name}: {format_bytes(max(0, self._num_bytes))}"
        if self._total:
            text += f" of {format_bytes(self._total)} ({100 * self._num_bytes // self._total} %)"
        text += f", {format_bytes(int(max(0.0, rate)))}/s"
        if self._total and rate > 0:
            text += f", {max(0, self._total - self._num_bytes) / rate / 60:.0f} min left"
        return text

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
