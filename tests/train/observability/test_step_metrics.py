"""Tests of the metrics of a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.data.loader import StepPlan
from train.distributed.world import StepState, World
from train.engine.step_guard import Update
from train.observability.step_metrics import StepMetrics, StepOutcome

TWO_RANKS = World(0, 0, 2, torch.device("cpu"), torch.float32, None)
PLAN = StepPlan(
    step=7,
    samples=np.arange(8),
    rows=(np.arange(2), np.arange(0)),
    divisor=8.0,
    divisors=np.array([6.0, 0.0, 2.0]),
    num_tokens=300,
    num_supervised=20,
    num_tiles=12,
    flops=4e12,
    balance=0.9,
)


def outcome(applied: bool = True) -> StepOutcome:
    """Returns the outcome of a step with three sources, of which the second has no sample: loss sums, then supervised
    tokens. The losses' divisors are numbers of samples (loss_weighting: sample)."""
    sums = torch.tensor([12.0, 0.0, 8.0, 15.0, 0.0, 5.0], dtype=torch.float64)
    update = Update(applied, 5.0, {"projector": 3.0, "language_model": 4.0})
    return StepOutcome(StepState(sums, stop=False, sealed=False, slowest_s=1.5), update, seconds=2.0, data_wait_s=0.25)


def test_metrics_of_a_step() -> None:
    """Losses are divided by the step's divisors, rates by its seconds, FLOPs by the number of ranks."""
    values = StepMetrics(["a", "absent", "c"], TWO_RANKS).compute(PLAN, outcome())
    assert values.pop("perf/max_memory_gib") > 0.05
    assert values == {
        "train/loss": 2.5,
        "train/loss/a": 2.0,
        "train/loss/c": 4.0,
        "train/tokens/a": 15.0,
        "train/tokens/c": 5.0,
        "train/grad_norm": 5.0,
        "train/grad_norm/projector": 3.0,
        "train/grad_norm/language_model": 4.0,
        "train/samples": 8.0,
        "train/supervised_tokens": 20.0,
        "train/input_tokens": 300.0,
        "train/tiles": 12.0,
        "perf/step_s": 2.0,
        "perf/data_wait_s": 0.25,
        "perf/forward_backward_s": 1.5,
        "perf/tokens_per_s": 150.0,
        "perf/samples_per_s": 4.0,
        "perf/tflops_per_rank": 1.0,
        "perf/balance": 0.9,
        "perf/micro_steps": 2.0,
    }


def test_a_verification_is_not_part_of_the_rates() -> None:
    """Its seconds have a key of their own."""
    verified = replace(outcome(), verify_s=1.25)
    values = StepMetrics(["a", "absent", "c"], TWO_RANKS).compute(PLAN, verified)
    assert (values["perf/verify_s"], values["perf/step_s"], values["perf/tokens_per_s"]) == (1.25, 2.0, 150.0)


def test_step_that_was_not_applied_is_marked() -> None:
    """Only a step that was not applied has train/left_out."""
    assert StepMetrics(["a", "b", "c"], TWO_RANKS).compute(PLAN, outcome(applied=False))["train/left_out"] == 1.0


def test_as_many_names_as_sources() -> None:
    """The numbers of names and of sources must be equal."""
    with pytest.raises(ValueError, match="zip"):
        StepMetrics(["a", "b"], TWO_RANKS).compute(PLAN, outcome())
