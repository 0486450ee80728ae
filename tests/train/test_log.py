"""Owns the proofs about a run's numbers: every step once in metrics.jsonl, whatever was cut off or run again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.config import LogConfig, RunConfig
from train.log import RunLog

VALUES = {"train/loss": 1.23456789012, "lr/projector": 1e-3, "perf/tokens_per_s": 10.0, "perf/step_s": 0.5}


def logged(config: RunConfig, first: int, last: int, *, is_main: bool = True) -> None:
    """Steps `first` to `last` - 1 of a run."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    log = RunLog(config, is_main=is_main, first_step=first, num_steps=9)
    for step in range(first, last):
        log.step(step, {**VALUES, "run": float(first)})
    log.say("a sentence")
    log.close()


def lines(config: RunConfig) -> list[dict[str, float]]:
    """metrics.jsonl as values."""
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_run_again_replace_their_lines(run_config: RunConfig) -> None:
    """A run that resumes drops the lines from its first step on, and a line that a kill cut off."""
    logged(run_config, 0, 6)
    path = run_config.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "train/lo')
    logged(run_config, 4, 8)
    assert [(line["step"], line["run"]) for line in lines(run_config)] == [
        *((step, 0.0) for step in range(4)),
        *((step, 4.0) for step in range(4, 8)),
    ]


def test_fresh_start_leaves_no_old_line(run_config: RunConfig) -> None:
    """A run that starts afresh in an old folder has only its own steps."""
    logged(run_config, 0, 6)
    logged(run_config, 0, 2)
    assert [line["step"] for line in lines(run_config)] == [0, 1]


def test_only_rank_0_writes(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Other ranks write no file and say nothing."""
    logged(run_config, 0, 2, is_main=False)
    assert not (run_config.run_dir / "metrics.jsonl").exists()
    assert capsys.readouterr().err == ""


def test_every_thins_the_terminal_only(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """`log.every` says how often a line is printed; the file has every step."""
    logged(replace(run_config, log=LogConfig(every=3)), 0, 7)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.strip().startswith("step ")]
    assert len(lines(run_config)) == 7
    assert 1 <= len(printed) <= 3


def test_numbers_are_strict_json(run_config: RunConfig) -> None:
    """A value that is no number does not make a line that other programs cannot read."""
    run_config.run_dir.mkdir(parents=True)
    log = RunLog(run_config, is_main=True, first_step=0, num_steps=1)
    log.step(0, {**VALUES, "train/grad_norm": float("nan")})
    log.close()
    text = (run_config.run_dir / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.full
def test_wandb_needs_no_account(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, a run is written into the run's folder, without an account or a network; a resumed one as well."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replace(run_config, log=LogConfig(wandb="offline"))
    for first, last in ((0, 3), (3, 5)):
        logged(config, first, last)
    runs = list((run_config.run_dir / "wandb").glob("offline-run-*"))
    assert runs
    assert [path for run in runs for path in run.glob("*.wandb")]
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 4]
