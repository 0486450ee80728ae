"""Reports the progress of a preparation: a progress bar on a terminal, otherwise a line every half minute."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Reports records, image bytes and rejected records on stderr. Use it as a context manager."""

    def __init__(self, name: str, num_records: int | None) -> None:
        """Start the measurement.

        Args:
            name: name of the store or group.
            num_records: expected number of records; None if unknown.
        """
        self._name = name
        self._total = num_records
        self._num_done = 0
        self._num_records = self._num_bytes = self._num_rejected = 0
        self._started = self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_records, desc=name, unit=" records", disable=not self._is_terminal, mininterval=0.5)

    def start(self, num_done: int) -> None:
        """Begin with `num_done` records that an interrupted run has completed."""
        self._num_done = num_done
        self._started = time.monotonic()
        if num_done:
            print(f"{self._name}: resuming after {num_done:,} records of the interrupted run", flush=True)
            self._bar.update(num_done)

    def update(self, num_bytes: int, is_rejected: bool) -> None:
        """Count one record.

        Args:
            num_bytes: size of its images.
            is_rejected: whether it was rejected.
        """
        self._num_records += 1
        self._num_bytes += num_bytes
        self._num_rejected += is_rejected
        if self._is_terminal:
            if self._num_records % 64 == 0:
                self._bar.set_postfix_str(f"{self._rate()}, {self._num_rejected:,} rejected", refresh=False)
            self._bar.update()
        elif self._num_records % 16 == 0 and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(self.format_line(), file=sys.stderr, flush=True)

    def format_line(self) -> str:
        """Format `talk: 120,000 of 779,278 records (15 %), 850 records/s, 43.1 MiB/s, 12 rejected, 13 min left`."""
        done = self._num_done + self._num_records
        per_s = self._num_records / self._seconds()
        text = f"{self._name}: {done:,}"
        if self._total:
            text += f" of {self._total:,} records ({100 * done // self._total} %)"
        else:
            text += " records"
        text += f", {per_s:,.0f} records/s, {self._rate()}, {self._num_rejected:,} rejected"
        if self._total and per_s:
            text += f", {max(0, self._total - done) / per_s / 60:.0f} min left"
        return text

    def _rate(self) -> str:
        return f"{format_bytes(int(self._num_bytes / self._seconds()))}/s"

    def _seconds(self) -> float:
        return max(1e-3, time.monotonic() - self._started)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes with a binary unit: `1.5 GiB`."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
