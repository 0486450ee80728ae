"""Tests of runs that are stopped by a signal or by the time limit: when they end, exit code and reason, and that the
same command gives the result of an uninterrupted run.
"""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ended, run_to_the_end
from tests.train import fault_runs
from train.config.schema import RunConfig, SaveConfig


@pytest.fixture(scope="module")
def whole(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run of 4 steps on two ranks."""
    root = tmp_path_factory.mktemp("whole")
    config = replace(tiny_parts, root=str(root), name="whole", save=SaveConfig(every=10))
    config = replace(config, data=replace(config.data, workers=1))
    assert codes(run_to_the_end(2, fault_runs.run_as_it_is, config, folder=root, timeout_s=240)) == [0, 0]
    return config


def codes(ended: list[Ended]) -> list[int]:
    """Returns the exit codes of all ranks."""
    return [each.exit_code for each in ended]


def assert_same(config: RunConfig, whole: RunConfig) -> None:
    """The same tensors, and each step once with the same loss."""
    assert fault_runs.result_hash(config) == fault_runs.result_hash(whole)
    losses = [[line["train/loss"] for line in fault_runs.metrics(each)] for each in (config, whole)]
    assert losses[0] == losses[1]


@pytest.mark.full
def test_time_limit(whole: RunConfig, tmp_path: Path) -> None:
    """After its time limit a run finishes the step, saves, and ends with exit code 75 and the reason, however short the
    limit; the same command resumes as often as needed."""
    config = replace(whole, root=str(tmp_path), time_limit_min=0.0001)
    for done in (1, 2, 3):
        ended = run_to_the_end(2, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=240)
        assert codes(ended) == [75, 75], ended
        reason = f"stopped after step {done} (time_limit_min=0.0001 has passed); run the same command again to resume"
        assert fault_runs.read_exit_report(config) == {"code": 75, "reason": reason, "step": done - 1}
        assert reason in ended[0].output
        assert [line["step"] for line in fault_runs.metrics(config)] == list(range(done))
    # Over in the last step, there is nothing to go on for.
    assert codes(run_to_the_end(2, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert_same(config, whole)


@pytest.mark.full
def test_clock_that_jumps(whole: RunConfig, tmp_path: Path) -> None:
    """A system clock that jumps by days in every step ends no run: neither the watchdog nor the time limit uses it."""
    config = replace(whole, root=str(tmp_path), time_limit_min=60.0, timeout_s=60)
    ended = run_to_the_end(2, fault_runs.run_with_jumping_clock, config, folder=tmp_path, timeout_s=240)
    assert codes(ended) == [0, 0], ended
    assert_same(config, whole)


@pytest.mark.full
def test_ctrl_c_twice(whole: RunConfig, tmp_path: Path) -> None:
    """The second Ctrl-C does not wait for the step: exit code 130, and the reason says where the same command
    resumes."""
    config = replace(whole, root=str(tmp_path), save=SaveConfig(every=1))
    [ended] = run_to_the_end(1, fault_runs.run_and_ask_twice, config, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 130, ended.output
    assert fault_runs.read_exit_report(config)["code"] == 130
    assert fault_runs.read_exit_report(config)["reason"].startswith(
        "stopped immediately, without saving; the same command resumes from"
    )
    assert "Traceback" not in ended.output
    assert codes(run_to_the_end(2, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert [line["step"] for line in fault_runs.metrics(config)] == [0, 1, 2, 3]


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "number", "ranks"),
    [
        ("read_backbone", signal.SIGTERM, [0, 1]),
        ("start_engine", signal.SIGUSR1, [0, 1]),
        ("start_engine", signal.SIGHUP, [0, 1]),
        ("start_engine", signal.SIGTERM, [1]),
        ("write_hf", signal.SIGTERM, [0, 1]),
    ],
)
def test_asked_to_stop_outside_of_the_steps(
    whole: RunConfig, tmp_path: Path, where: str, number: int, ranks: list[int]
) -> None:
    """A signal during the start or while the result is written ends the run at once with exit code 75, and the same
    command resumes. A rank that only lost the others fails without a message."""
    config = replace(whole, root=str(tmp_path))
    args = (replace(config, timeout_s=20), where, int(number), ranks)
    ended = run_to_the_end(2, fault_runs.run_and_ask_at_start, *args, folder=tmp_path, timeout_s=240)
    assert codes(ended) == [75 if rank in ranks else 1 for rank in (0, 1)], ended
    printed = fault_runs.read_exit_report(config)
    place = "step 3, writing the result" if where == "write_hf" else "starting"
    assert printed["code"] == 75
    assert printed["reason"].startswith(f"stopped by a signal ({place}) with nothing to save; run the same command")
    # One of them speaks; or both, if one came to life after the other had left.
    assert 1 <= sum(each.output.count("stopped by a signal") for each in ended) <= len(ranks)
    assert "Traceback" not in "".join(each.output for each in ended)
    assert codes(run_to_the_end(2, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert_same(config, whole)
