"""A bit that changes on one rank is found and its rank is named; a verified run learns what another run learns."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_next.config import LoraConfig
from tests.ranks import run_to_the_end
from tests.train import corruption_cases, fault_runs
from tests.train.cases import with_stage, zero, zero_3_in_nodes
from tests.train.conftest import StartRanks
from tests.train.corruption_cases import Flip
from train.config.rules import check_values
from train.config.schema import ConfigError, RunConfig, SaveConfig, VerifyConfig
from train.engine.replica_checksums import outvoted_ranks
from train.supervision.step_verification import _differ, has_deterministic_kernels

full = pytest.mark.full
OFFLOAD = {"device": "cpu"}


def find(start_ranks: StartRanks, config: RunConfig, size: int, stage: int, flip: Flip) -> corruption_cases.Found:
    """Runs with a flip, verifying every second step; returns what all ranks found alike."""
    config = replace(config, engine=zero(stage), verify=VerifyConfig(every=2))
    found = start_ranks(size).run(corruption_cases.run_with_flip, config, flip)
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.mark.parametrize(
    ("size", "stage", "flip"),
    [
        (2, 2, Flip("activation", rank=1, bit=20)),
        *(pytest.param(2, stage, Flip("activation", rank=0, bit=20, in_pass=1), marks=full) for stage in (0, 1, 3)),
        (2, 3, Flip("gradient", rank=1)),
        *(pytest.param(3, stage, Flip("gradient", rank=2, in_pass=1), marks=full) for stage in (0, 1, 2, 3)),
        # A gradient that is Inf makes DeepSpeed skip the step, and the loss NaN that of an activation.
        *(pytest.param(2, stage, Flip("gradient", rank=1, bit=30), marks=full) for stage in (0, 2, 3)),
        pytest.param(2, 2, Flip("activation", rank=1, bit=30), marks=full),
        pytest.param(1, 2, Flip("activation", rank=0, bit=20), marks=full),
    ],
)
def test_a_rank_that_computes_otherwise_is_named(
    start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int, flip: Flip
) -> None:
    """In either pass, the last bit of one value of a gradient included."""
    found = find(start_ranks, run_config, size, stage, flip)
    assert (found.rank, found.num_steps) == (flip.rank, 1)
    assert found.message.startswith(f"step 1 was computed twice on the same rows: rank {flip.rank} (")
    kind = "loss sum of tiny_" if flip.where == "activation" else "gradient of language_model of norm"
    assert f"computed other values the second time: {kind}" in found.message
    assert "exclude its host (Slurm: --exclude=" in found.message


@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize(
    ("size", "stage", "clip_norm"),
    [(2, 2, 1.0), *(pytest.param(3, stage, clip, marks=full) for stage in (0, 1, 3) for clip in (None, 1.0))],
)
@pytest.mark.parametrize("bit", [0, pytest.param(27, marks=full)])
def test_a_reduced_gradient_is_of_the_rank_that_holds_it(
    start_ranks: StartRanks,
    run_config: RunConfig,
    size: int,
    stage: int,
    clip_norm: float | None,
    in_pass: int,
    bit: int,
) -> None:
    """Also where it changes the norm by which every rank's gradients would be divided."""
    config = with_stage(run_config, clip_norm=clip_norm)
    found = find(start_ranks, config, size, stage, Flip("share", rank=1, bit=bit, in_pass=in_pass))
    assert (found.rank, found.num_steps) == (1, 1)
    assert ": rank 1 (" in found.message
    assert "holds other reduced gradients the second time" in found.message
    assert "reduced gradient of " in found.message


@full
@pytest.mark.parametrize(("bit", "stage"), [(27, 2), (12, 0), (27, 0), (27, 1), (27, 3)])
def test_a_gradient_that_changes_before_its_reduction_is_found(
    start_ranks: StartRanks, run_config: RunConfig, stage: int, bit: int
) -> None:
    """After the verification has seen it; then the ranks that hold the sum are named, of which it need not be one. (The
    last bit of a value would mostly be rounded off in the sum, and change nothing.)"""
    found = find(start_ranks, run_config, 3, stage, Flip("buffer", rank=2, bit=bit))
    assert found.num_steps == 1
    assert "on the network or in a buffer of another rank" in found.message
    if stage == 0:  # where every rank holds it
        assert "ranks 0 (" in found.message
        assert ", 1 (" in found.message
        assert ", 2 (" in found.message


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=full) for stage in (0, 1))])
def test_a_replicated_weight_is_compared(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """Of three ranks, the one that differs is named; of two, both are."""
    found = find(start_ranks, run_config, 3, stage, Flip("weight", rank=1, in_pass=1))
    assert (found.rank, found.num_steps) == (1, 1)
    assert found.message.startswith("before step 1: rank 1 (")
    assert "layers.1.mlp.down_proj.weight" in found.message
    found = find(start_ranks, replace(run_config, name="two"), 2, stage, Flip("weight", rank=1, in_pass=1))
    assert found.message.startswith("before step 1: ranks 0 (")
    assert "no majority shows which is right" in found.message


@full
def test_the_program_names_rank_and_host(run_config: RunConfig, tmp_path: Path) -> None:
    """Exit code 1 on every rank, and one message; exit.json has the rank that differs, whichever reports first. The
    same command continues from the checkpoint before."""
    config = replace(run_config, verify=VerifyConfig(every=2), preflight="off", save=SaveConfig(every=1))
    case, flip = corruption_cases.run_program_with_flip, Flip("gradient", rank=2)
    ended = run_to_the_end(3, case, config, flip, folder=tmp_path, timeout_s=240)
    assert [each.exit_code for each in ended] == [1, 1, 1]
    host = os.uname().nodename
    exit_info = fault_runs.read_exit_report(config)
    assert (exit_info["code"], exit_info["rank"], exit_info["host"], exit_info["step"]) == (1, 2, host, 1)
    start = f"CorruptionError: step 1 was computed twice on the same rows: rank 2 ({host}) computed other values"
    assert exit_info["reason"].startswith(start)
    assert sum(f"error: {start}" in each.output for each in ended) == 1
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000001"]
    ended = run_to_the_end(3, fault_runs.run_as_it_is, config, folder=tmp_path, timeout_s=240)
    assert [each.exit_code for each in ended] == [0, 0, 0]


@full
def test_moments_are_compared_where_they_are_replicated(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """At ZeRO-0."""
    found = find(start_ranks, run_config, 3, 0, Flip("moment", rank=0, in_pass=1))
    assert (found.rank, found.num_steps) == (0, 1)
    assert "exp_avg_sq of hf." in found.message


def test_steps_between_are_not_verified(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A change that only one step sees, and that is not verified, goes on unnoticed."""
    found = find(start_ranks, run_config, 2, 2, Flip("activation", rank=1, bit=20, step=2))
    assert (found.message, found.num_steps) == ("", 4)


@pytest.mark.parametrize(
    ("size", "engine", "changes"),
    [
        (2, zero(3), {}),
        *(pytest.param(size, zero(stage), {}, marks=full) for size in (1, 3) for stage in (0, 1, 2, 3)),
        pytest.param(2, {"zero_optimization": {"stage": 1, "offload_optimizer": OFFLOAD}}, {}, marks=full),
        pytest.param(2, {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}}, {}, marks=full),
        pytest.param(
            2,
            {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}},
            {},
            marks=full,
        ),
        pytest.param(2, {"zero_optimization": {"stage": 3, "sub_group_size": 3000}}, {}, marks=full),
        pytest.param(4, zero_3_in_nodes(), {}, marks=full),
        pytest.param(2, zero(1), {"precision": "bf16"}, marks=full),
        pytest.param(2, zero(2), {"precision": "bf16"}, marks=full),
        pytest.param(2, zero(3), {"precision": "bf16"}, marks=full),
        pytest.param(2, zero(3), {"recompute": ("language_model", "vision_tower")}, marks=full),
        pytest.param(1, zero(2), {"compile": ("language_model", "vision_tower"), "timeout_s": 600}, marks=full),
        pytest.param(
            2,
            zero(2),
            {"compile": ("language_model",), "recompute": ("language_model", "vision_tower"), "timeout_s": 600},
            marks=full,
        ),
        pytest.param(2, zero(3), {"lora": {"language_model": LoraConfig(4, 8.0, ("q_proj",))}}, marks=full),
        pytest.param(2, zero(2), {"lora": {"language_model": LoraConfig(4, 8.0, ("q_proj",))}}, marks=full),
    ],
)
def test_a_verified_run_learns_the_same(
    start_ranks: StartRanks, run_config: RunConfig, size: int, engine: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Every step is computed twice from the first on: losses, norms, weights, moments and the number of updates are
    those of the run without it, bit for bit, and nothing differs between the passes."""
    if "lora" in changes:
        pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
    config = replace(run_config, engine=engine, **changes)
    for records in start_ranks(size).run(corruption_cases.verified_and_not, config, timeout_s=900):
        (plain, plain_updates), (verified, updates) = records
        assert verified.losses == plain.losses
        assert verified.grad_norms == plain.grad_norms
        assert verified.norms_by_part == plain.norms_by_part
        assert verified.moment_square == plain.moment_square
        assert updates == plain_updates == [4]
        for name, weight in plain.after.items():
            np.testing.assert_array_equal(verified.after[name], weight, err_msg=name)
    for name in ("plain", "verified"):
        path = replace(config, name=name).run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line.get("perf/verify_s", 0) > 0 for line in lines] == [name == "verified"] * 4


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([[1, 2], [1, 2], [1, 2]], {}),
        ([[1, 2], [1, 3], [1, 2]], {1: [1]}),
        ([[1, 2, 0], [1, 3, 0], [4, 2, 0]], {1: [1], 2: [0]}),
        ([[1, 2], [1, 3]], {0: [1], 1: [1]}),
        ([[1], [1], [2], [2]], {0: [0], 1: [0], 2: [0], 3: [0]}),
        ([[2], [1], [1], [1]], {0: [0]}),
    ],
)
def test_the_minority_is_outvoted(sums: list[list[int]], expected: dict[int, list[int]]) -> None:
    """Rank 0 as well; without a majority all ranks are named."""
    assert outvoted_ranks(sums) == expected


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cpu", {}, True),
        ("cuda", {}, False),
        ("cuda", {"deterministic": True}, True),
        ("cuda", {"deterministic": True, "liger": True}, False),
        ("cuda", {"deterministic": True, "attention": "flash_attention_2"}, False),
    ],
)
def test_bits_are_compared_where_kernels_are_deterministic(
    tiny_parts: RunConfig, device: str, changes: dict[str, Any], expected: bool
) -> None:
    """Elsewhere there is a tolerance."""
    assert has_deterministic_kernels(replace(tiny_parts, **changes), device) == expected


def test_numbers_differ_by_more_than_the_tolerance() -> None:
    """Relative to the larger one; what is not finite equals its like only."""
    nan, inf = math.nan, math.inf
    for a, b, tolerance in ((1.0, 1.0, 0.0), (nan, nan, 0.0), (inf, inf, 0.1), (0.0, 0.0, 0.0), (1.0, 1.009, 1e-2)):
        assert not _differ(a, b, tolerance)
    for a, b, tolerance in (
        (1.0, 1.0 + 1e-15, 0.0),
        (nan, 1.0, 0.5),
        (inf, 1.0, 0.5),
        (1.0, 1.02, 1e-2),
        (0.0, 1e-9, 0.1),
    ):
        assert _differ(a, b, tolerance)
        assert _differ(b, a, tolerance)


def test_the_interval_is_checked(tiny_parts: RunConfig) -> None:
    """It is a number of steps."""
    with pytest.raises(ConfigError, match=r"verify\.every must be at least 0, got -1"):
        check_values(replace(tiny_parts, verify=VerifyConfig(-1)))
