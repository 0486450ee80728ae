"""What is derived of DeepSpeed's dictionary."""

from dataclasses import replace

import pytest
import torch

from tests.train import communication_cases
from tests.train.cases import with_stage, zero
from tests.train.conftest import StartRanks
from train.config.schema import ConfigError, RunConfig
from train.distributed.world import World
from train.engine.deepspeed_engine import engine_dictionary

SIZE = {"num_parameters": 3_000, "num_trained": 2_000}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_gradients_are_added_up_in_fp32(run_config: RunConfig, size: int, stage: int, dtype: torch.dtype) -> None:
    """Over the rows of a step and over ranks, whatever the type of the weights. One rank sends nothing to others."""
    world = World(0, 0, size, torch.device("cpu"), dtype, None)
    dictionary = engine_dictionary(replace(run_config, engine=zero(stage)), world, **SIZE)
    assert dictionary["data_types"]["grad_accum_dtype"] == "fp32"
    assert size == 1 or dictionary["communication_data_type"] == "fp32"
    assert dictionary["bf16"]["enabled"] == (dtype == torch.bfloat16)


def test_sizes_and_nodes_are_resolved(run_config: RunConfig) -> None:
    """Null is replaced by bucket sizes and the ranks of a node; on one node there is no second copy."""
    null = {"stage": 3, "reduce_bucket_size": None, "zero_hpz_partition_size": None}
    config = replace(run_config, engine={"zero_optimization": null})
    for size, on_node, expected in ((8, 4, 4), (4, 4, 1), (1, 0, 1)):
        world = World(0, 0, size, torch.device("cpu"), torch.float32, None, on_node)
        zero_options = engine_dictionary(config, world, **SIZE)["zero_optimization"]
        assert zero_options["zero_hpz_partition_size"] == expected
        assert zero_options["reduce_bucket_size"] == SIZE["num_trained"]
        assert zero_options["stage3_prefetch_bucket_size"] == SIZE["num_parameters"]
    for size, on_node, named in ((8, 0, "launcher does not say"), (8, 3, "8 ranks are not a multiple of 3")):
        world = World(0, 0, size, torch.device("cpu"), torch.float32, None, on_node)
        with pytest.raises(ConfigError, match=named):
            engine_dictionary(config, world, **SIZE)


def test_received_parameters_are_allocated_on_the_device(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """At ZeRO-3 the ranks that have no weights allocate none on the host to copy them to their device."""
    on_main, on_other = start_ranks(2).run(communication_cases.materialized_on, replace(run_config, engine=zero(3)))
    assert on_main == set()
    assert on_other == {"cpu:0"}


@pytest.mark.parametrize("clip_norm", [0.5, None])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_clips_where_the_step_guard_does_not(
    run_config: RunConfig, stage: int, clip_norm: float | None
) -> None:
    """Gradients are clipped once: by the guard at ZeRO 0, by DeepSpeed at other stages; 0 means no clipping."""
    config = with_stage(replace(run_config, engine=zero(stage)), clip_norm=clip_norm)
    world = World(0, 0, 2, torch.device("cpu"), torch.float32, None)
    assert engine_dictionary(config, world, **SIZE)["gradient_clipping"] == (0.0 if stage == 0 else clip_norm or 0.0)
