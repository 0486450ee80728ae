"""Tests that a run survives kills: wherever it is killed, the same command resumes, and the result equals that of an
uninterrupted run bit for bit.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_to_the_end
from tests.train import disasters
from tests.train.cases import aligning, with_stage
from tests.train.disasters import blows
from tests.train.moments import ACTS
from train.config.schema import RunConfig, SaveConfig

SEED = 20


@pytest.mark.full
def test_killed_twenty_times(run_config: RunConfig, tmp_path: Path) -> None:
    """Both stages on two ranks, with ten kills each, of one rank or all: at the start, in steps, and before every file
    operation of a save. Each is followed by the same command. The result has the tensors and losses of the
    uninterrupted run, every step once, and one checkpoint."""
    long = with_stage(replace(run_config, save=SaveConfig(every=1, keep=1)), epochs=12.0)  # 37 steps
    reading = replace(long, data=replace(long.data, workers=1))
    struck = []
    for number, config in enumerate((aligning(reading), long)):
        whole = replace(config, name="whole")
        assert run(whole, None, tmp_path) == [0, 0]
        measured = json.loads((tmp_path / "measured.json").read_text())
        assert set(ACTS) <= set(measured["acts"])
        lines = disasters.metrics(whole)
        step_s = sum(line["perf/step_s"] for line in lines) / len(lines)
        half = blows(SEED, step_s, measured["start_s"])[number::2]
        for blow in half:
            codes = run(config, blow, tmp_path)
            assert codes[blow.rank or 0] == -9, blow
            assert codes in ([-9, -9], [-9, 1], [1, -9]), blow
            assert (codes == [-9, -9]) is (blow.rank is None), blow
        struck += half
        assert run(config, None, tmp_path) == [0, 0]
        assert disasters.result_hash(config) == disasters.result_hash(whole)
        assert [line["train/loss"] for line in disasters.metrics(config)] == [line["train/loss"] for line in lines]
        assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == [f"step_{len(lines):06d}"]
    assert len(struck) == 20
    assert {blow.act for blow in struck} == {*ACTS, "start", "step"}


def run(config: RunConfig, blow: disasters.Blow | None, folder: Path) -> list[int]:
    """Runs the command; returns the exit codes of its two ranks."""
    ended = run_to_the_end(2, disasters.run_struck, config, blow, str(folder), folder=folder, timeout_s=300)
    return [each.exit_code for each in ended]
