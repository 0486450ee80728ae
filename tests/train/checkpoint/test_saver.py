"""Tests of checkpoints on disk: complete or absent, kept as configured, and damage is detected."""

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.permissions import public_folder, unprivileged
from tests.train import cases
from tests.train.conftest import StartRanks
from train.checkpoint import atomic_folder
from train.checkpoint import saver as checkpoint
from train.checkpoint.saver import RunState, SaveError, Saver
from train.config.schema import ConfigError, RunConfig, SaveConfig
from train.distributed.world import World

ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
ENGINE_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class FakeEngine:
    """Writes two files as DeepSpeed would, and fails on request."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        (Path(folder) / tag / ENGINE_FILES[0]).write_text("half")
        if self.fails:
            raise OSError("No space left on device")
        (Path(folder) / tag / ENGINE_FILES[1]).write_text("whole")


def state(step: int) -> RunState:
    """Returns a state of which only the step matters."""
    return RunState(step, "f" * 64, {"num_ranks": 1, "zero_stage": 2}, "float32", [], step, {}, {"torch": "2"})


def saved(folder: Path, step: int, save: SaveConfig | None = None, *, fails: bool = False) -> Path:
    """Writes a checkpoint after `step` steps with a fake engine."""
    engine: Any = FakeEngine(fails)
    saver = Saver(folder, ALONE, save or SaveConfig(keep=9))
    saver.write(engine, state(step), "name: x\n")
    saver.wait()
    return folder / checkpoint.checkpoint_name(step)


def test_newest_are_kept(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Only the newest `keep` checkpoints and those of every `keep_every`-th step are kept, and no other files."""
    ranks = start_ranks(2)
    assert ranks.run(cases.save_often, run_config, SaveConfig(keep=2))[0] == [
        ["step_000001"],
        ["step_000001", "step_000002"],
        ["step_000002", "step_000003"],
        ["step_000003", "step_000004"],
    ]
    other = replace(run_config, name="every")
    assert ranks.run(cases.save_often, other, SaveConfig(keep=1, keep_every=2))[0][-1] == ["step_000002", "step_000004"]
    step_folder = other.run_dir / "checkpoints" / "step_000004"
    scripts = {"zero_to_fp32.py", "zero_to_torch.py"}  # DeepSpeed's, for people without this package
    assert {path.name for path in step_folder.iterdir()} - scripts == {
        "engine",
        "config.yaml",
        "run_state.json",
        "sums.json",
    }
    sums = json.loads((step_folder / "sums.json").read_text())
    files = {path.relative_to(step_folder).as_posix() for path in step_folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"sums.json"}


def test_interrupted_write_is_absent(tmp_path: Path) -> None:
    """After a write that ends early at any file, the previous checkpoint is the newest; the partial files are removed
    by the next start and by the next write."""
    assert checkpoint.find_newest(tmp_path / "none") is None
    first = saved(tmp_path, 1)
    with pytest.raises(SaveError, match=r"step_000002 could not be saved: No space left .* newest complete .*000001"):
        saved(tmp_path, 2, fails=True)
    assert checkpoint.find_newest(tmp_path) == first
    # Ended between the last file and the new name.
    partial = tmp_path / "step_000002.partial"
    assert partial.is_dir()
    for name in ("run_state.json", "sums.json"):
        (partial / name).write_bytes((first / name).read_bytes())
    assert checkpoint.find_newest(tmp_path) == first
    assert checkpoint.latest_valid(tmp_path, ALONE) == first
    assert not partial.exists()
    partial.mkdir()
    second = saved(tmp_path, 2)
    assert checkpoint.find_newest(tmp_path) == second
    assert not partial.exists()


def test_checkpoint_is_absent_until_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` returns while files are being synced; until `commit`, the checkpoint does not exist."""
    slow = atomic_folder.file_sum

    def slowly(*args: Any, **kwargs: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return slow(*args, **kwargs)

    monkeypatch.setattr(atomic_folder, "file_sum", slowly)
    engine: Any = FakeEngine()
    saver = Saver(tmp_path, ALONE, SaveConfig())
    assert not saver.is_ready_to_commit
    saver.write(engine, state(3), "name: x\n")
    assert not saver.is_ready_to_commit
    assert checkpoint.find_newest(tmp_path) is None
    is_ready = False
    while not is_ready:
        time.sleep(0.01)
        is_ready = saver.is_ready_to_commit
    assert checkpoint.find_newest(tmp_path) is None
    assert saver.commit() == checkpoint.find_newest(tmp_path)
    assert not saver.is_ready_to_commit
    assert saver.commit() is None


def test_sealed_checkpoint_is_committed_by_the_next_start(tmp_path: Path) -> None:
    """A run that is killed after all files were synced and hashed, but before the commit: the next start commits it. A
    checkpoint with missing hashes of a rank is removed."""
    engine: Any = FakeEngine()
    for step, is_whole in ((3, True), (4, False)):
        saver = Saver(tmp_path, ALONE, SaveConfig())
        saver.write(engine, state(step), "name: x\n")
        while not saver.is_ready_to_commit:
            time.sleep(0.01)
        partial = tmp_path / f"step_00000{step}.partial"
        if not is_whole:
            (partial / "sums_rank_000.json").unlink()
        result = checkpoint.latest_valid(tmp_path, ALONE)
        assert result is not None
        assert result.name == "step_000003"
        assert not partial.exists()


def test_files_that_cannot_be_synced_end_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while syncing ends the save, and the checkpoint does not exist."""

    def fails(*_: Any, **__: Any) -> dict[str, Any]:
        raise OSError("Input/output error")

    first = saved(tmp_path, 1)
    monkeypatch.setattr(atomic_folder, "file_sum", fails)
    with pytest.raises(SaveError, match="Input/output error"):
        saved(tmp_path, 2)
    assert checkpoint.find_newest(tmp_path) == first


def test_unfinished_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    """Partial files of a killed write do not count towards `keep`."""
    first = saved(tmp_path, 1)
    for step in (2, 3):
        partial = tmp_path / f"step_00000{step}.partial"
        partial.mkdir()
        (partial / "sums.json").write_bytes((first / "sums.json").read_bytes())
    saved(tmp_path, 4, SaveConfig(keep=2))
    assert [step_folder.is_dir() for step_folder in (first, tmp_path / "step_000004")] == [True, True]


def test_interrupted_removal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill during the removal of an old checkpoint leaves nothing that could be taken for a checkpoint; the same
    holds for a conversion."""

    def killed_in_its_middle(folders: list[Path]) -> None:
        for folder in folders:
            (folder / "sums.json").unlink()

    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.saver._remove_all", killed_in_its_middle)
        saved(tmp_path, 2, SaveConfig(keep=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001.removed", "step_000002"]
    (tmp_path / "step_000002.universal").mkdir()
    (tmp_path / "step_000002.universal.alive").touch()
    assert checkpoint.latest_valid(tmp_path, ALONE) == tmp_path / "step_000002"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_order_is_by_step(tmp_path: Path) -> None:
    """The newest checkpoint is the one with the most steps, also beyond a million."""
    for step in (999_999, 1_000_000, 20):
        saved(tmp_path, step)
    result = checkpoint.find_newest(tmp_path)
    assert result is not None
    assert checkpoint.read_state(result).step == 1_000_000


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (
        lambda step_folder: (step_folder / "engine" / ENGINE_FILES[0]).write_bytes(b"ha"),
        "has 2 bytes, 4 were written",
    ),
    "bit flipped": (
        lambda step_folder: flip(step_folder / "engine" / ENGINE_FILES[1]),
        "other bytes than were written",
    ),
    "missing": (lambda step_folder: (step_folder / "engine" / ENGINE_FILES[0]).unlink(), "is missing"),
    "state flipped": (lambda step_folder: flip(step_folder / "run_state.json"), "run_state.json has other bytes"),
    "sums cut off": (lambda step_folder: (step_folder / "sums.json").write_text('{"engine/'), "JSONDecodeError"),
    "sums empty": (lambda step_folder: (step_folder / "sums.json").write_text("[]"), "AttributeError"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_reported_and_the_previous_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Any damage to a file of the newest checkpoint is reported with the file, the checkpoint is renamed, and the
    previous one is used."""
    damage, message = DAMAGES[kind]
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    assert checkpoint.latest_valid(tmp_path, ALONE) == second
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid(tmp_path, ALONE) == first
    assert f"checkpoint {second} is damaged" in caplog.text
    assert message in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000001", "step_000002.damaged"]
    damage(first)
    assert checkpoint.latest_valid(tmp_path, ALONE) is None


@pytest.mark.parametrize("name", ["run_state.json", "sums.json", f"engine/{ENGINE_FILES[0]}", "."])
def test_denied_checkpoint_is_not_damaged(name: str) -> None:
    """A checkpoint of another user with a file that may not be read: the message names the file and its owner, and the
    checkpoint keeps its name."""
    with public_folder() as folder:
        saved(folder, 1)
        path = saved(folder, 2)
        denied = path / name
        denied.chmod(0o700 if os.geteuid() == 0 else 0)
        with pytest.raises(ConfigError, match=rf"{denied} exists but .*owner {denied.owner()}"), unprivileged():
            checkpoint.latest_valid(folder, ALONE)
        denied.chmod(0o755)
        assert checkpoint.latest_valid(folder, ALONE) == path
