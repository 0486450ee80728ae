"""The score of a step's loss is its distance from the losses before it, and a resumed run computes the same one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from train.observability.loss_spikes import MIN_STEPS, WINDOW, LossSpikes, read_losses

KEY = "train/loss_spike_score"


def test_the_score_is_the_distance_from_the_median_in_spreads() -> None:
    """(loss - median) / (1.4826 * MAD) of the last 50 losses without the step's own; none for the first 20 steps."""
    losses = np.random.default_rng(0).normal(2.0, 0.1, 120).round(6).tolist()
    losses[100] = 5.0
    spikes = LossSpikes()
    scores = [spikes.update(loss).get(KEY) for loss in losses]
    assert [score is None for score in scores] == [number < MIN_STEPS for number in range(120)]
    for number in (MIN_STEPS, 60, 100, 101, 119):
        before = np.array(losses[max(0, number - WINDOW) : number])
        median = np.median(before)
        spread = 1.4826 * np.median(np.abs(before - median))
        assert scores[number] == pytest.approx((losses[number] - median) / spread, rel=1e-12)
    found = [number for number, score in enumerate(scores) if score is not None and score >= 10]
    assert found == [100]  # one spike makes no other


def test_a_fall_is_no_spike() -> None:
    """Its score is below zero."""
    spikes = LossSpikes([2.0 + 0.1 * (number % 3) for number in range(WINDOW)])
    assert spikes.update(0.5)[KEY] < -10


def test_nearly_equal_losses_have_a_spread() -> None:
    """Of 1 % of the median, so that a loss 5 % above it is no spike; losses of 0 have no score."""
    spikes = LossSpikes([2.0] * WINDOW)
    assert spikes.update(2.1) == {KEY: pytest.approx(5.0)}
    assert LossSpikes([0.0] * WINDOW).update(1.0) == {}


def test_losses_that_are_not_finite_are_left_out() -> None:
    """They have no score, and do not change the others'."""
    losses = [2.0 + 0.1 * (number % 3) for number in range(MIN_STEPS)]
    spikes = LossSpikes(losses)
    assert spikes.update(math.nan) == spikes.update(math.inf) == {}
    assert spikes.update(3.0) == LossSpikes(losses).update(3.0) != {}


def test_a_resumed_run_has_the_same_scores(tmp_path: Path) -> None:
    """Bit for bit, although metrics.jsonl has eight digits of a loss, and null for one that is not finite."""
    losses = [*np.random.default_rng(1).normal(2.0, 0.1, 90).tolist(), math.nan, 2.0 / 3]
    whole = LossSpikes()
    expected = [whole.update(loss) for loss in [*losses, 1.0 / 3]][-1]
    lines = [{"train/loss": float(f"{loss:.8g}") if math.isfinite(loss) else None} for loss in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged = read_losses(tmp_path / "metrics.jsonl")
    assert len(logged) == WINDOW
    assert LossSpikes(logged).update(1.0 / 3) == expected
    assert read_losses(tmp_path / "absent.jsonl") == []
