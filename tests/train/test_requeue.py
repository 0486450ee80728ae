"""Tests of `python -m train.requeue`: a run with progress may be requeued, one without only a few times."""

from pathlib import Path

import pytest

from train import requeue
from train.config.schema import RunConfig


def asked(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the exit code of the program for this run."""
    monkeypatch.setattr(requeue, "compose", lambda: config)
    return requeue.main()


def save(config: RunConfig, step: int) -> None:
    """Creates a checkpoint's folder, whose name is all that is read."""
    (config.run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)


def test_run_with_new_steps_is_requeued(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saves new steps may be requeued any number of times."""
    for step in range(1, 12):
        save(run_config, step)
        assert asked(run_config, monkeypatch) == 0


def test_starts_without_a_new_step_are_counted(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After three starts in a row without a new step the run is not requeued, with one sentence; a new step resets the
    count, an unfinished checkpoint does not. Submitted again, the count starts anew."""
    save(run_config, 5)
    assert [asked(run_config, monkeypatch) for _ in range(3)] == [0, 0, 0]
    save(run_config, 6)
    assert [asked(run_config, monkeypatch) for _ in range(3)] == [0, 0, 0]
    (run_config.run_dir / "checkpoints" / "step_000007.partial").mkdir()
    assert asked(run_config, monkeypatch) == 1
    output = capsys.readouterr().err.splitlines()[-1]
    for word in ("error: ", str(run_config.run_dir), "3 starts in a row", "step 6", "--time"):
        assert word in output
    assert asked(run_config, monkeypatch) == 0


def test_a_damaged_count_is_begun_anew(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A count file that a kill has damaged is replaced."""
    save(run_config, 5)
    (run_config.run_dir / "requeues.json").write_text('{"st')
    assert asked(run_config, monkeypatch) == 0
