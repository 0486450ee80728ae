"""Tests of the size and the time of a checkpoint, by hand and against the files that DeepSpeed writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import tiny_model
from tests.train import plan_cases
from tests.train.cases import zero
from tests.train.conftest import StartRanks
from tests.train.plan.test_hours import hardware
from tests.train.plan.test_memory import FACTS, setting
from train.config.schema import RunConfig
from train.plan.execution_settings import read_settings
from train.plan.model_facts import count_model, read_architecture
from train.plan.saving import estimate_save


def test_frozen_parameters_are_not_saved() -> None:
    """Of 7000 parameters 6700 are trained: 12 bytes each with ZeRO, 2 more up to stage 2, 2 + 8 without."""
    node = replace(hardware(), disk_gb_s=1e-6, host_link_gb_s=1e-6)
    sizes = {0: 10 * 6700, 1: 14 * 6700, 2: 14 * 6700, 3: 12 * 6700}
    for stage, size in sizes.items():
        save = estimate_save(FACTS, setting(stage), node, half=True)
        assert save.num_bytes == save.node_bytes == size
        assert save.write_s == pytest.approx(size / 1e3)
    assert estimate_save(FACTS, setting(3), node, half=True).stall_s == pytest.approx(12 * 6700 / 8 / 1e3)


def test_ranks_wait_for_the_copy_or_for_the_disk() -> None:
    """Ranks wait for the copy to the host; where there is too little memory for it, until everything is written; and if
    saves follow faster than the disk, for the save before."""
    node = replace(hardware(), disk_gb_s=1e-6, host_link_gb_s=1e-6)
    copied = estimate_save(FACTS, setting(3), node, half=True)
    assert copied.seconds_per_step(0, 1.0) == 0
    assert copied.seconds_per_step(1000, 1.0) == pytest.approx(copied.stall_s / 1000)
    assert copied.seconds_per_step(10, 1.0) == pytest.approx((copied.stall_s + copied.write_s - 10) / 10)
    written = estimate_save(FACTS, setting(3), node, half=True, used_host_bytes=node.host_memory_gib * 2**30)
    assert written.stall_s == written.write_s
    assert written.seconds_per_step(10, 1.0) == pytest.approx(written.write_s / 10)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_files_have_the_planned_size(
    start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path: Path, stage: int
) -> None:
    """Two ranks write a checkpoint of a model of a million parameters whose tower is frozen: within 10 %, the rest is
    metadata."""
    model = tiny_model(tmp_path / "model", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    rates = {part: rate for part, rate in tiny_parts.stage.learning_rates.items() if part != "vision_tower"}
    stage_config = replace(tiny_parts.stage, learning_rates=rates)
    config = replace(
        tiny_parts, root=str(tmp_path), name=f"zero{stage}", model=model, stage=stage_config, engine=zero(stage)
    )
    written = start_ranks(2).run(plan_cases.saved_bytes, config, timeout_s=240)[0]
    facts = count_model(read_architecture(model), config)
    planned = estimate_save(facts, read_settings(config, 1), replace(hardware(), gpus_per_node=2), half=False)
    assert facts.num_trained < facts.num_parameters
    assert written == pytest.approx(planned.num_bytes, rel=0.1)
