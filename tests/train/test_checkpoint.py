"""Owns the proofs about stopping and going on: a resumed run ends where an uninterrupted one does, bit for bit; a
checkpoint is complete or absent, and refuses a run that is not its own.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import Ranks
from tests.train import cases
from tests.train.cases import aligning, zero
from train import checkpoint
from train.config import RunConfig
from train.world import World

StartRanks = Callable[[int], Ranks]


@pytest.mark.parametrize(
    ("kind", "size", "stage"),
    [
        ("finetune", 2, 2),
        ("align", 2, 3),
        *(
            pytest.param(kind, size, stage, marks=pytest.mark.full)
            for kind in ("finetune", "align")
            for size in (1, 2)
            for stage in (0, 1, 2, 3)
            if (kind, size, stage) not in (("finetune", 2, 2), ("align", 2, 3))
        ),
    ],
)
def test_resumed_is_uninterrupted(
    start_ranks: StartRanks, run_config: RunConfig, kind: str, size: int, stage: int
) -> None:
    """Stopped after two steps and started again by new engines, a run sees the rest of the samples, has the same losses
    and ends with bit-identical weights; metrics.jsonl has every step once."""
    config = replace(run_config if kind == "finetune" else aligning(run_config), engine=zero(stage))
    ranks = start_ranks(size)
    whole = ranks.run(cases.train, replace(config, name="whole"))[0]
    ranks.run(cases.train_up_to, config, 2)
    # Another seed's model: whatever the checkpoint does not bring back would show.
    resumed = ranks.run(cases.resume_elsewhere, config)[0]
    assert resumed.first_step == 2
    assert resumed.samples == whole.samples[2:]
    assert resumed.losses == whole.losses[2:]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed.after[name], weight, err_msg=name)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["train/loss"] for line in lines] == pytest.approx(whole.losses, rel=1e-6)


def test_checkpoint_refuses_another_run(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Other data, another seed, another number of ranks or another ZeRO stage: one sentence each, with both values and
    the way out; nothing is loaded."""
    ranks = start_ranks(2)
    ranks.run(cases.train_up_to, run_config, 1)
    for told in ranks.run(cases.refusals, run_config):
        assert len(told) == 4
        for text, name in zip(told, ("data_fingerprint", "seed", "num_ranks", "zero_stage"), strict=True):
            assert f"was saved with {name}=" in text
            assert "this run has" in text
            assert "start afresh with another name=" in text
            assert str(run_config.run_dir / "checkpoints") in text


def test_newest_are_kept(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Only the newest `keep` checkpoints stay, and nothing else lies beside them."""
    names = start_ranks(2).run(cases.save_often, run_config, 2)[0]
    assert names == [
        ["step_000001"],
        ["step_000001", "step_000002"],
        ["step_000002", "step_000003"],
        ["step_000003", "step_000004"],
    ]


class FakeEngine:
    """Writes two files as DeepSpeed would, and fails when it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save_checkpoint(self, folder: str, **_: Any) -> None:
        (Path(folder) / "first").write_text("half")
        if self.fails:
            raise OSError("No space left on device")
        (Path(folder) / "second").write_text("whole")


ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)


def saved(config: RunConfig, folder: Path, step: int, *, keep: int = 9, fails: bool = False) -> Path:
    """A checkpoint after `step` steps, of files that stand for an engine."""
    engine: Any = FakeEngine(fails)
    return checkpoint.save(engine, folder, checkpoint.run_state(step, "f" * 64, config, ALONE), ALONE, keep=keep)


def test_interrupted_write_is_absent(run_config: RunConfig, tmp_path: Path) -> None:
    """A write that ends early, at whatever file, leaves the checkpoint before it as the newest; what it left is
    replaced by the next one."""
    assert checkpoint.newest(tmp_path / "none") is None
    first = saved(run_config, tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        saved(run_config, tmp_path, 2, fails=True)
    assert checkpoint.newest(tmp_path) == first
    # Ended between the last file and the new name.
    partial = tmp_path / "step_000002.partial"
    assert partial.is_dir()
    (partial / "run_state.json").write_bytes((first / "run_state.json").read_bytes())
    assert checkpoint.newest(tmp_path) == first
    second = saved(run_config, tmp_path, 2)
    assert checkpoint.newest(tmp_path) == second
    assert not partial.exists()
    assert sorted(place.name for place in second.iterdir()) == ["first", "run_state.json", "second"]


def test_unfinished_ones_do_not_count_as_kept(run_config: RunConfig, tmp_path: Path) -> None:
    """What a killed write left behind never pushes a complete checkpoint out."""
    first = saved(run_config, tmp_path, 1)
    for step in (2, 3):
        partial = tmp_path / f"step_00000{step}.partial"
        partial.mkdir()
        (partial / "run_state.json").write_bytes((first / "run_state.json").read_bytes())
    saved(run_config, tmp_path, 4, keep=2)
    assert [place.is_dir() for place in (first, tmp_path / "step_000004")] == [True, True]


def test_order_is_by_step(run_config: RunConfig, tmp_path: Path) -> None:
    """The newest is the one with most steps, also beyond a million."""
    for step in (999_999, 1_000_000, 20):
        newest = saved(run_config, tmp_path, step)
    assert newest.name == "step_000020"
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert checkpoint.read_state(found).step == 1_000_000


def test_state_is_what_a_run_needs(run_config: RunConfig, tmp_path: Path) -> None:
    """The state says step, data, seed, ranks, ZeRO stage and the versions it was written with."""
    state = checkpoint.read_state(saved(run_config, tmp_path, 7))
    assert (state.step, state.data_fingerprint, state.seed) == (7, "f" * 64, run_config.seed)
    assert (state.num_ranks, state.zero_stage) == (1, 2)
    assert set(state.versions) == {"torch", "deepspeed", "transformers"}
