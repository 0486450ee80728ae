"""The planner benchmarks: planned memory is near the measured memory, and the first exceeded limit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer

Bench = Callable[[str], Any]


@pytest.mark.full
def test_memory_is_planned_within_15_percent(bench: Bench, tmp_path: Path) -> None:
    """Two settings of a model of more than 1 GB of state, by the processes' high-water marks."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", "metaspace")
    assert bench("plan").main(["accuracy", "--quick", "--tokenizer", str(tokenizer), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert results["worst"] <= 0.15
    for values in results["cases"].values():
        assert values["state_gib"] * 2**30 > 1e9


@pytest.mark.gpu
@pytest.mark.full
def test_memory_is_planned_within_10_percent_on_a_gpu(bench: Bench, tmp_path: Path) -> None:
    """Layers of a 7B behind CLIP ViT-L, in bf16, by the allocator's peak."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", "metaspace")
    arguments = ["--device", "cuda", "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    assert bench("plan").main(["accuracy", *arguments]) == 0


def test_exceeded_limits(bench: Bench) -> None:
    """Limits are named in the order of ranks, separately for both kinds of batch."""
    limits = bench("planner.scale").exceeded_limits

    def row(ranks: int, batch: int, **values: float) -> dict[str, float]:
        return {"ranks": ranks, "batch": batch, "balance": 1.0, "communication": 0.1, "deal_of_step": 0.0, **values}

    scales = [
        row(64, 128),
        row(64, 256),
        row(256, 128, balance=0.4),
        row(256, 1024),
        row(1024, 128, balance=0.1, communication=0.5),
        row(1024, 4096, deal_of_step=0.2),
    ]
    orders = [{"samples": 10**6, "of_a_node": 0.01}, {"samples": 10**8, "of_a_node": 0.2}]
    fixed, grown, samples = limits(orders, scales)
    assert fixed == "a batch of 128: balance 0.40 at 256 ranks; communication 50% of a step at 1024 ranks"
    assert grown == "four samples a rank: planning takes 20% of a step's time at 1024 ranks"
    assert samples == "samples: making the order takes 20.0% of a node's memory at 100,000,000"
    assert limits(orders[:1], scales[:2])[2].endswith("below its limit")
