"""A request to stop, and a second one."""

import signal

import pytest

from train.supervision.stop_signal import StopSignal


def test_second_request_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that come together are one request; a later one does not wait for the step. Afterwards the process has
    its own handlers again."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        requests = [stop.is_requested]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        requests.append(stop.is_requested)
        assert requests == [False, True]
        monkeypatch.setattr(StopSignal, "SAME_REQUEST_S", -1.0)  # the next one counts as late
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
