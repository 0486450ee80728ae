"""Owns the proofs about runs that are stopped from outside or by the clock: when they leave, with which code and word,
and that the same command goes on to the undisturbed run's result.
"""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ended, run_to_the_end
from tests.train import disasters
from train.config.schema import RunConfig, SaveConfig


@pytest.fixture(scope="module")
def whole(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 4 steps on two ranks that nobody has disturbed."""
    root = tmp_path_factory.mktemp("whole")
    config = replace(tiny_parts, root=str(root), name="whole", save=SaveConfig(every=10))
    config = replace(config, data=replace(config.data, workers=1))
    assert codes(run_to_the_end(2, disasters.run_as_it_is, config, folder=root, timeout_s=240)) == [0, 0]
    return config


def codes(ended: list[Ended]) -> list[int]:
    """The exit codes of all ranks."""
    return [each.exit_code for each in ended]


def assert_same(config: RunConfig, whole: RunConfig) -> None:
    """The same tensors, and each step once, with the same loss."""
    assert disasters.result_hash(config) == disasters.result_hash(whole)
    losses = [[line["train/loss"] for line in disasters.metrics(each)] for each in (config, whole)]
    assert losses[0] == losses[1]


@pytest.mark.full
def test_time_limit(whole: RunConfig, tmp_path: Path) -> None:
    """When its time is over a run finishes the step, saves and leaves with 75 and the reason, however short the time;
    the same command goes on, as often as it takes."""
    config = replace(whole, root=str(tmp_path), time_limit_min=0.0001)
    for done in (1, 2, 3):
        ended = run_to_the_end(2, disasters.run_as_it_is, config, folder=tmp_path, timeout_s=240)
        assert codes(ended) == [75, 75], ended
        reason = f"stopped after step {done} (time_limit_min=0.0001 is over); run the same command again to go on"
        assert disasters.told(config) == {"code": 75, "reason": reason, "step": done - 1}
        assert reason in ended[0].output
        assert [line["step"] for line in disasters.metrics(config)] == list(range(done))
    # Over in the last step, there is nothing to go on for.
    assert codes(run_to_the_end(2, disasters.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert_same(config, whole)


@pytest.mark.full
def test_clock_that_jumps(whole: RunConfig, tmp_path: Path) -> None:
    """Days forward and back in every step end no run: neither the watch nor the time limit looks at that clock."""
    config = replace(whole, root=str(tmp_path), time_limit_min=60.0, timeout_s=60)
    ended = run_to_the_end(2, disasters.run_with_jumping_clock, config, folder=tmp_path, timeout_s=240)
    assert codes(ended) == [0, 0], ended
    assert_same(config, whole)


@pytest.mark.full
def test_ctrl_c_twice(whole: RunConfig, tmp_path: Path) -> None:
    """The second one does not wait for the step: 130, and it says from where the same command goes on."""
    config = replace(whole, root=str(tmp_path), save=SaveConfig(every=1))
    [ended] = run_to_the_end(1, disasters.run_and_ask_twice, config, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 130, ended.output
    assert disasters.told(config)["code"] == 130
    assert disasters.told(config)["reason"].startswith(
        "stopped at once, without saving; the newest checkpoint is where"
    )
    assert "Traceback" not in ended.output
    assert codes(run_to_the_end(2, disasters.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert [line["step"] for line in disasters.metrics(config)] == [0, 1, 2, 3]


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "number", "ranks"),
    [
        ("read_backbone", signal.SIGTERM, [0, 1]),
        ("start_engine", signal.SIGUSR1, [0, 1]),
        ("start_engine", signal.SIGTERM, [1]),
        ("write_hf", signal.SIGTERM, [0, 1]),
    ],
)
def test_asked_to_stop_outside_of_the_steps(
    whole: RunConfig, tmp_path: Path, where: str, number: int, ranks: list[int]
) -> None:
    """A scheduler's signal in the start, or while the result is written: the run leaves at once with 75, and the same
    command goes on. A rank that only lost the others fails, and says nothing."""
    config = replace(whole, root=str(tmp_path))
    args = (replace(config, timeout_s=20), where, int(number), ranks)
    ended = run_to_the_end(2, disasters.run_and_ask_at_start, *args, folder=tmp_path, timeout_s=240)
    assert codes(ended) == [75 if rank in ranks else 1 for rank in (0, 1)], ended
    said = disasters.told(config)
    place = "step 3, writing the result" if where == "write_hf" else "starting"
    assert said["code"] == 75
    assert said["reason"].startswith(f"asked to stop ({place}), where there is nothing to save; run the same command")
    # One of them speaks; or both, if one came to life after the other had left.
    assert 1 <= sum(each.output.count("asked to stop") for each in ended) <= len(ranks)
    assert "Traceback" not in "".join(each.output for each in ended)
    assert codes(run_to_the_end(2, disasters.run_as_it_is, config, folder=tmp_path, timeout_s=240)) == [0, 0]
    assert_same(config, whole)
