"""What is derived of DeepSpeed's dictionary."""

from dataclasses import replace

import pytest
import torch

from tests.train.cases import with_stage, zero
from train.config.schema import RunConfig
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


@pytest.mark.parametrize("clip_norm", [0.5, None])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_clips_where_the_step_guard_does_not(
    run_config: RunConfig, stage: int, clip_norm: float | None
) -> None:
    """Gradients are clipped once: by the guard at ZeRO 0, by DeepSpeed at other stages; 0 means no clipping."""
    config = with_stage(replace(run_config, engine=zero(stage)), clip_norm=clip_norm)
    world = World(0, 0, 2, torch.device("cpu"), torch.float32, None)
    assert engine_dictionary(config, world, **SIZE)["gradient_clipping"] == (0.0 if stage == 0 else clip_norm or 0.0)
