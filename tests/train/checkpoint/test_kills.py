"""Tests that a run survives kills: wherever a rank or the launcher is killed, the same command resumes, and the result
equals that of an uninterrupted run bit for bit.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_to_the_end
from tests.train import cases, fault_runs, save_cases
from tests.train.cases import aligning, with_stage
from tests.train.fault_points import FILE_OPERATIONS
from tests.train.fault_runs import Kill, draw_kills
from train.checkpoint import atomic_folder
from train.config.schema import RunConfig, SaveConfig

SEED = 75


@pytest.mark.full
def test_result_after_twenty_kills(run_config: RunConfig, tmp_path: Path) -> None:
    """Both stages on two ranks, with ten kills each, of one rank, all ranks or torchrun: at the start, in steps, and
    before every file operation of a save. Each is followed by the same command. The result has the tensors and losses
    of the uninterrupted run, every step once, and one checkpoint."""
    # 123 steps: until they see that their launcher was killed, ranks go on for up to thirty on a fast machine.
    long = with_stage(replace(run_config, save=SaveConfig(every=1, keep=1)), epochs=40.0)
    reading = replace(long, data=replace(long.data, workers=1))
    done: list[Kill] = []
    for number, config in enumerate((aligning(reading), long)):
        whole = replace(config, name="whole")
        assert run(whole, None, tmp_path) == [0, 0]
        measured = json.loads((tmp_path / "measured.json").read_text())
        assert set(FILE_OPERATIONS) <= set(measured["operations"])
        lines = fault_runs.metrics(whole)
        step_s = sum(line["perf/step_s"] for line in lines) / len(lines)
        kills = draw_kills(SEED, step_s, measured["start_s"])[number::2]
        for kill in kills:
            if kill.target == "launcher":
                assert fault_runs.run_with_killed_launcher(config, kill, tmp_path, timeout_s=300) == -9, kill
                continue
            codes = run(config, kill, tmp_path)
            assert codes[kill.rank] == -9, kill
            assert codes in ([-9, -9], [-9, 1], [1, -9]), kill
            assert (codes == [-9, -9]) is (kill.target == "all"), kill
        done += kills
        assert run(config, None, tmp_path) == [0, 0]
        assert fault_runs.result_hash(config) == fault_runs.result_hash(whole)
        assert [line["train/loss"] for line in fault_runs.metrics(config)] == [line["train/loss"] for line in lines]
        assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == [f"step_{len(lines):06d}"]
    assert len(done) == 20
    assert {kill.when for kill in done} == {*FILE_OPERATIONS, "start", "step"}
    assert {kill.target for kill in done} == {0, 1, "all", "launcher"}


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_result_after_kills_during_background_saves(run_config: RunConfig, tmp_path: Path, stage: int) -> None:
    """Two ranks at ZeRO 2 and 3, with ten kills each, of one rank or both: the thread is at a random place of a file of
    a checkpoint, and the main thread in a later step. The partial checkpoint is never used, and the result has the
    tensors and losses of the uninterrupted run."""
    config = with_stage(replace(run_config, save=SaveConfig(every=3, keep=1), engine=cases.zero(stage)), epochs=10.0)
    whole = replace(config, name="whole")
    case = save_cases.run_with_kill_in_a_write
    ended = run_to_the_end(2, case, whole, None, str(tmp_path), folder=tmp_path, timeout_s=300)
    assert [each.exit_code for each in ended] == [0, 0], ended
    checkpoints = config.run_dir / "checkpoints"
    for kill in save_cases.draw_write_kills(SEED + stage, 10):
        (tmp_path / "killed").unlink(missing_ok=True)
        ended = run_to_the_end(2, case, config, kill, str(tmp_path), folder=tmp_path, timeout_s=300)
        codes = [each.exit_code for each in ended]
        assert codes[kill.rank] == -9, (kill, ended)
        assert (codes == [-9, -9]) is (kill.target == "all"), (kill, ended)
        killed = json.loads((tmp_path / "killed").read_text())
        [partial] = checkpoints.glob("*.partial")
        assert killed["step"] >= int(partial.name.removeprefix("step_").removesuffix(".partial")), kill
        assert not atomic_folder.is_complete(partial)
        if killed["written"]:
            assert killed["written"] == partial.name
    ended = run_to_the_end(2, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=300)
    assert [each.exit_code for each in ended] == [0, 0], ended
    assert fault_runs.result_hash(config) == fault_runs.result_hash(whole)
    lines, expected = fault_runs.metrics(config), fault_runs.metrics(whole)
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in expected]
    assert [path.name for path in checkpoints.iterdir()] == [f"step_{len(lines):06d}"]


def run(config: RunConfig, kill: Kill | None, folder: Path) -> list[int]:
    """Runs the command; returns the exit codes of its two ranks."""
    ended = run_to_the_end(2, fault_runs.run_with_kill, config, kill, str(folder), folder=folder, timeout_s=300)
    return [each.exit_code for each in ended]
