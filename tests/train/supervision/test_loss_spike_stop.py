"""A step whose loss is a spike is logged, and `on_spike=stop` ends the run with the checkpoint before it."""

import json
from dataclasses import replace

import pytest

from tests.train import corruption_cases
from tests.train.conftest import StartRanks
from train.config.rules import check_values
from train.config.schema import ConfigError, RunConfig, SaveConfig

SPIKE = 2


def test_a_spike_stops_the_run_and_the_run_can_go_past_it(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """On every rank, with its samples, and after the step was logged; nothing newer than the checkpoint before it is
    saved, and that one is kept. The same command stops again; on_spike=none goes on, with the scores of a run that was
    not interrupted."""
    ranks = start_ranks(2)
    config = replace(run_config, on_spike="stop", save=SaveConfig(every=1, keep=1))
    for _ in range(2):
        messages = [message for _, message in ranks.run(corruption_cases.train_with_spike, config, SPIKE, 5.0)]
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"step {SPIKE}: the loss ")
        assert "is at least spike_threshold=10" in messages[0]
        assert f"--step {SPIKE} --loss`" in messages[0]
        assert "Its samples: tiny_" in messages[0]
        assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000002"]
        lines = read(config)
        assert [line["step"] for line in lines] == [0, 1, SPIKE]
        assert lines[SPIKE]["train/loss_spike_score"] > 10
    resumed = ranks.run(corruption_cases.train_with_spike, replace(config, on_spike="none"), SPIKE, 5.0)
    assert [(record.first_step, message) for record, message in resumed] == [(SPIKE, "")] * 2
    whole = replace(run_config, name="whole")
    ranks.run(corruption_cases.train_with_spike, whole, SPIKE, 5.0)
    scores = [[line.get("train/loss_spike_score") for line in read(each)] for each in (config, whole)]
    assert scores[0] == scores[1]
    assert [score is None for score in scores[0]] == [True, True, False, False]


def test_a_loss_below_the_threshold_goes_on(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The threshold is a key."""
    config = replace(run_config, on_spike="stop", spike_threshold=1e6)
    assert start_ranks(2).run(corruption_cases.train_with_spike, config, SPIKE, 5.0)[0][1] == ""
    assert len(read(config)) == 4


def test_the_threshold_is_checked(tiny_parts: RunConfig) -> None:
    """It is a finite number above 0."""
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"spike_threshold must be above 0 and finite, got"):
            check_values(replace(tiny_parts, spike_threshold=value))


def read(config: RunConfig) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
