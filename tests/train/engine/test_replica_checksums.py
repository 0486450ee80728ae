"""Ranks that differ at the start do not train: another value of a tensor, another view of the shared folder or another
result of the start ends the run on every rank, and the message names the rank.
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
def test_one_flipped_bit_changes_a_checksum(dtype: torch.dtype) -> None:
    """Of any value of any data type; equal tensors have equal checksums, whatever their memory layout."""
    numbers = torch.arange(60).reshape(5, 12).to(dtype)
    [expected] = tensor_sums([numbers]).tolist()
    assert tensor_sums([numbers.t().contiguous().t()]).tolist() == [expected]
    for index in (0, 29, 59):
        for bit in (0, 7):
            changed = numbers.clone()
            changed.view(-1).view(torch.uint8)[index * numbers.element_size()] ^= 1 << bit
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
    """Every rank reports one changed value of a tensor of rank 1 (no name: of a module that ZeRO-3 has gathered)."""
    config = replace(run_config, engine=zero(stage))
    messages = start_ranks(2).run(replica_cases.start_with_a_changed_tensor, config, 1, name)
    assert messages[0] == messages[1]
    assert "rank(s) 1 hold other values" in messages[0]
    assert (name or "hf.") in messages[0]


@pytest.mark.full
def test_a_lagging_folder_is_waited_for(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Rank 1 sees the newest checkpoint a second after rank 0: both resume from it, and it is not marked as damaged. If
    rank 1 never sees it, both stop with its name."""
    ranks = start_ranks(2)
    whole = ranks.run(cases.train, replace(run_config, name="whole"))[0]
    ranks.run(cases.train_up_to, run_config, 1)
    ranks.run(cases.train_up_to_and_see, run_config, 2)
    folder = run_config.run_dir / "checkpoints"
    names = sorted(checkpoint.name for checkpoint in folder.iterdir())
    assert names == ["step_000001", "step_000002"]
    messages = ranks.run(replica_cases.resume_where_a_folder_lags, run_config, 1, names[-1], 3600.0, 1.0)
    assert messages[0] == messages[1]
    assert "not on rank 1" in messages[0]
    assert names[-1] in messages[0]
    assert sorted(checkpoint.name for checkpoint in folder.iterdir()) == names
    started = time.monotonic()
    resumed = ranks.run(replica_cases.resume_where_a_folder_lags, run_config, 1, names[-1], 1.0, 60.0)
    assert time.monotonic() - started > 1
    assert [record.first_step for record in resumed] == [2, 2]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed[0].after[name], weight, err_msg=name)
    assert not list(folder.glob("*.damaged"))


def test_different_starts_stop_every_rank(start_ranks: StartRanks) -> None:
    """The message has both values and the ranks that differ from rank 0."""
    messages = start_ranks(2).run(replica_cases.compare_unlike_starts, {0: 4, 1: 8})
    assert messages[0] == messages[1]
    assert "first step: rank(s) 1 have 8, rank 0 has 4" in messages[0]


def test_rank_0_reads_for_all(start_ranks: StartRanks) -> None:
    """Every rank gets its value, or raises its error."""
    assert start_ranks(2).run(replica_cases.unlike_errors) == [(0, "of rank 0")] * 2
