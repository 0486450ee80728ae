"""Tests of the held-out loss: it is the model's loss, the same on any ranks, and changes nothing that is learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_mixture
from tests.train import cases
from tests.train.cases import with_stage, zero
from tests.train.conftest import StartRanks
from train.config.compose import check
from train.config.schema import ConfigError, EvaluateConfig, RunConfig


@pytest.fixture(scope="module")
def holding_out(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run with seven samples with images held out."""
    mixture, store_root = tiny_mixture(tmp_path_factory.mktemp("held_out"), 40, holdout=7)
    return replace(tiny_parts, mixture=mixture, data=replace(tiny_parts.data, store_root=str(store_root)))


def _lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 3), *(pytest.param(*world, marks=pytest.mark.full) for world in ((1, 0), (2, 1), (2, 2)))],
)
def test_it_changes_nothing_that_is_learned(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, size: int, stage: int
) -> None:
    """With and without it, losses, norms and weights are the same bit for bit. It is logged every n-th step and after
    the last, for the source with held-out samples."""
    without = replace(holding_out, root=str(tmp_path / "without"), engine=zero(stage))
    watched = replace(without, root=str(tmp_path / "with"), evaluate=EvaluateConfig(every=2))
    alone = start_ranks(size).run(cases.train, without, 3)[0]
    seen = start_ranks(size).run(cases.train, watched, 3)[0]
    assert seen.losses == alone.losses
    assert seen.grad_norms == alone.grad_norms
    for name, weight in alone.after.items():
        np.testing.assert_array_equal(seen.after[name], weight)
    result = [{key for key in line if key.startswith("eval/")} for line in _lines(watched)]
    assert result == [set(), {"eval/tiny_pictures/loss"}, {"eval/tiny_pictures/loss"}]


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_it_is_the_loss_of_the_live_weights(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, weighting: str
) -> None:
    """On one rank or two, with different numbers of rows: the mean over held-out samples that are run one by one with
    the weights of that step, weighed as in training."""
    config = with_stage(holding_out, loss_weighting=weighting)
    config = replace(config, evaluate=EvaluateConfig(every=1))
    for size in (1, 2):
        here = replace(config, root=str(tmp_path / str(size)))
        expected = start_ranks(size).run(cases.held_out_loss, here)[0]
        assert _lines(here)[0]["eval/tiny_pictures/loss"] == pytest.approx(expected, rel=1e-5)


def test_stopped_in_the_last_step(start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path) -> None:
    """A run that is asked to stop in its last step is finished: it has its final evaluation and its checkpoint."""
    config = replace(holding_out, root=str(tmp_path), evaluate=EvaluateConfig(every=100))
    record = start_ranks(1).run(cases.train_up_to, config, 4)[0]
    assert len(record.losses) == 4  # not interrupted
    assert "eval/tiny_pictures/loss" in _lines(config)[-1]
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000004"]


def test_nothing_held_out_is_refused(tiny_parts: RunConfig) -> None:
    """The configuration is rejected before torch is imported."""
    from omegaconf import OmegaConf

    from train.config.compose import to_yaml

    asked = replace(tiny_parts, evaluate=EvaluateConfig(every=10))
    with pytest.raises(ConfigError, match=r"evaluate\.every=10, but mixture tiny holds nothing out"):
        check(OmegaConf.create(to_yaml(asked)), folders=False)  # type: ignore[arg-type]
