"""Records requests to stop the run: from a scheduler or from the terminal."""

import signal
import time
from types import FrameType


def list_stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to stop: SIGTERM (a scheduler), SIGUSR1 (Slurm's warning) and SIGHUP (the
    terminal was closed).

    SIGHUP is omitted where this process has inherited it as ignored, as under nohup: the run shall go on.
    """
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    return numbers[:-1] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else numbers


class StopSignal:
    """Context manager that records stop signals; a second request raises KeyboardInterrupt.

    The signals of `list_stop_signals` and Ctrl-C all request a save and a stop after the current step. Signals within
    `SAME_REQUEST_S` seconds are one request: after Ctrl-C, torchrun sends its workers a SIGTERM too.
    """

    SAME_REQUEST_S = 3.0

    def __init__(self) -> None:
        self.is_requested = False
        self._requested_s = 0.0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (*list_stop_signals(), signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.is_requested and now_s - self._requested_s > self.SAME_REQUEST_S:
            raise KeyboardInterrupt
        if not self.is_requested:
            self.is_requested, self._requested_s = True, now_s
