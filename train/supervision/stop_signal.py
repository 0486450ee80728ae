"""Whether the run was asked to stop: by a scheduler, by the person at the terminal."""

import signal
import time
from types import FrameType


class StopSignal:
    """Remembers that this process was asked to stop; a second request ends it at once.

    SIGTERM (a scheduler), SIGUSR1 (Slurm's warning) and Ctrl-C are one request: save at the next step and leave.
    Signals within `SAME_REQUEST_S` count as one: after Ctrl-C, torchrun sends its workers a SIGTERM too.
    """

    SAME_REQUEST_S = 3.0

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > self.SAME_REQUEST_S:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, now
