"""A request to stop, and a second one; a hangup that is ignored."""

import signal

import pytest

from train.supervision.stop_signal import StopSignal, list_stop_signals


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


@pytest.mark.parametrize(("inherited", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_hangup_is_a_request_unless_it_is_ignored(inherited: signal.Handlers, stops: bool) -> None:
    """SIGHUP asks a run to stop, as SIGTERM does; under nohup it is still ignored."""
    before = signal.signal(signal.SIGHUP, inherited)
    try:
        assert (signal.SIGHUP in list_stop_signals()) == stops
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.is_requested == stops
        assert signal.getsignal(signal.SIGHUP) == inherited
    finally:
        signal.signal(signal.SIGHUP, before)
