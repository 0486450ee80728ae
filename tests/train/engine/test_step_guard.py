"""Steps that must not be applied are skipped at any ZeRO stage, and `skip_non_finite` limits how many."""

import json
import math
from dataclasses import replace

import pytest

from tests.train import faults
from tests.train.cases import zero
from tests.train.conftest import StartRanks
from tests.train.faults import FAULTY_STEP, Fault
from train.config.schema import RunConfig

QUICK = {("gradient", 2, 2), ("loss", 1, 0)}


@pytest.mark.parametrize(
    ("fault", "size", "stage"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.full)
        for case in (
            (fault, size, stage) for fault in ("gradient", "loss") for size in (1, 2) for stage in (0, 1, 2, 3)
        )
    ],
)
def test_a_step_that_is_not_finite_is_left_out(
    start_ranks: StartRanks, run_config: RunConfig, fault: Fault, size: int, stage: int
) -> None:
    """If skip_non_finite allows it, no weight and no moment changes in that step, its samples are recorded, and the run
    goes on; every rank decides alike."""
    config = replace(run_config, engine=zero(stage), skip_non_finite=1)
    for seen in start_ranks(size).run(faults.run_with_faulty_step, config, fault):
        assert seen.ended == ""
        assert seen.applied == [True, False, True, True]
        assert seen.updates == [1, 1, 2, 3]
    seen = start_ranks(size).run(faults.run_with_faulty_step, replace(config, name="again"), fault)[0]
    assert seen.changed == [True, False, True, True]
    [line] = [json.loads(line) for line in (config.run_dir / "non_finite.jsonl").read_text().splitlines()]
    assert line["step"] == FAULTY_STEP
    assert line["what"].startswith("the gradient" if fault == "gradient" else "the loss of tiny_")
    assert len(line["samples"]) == config.stage.batch_size
    metrics = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("train/left_out") for line in metrics] == [None, 1.0, None, None]
    if fault == "gradient":
        assert not math.isfinite(seen.grad_norms[FAULTY_STEP])


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.full)])
def test_one_too_many_ends_the_run(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """By default the first one ends the run, and the message has the cause, the step, the key and the samples; steps
    that were skipped before a restart count."""
    config = replace(run_config, engine=zero(stage))
    seen = start_ranks(1).run(faults.run_with_faulty_step, config, "gradient")[0]
    assert seen.applied == [True]
    assert "step 1: the gradient is not finite; the step was not applied, and skip_non_finite=0 allows" in seen.ended
    assert "Its samples: tiny_" in seen.ended
    allowed = replace(config, name="allowed", skip_non_finite=3)
    assert "skip_non_finite=3 allows" in start_ranks(1).run(faults.run_with_faulty_step, allowed, "loss", 3)[0].ended


def test_out_of_memory_says_which_row(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The message has step, row and size, and the settings that make it smaller and change nothing that is learned."""
    ended = start_ranks(1).run(faults.run_with_faulty_step, run_config, "memory")[0].ended
    for text in (
        "OutOfMemory: step 1, micro-step 0: a row of ",
        "Lower packing.max_tokens (640; at least stage.max_length, 512) or packing.max_tiles (24)",
        "set recompute=[language_model]",
        "engine=zero3",
        "Tried to allocate 2.00 GiB",
    ):
        assert text in ended, ended
