"""Owns the proof that ranks which differ at the start do not train: another value of a tensor, another view of the
shared folder, or another outcome of the start ends the run on every rank, with the rank's name.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train import cases, replica_cases
from tests.train.cases import zero
from tests.train.conftest import StartRanks
from train.config.schema import RunConfig
from train.engine.replica_checksums import tensor_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_a_sum_sees_one_flipped_bit(dtype: torch.dtype) -> None:
    """Of any value of any type; and equal tensors have equal sums, whatever their layout."""
    numbers = torch.arange(60).reshape(5, 12).to(dtype)
    [expected] = tensor_sums([numbers]).tolist()
    assert tensor_sums([numbers.t().contiguous().t()]).tolist() == [expected]
    for place in (0, 29, 59):
        for bit in (0, 7):
            changed = numbers.clone()
            changed.view(-1).view(torch.uint8)[place * numbers.element_size()] ^= 1 << bit
            assert tensor_sums([changed]).tolist() != [expected]


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (2, "hf.model.multi_modal_projector.linear_1.weight"),
        (2, "tile_scale"),
        (3, "tile_scale"),
        (3, ""),
        *(pytest.param(stage, "hf.lm_head.weight", marks=pytest.mark.full) for stage in (0, 1)),
    ],
)
def test_a_changed_tensor_stops_the_start(
    start_ranks: StartRanks, run_config: RunConfig, stage: int, name: str
) -> None:
    """One value of one tensor of rank 1 (without a name: of a module that ZeRO-3 has gathered): every rank says so."""
    config = replace(run_config, engine=zero(stage))
    told = start_ranks(2).run(replica_cases.start_with_a_changed_tensor, config, 1, name)
    assert told[0] == told[1]
    assert "rank(s) 1 hold other values" in told[0]
    assert (name or "hf.") in told[0]


def test_a_lagging_folder_is_waited_for(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Rank 1 sees the newest checkpoint a second after rank 0 does: both go on from it, and it is not called damaged.
    Where it never sees it, both stop with its name."""
    ranks = start_ranks(2)
    whole = ranks.run(cases.train, replace(run_config, name="whole"))[0]
    ranks.run(cases.train_up_to, run_config, 1)
    ranks.run(cases.train_up_to_and_see, run_config, 2)
    folder = run_config.run_dir / "checkpoints"
    names = sorted(place.name for place in folder.iterdir())
    assert names == ["step_000001", "step_000002"]
    told = ranks.run(replica_cases.resume_where_a_folder_lags, run_config, 1, names[-1], 3600.0, 1.0)
    assert told[0] == told[1]
    assert "not on rank 1" in told[0]
    assert names[-1] in told[0]
    assert sorted(place.name for place in folder.iterdir()) == names
    started = time.monotonic()
    resumed = ranks.run(replica_cases.resume_where_a_folder_lags, run_config, 1, names[-1], 1.0, 60.0)
    assert time.monotonic() - started > 1
    assert [record.first_step for record in resumed] == [2, 2]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed[0].after[name], weight, err_msg=name)
    assert not list(folder.glob("*.damaged"))


def test_unlike_starts_stop_every_rank(start_ranks: StartRanks) -> None:
    """With both values, and the ranks that differ from rank 0."""
    told = start_ranks(2).run(replica_cases.compare_unlike_starts, {0: 4, 1: 8})
    assert told[0] == told[1]
    assert "first step: rank(s) 1 have 8, rank 0 has 4" in told[0]


def test_rank_0_reads_for_all(start_ranks: StartRanks) -> None:
    """Its value, and its error, are every rank's."""
    assert start_ranks(2).run(replica_cases.unlike_errors) == [(0, "of rank 0")] * 2
