"""Owns the proofs about starting a job again: a run that gets on may, one that gets nowhere may only a few times."""

from pathlib import Path

import pytest

from train import requeue
from train.config.schema import RunConfig


def asked(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the program for this run."""
    monkeypatch.setattr(requeue, "compose", lambda: config)
    return requeue.main()


def save(config: RunConfig, step: int) -> None:
    """A checkpoint's name, which is all that is looked at."""
    (config.run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)


def test_a_run_that_saves_new_steps_goes_on(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often: each start has added steps."""
    for step in range(1, 12):
        save(run_config, step)
        assert asked(run_config, monkeypatch) == 0


def test_starts_without_a_new_step_are_counted(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the third in a row it ends, with one sentence; a new step, or a unfinished checkpoint's absence of one,
    makes the difference. Submitted again, it may try as often again."""
    save(run_config, 5)
    assert [asked(run_config, monkeypatch) for _ in range(3)] == [0, 0, 0]
    save(run_config, 6)
    assert [asked(run_config, monkeypatch) for _ in range(3)] == [0, 0, 0]
    (run_config.run_dir / "checkpoints" / "step_000007.partial").mkdir()
    assert asked(run_config, monkeypatch) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for word in ("error: ", str(run_config.run_dir), "3 starts in a row", "step 6", "--time"):
        assert word in said
    assert asked(run_config, monkeypatch) == 0


def test_a_damaged_count_is_begun_anew(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kill while it was written costs the count, not the run."""
    save(run_config, 5)
    (run_config.run_dir / "requeues.json").write_text('{"st')
    assert asked(run_config, monkeypatch) == 0
