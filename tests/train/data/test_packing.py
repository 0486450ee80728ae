"""Tests of the assignment of samples to rows: every sample once, within the budgets, balanced."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_next.model.flops import StepCosts
from train.config.schema import PackingConfig
from train.data.packing import PackingError, RowAssignment, assign_rows

ROOT = Path(__file__).resolve().parents[3]
COSTS = StepCosts(tile=400.0, token=1.0, pair=0.001)
BUDGETS = PackingConfig(max_tokens=4096, max_tiles=12)
Lengths = npt.NDArray[np.int64]


def lengths(budget: int, least: int) -> st.SearchStrategy[int]:
    """Draws lengths that fit a row, with more at the edges of what two or one fit than by chance."""
    edges = [least, least + 1, budget // 3, budget // 2, budget // 2 + 1, budget - 1, budget]
    return st.one_of(st.integers(least, budget), st.sampled_from(edges))


samples = st.lists(
    st.tuples(lengths(BUDGETS.max_tokens, least=1), lengths(BUDGETS.max_tiles, least=0)), min_size=1, max_size=60
)


def assign(pairs: list[tuple[int, int]], num_ranks: int, budgets: PackingConfig = BUDGETS) -> RowAssignment:
    """Assigns samples that are given as (tokens, tiles)."""
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    return assign_rows(tokens, tiles, COSTS.flops(tokens, tiles, 0 * tokens), num_ranks=num_ranks, budgets=budgets)


@settings(deadline=None, max_examples=200)
@given(pairs=samples, num_ranks=st.integers(1, 9))
def test_every_sample_is_in_one_row_within_budgets(pairs: list[tuple[int, int]], num_ranks: int) -> None:
    """For any lengths and ranks: every sample is in one row, no row exceeds a budget, every micro-step has one row per
    rank, the number of micro-steps is at least the minimum that the sums allow, and the balance is a fraction."""
    result = assign(pairs, num_ranks)
    assert [len(micro_step) for micro_step in result.rows] == [num_ranks] * result.num_micro_steps
    rows = [row for micro_step in result.rows for row in micro_step]
    assert sorted(sample for row in rows for sample in row) == list(range(len(pairs)))
    for row in rows:
        assert sum(pairs[sample][0] for sample in row) <= BUDGETS.max_tokens
        assert sum(pairs[sample][1] for sample in row) <= BUDGETS.max_tiles
    assert 1 <= result.num_micro_steps <= len(pairs)
    assert result.num_micro_steps * num_ranks * BUDGETS.max_tokens >= sum(tokens for tokens, _ in pairs)
    assert 1 / num_ranks - 1e-9 <= result.balance <= 1 + 1e-9


@settings(deadline=None, max_examples=50)
@given(pairs=samples, num_ranks=st.integers(1, 9))
def test_assignment_is_a_function_of_its_arguments(pairs: list[tuple[int, int]], num_ranks: int) -> None:
    """The ranks do not communicate about it, so each must compute the same assignment; it does not change its
    inputs."""
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    for values in (tokens, tiles):
        values.flags.writeable = False
    first, second = (
        assign_rows(tokens, tiles, COSTS.flops(tokens, tiles, 0 * tokens), num_ranks=num_ranks, budgets=BUDGETS)
        for _ in range(2)
    )
    assert first == second


def assign_drawn_samples() -> RowAssignment:
    """Returns the assignment of 300 samples drawn with a fixed seed."""
    pairs = np.random.default_rng(1).integers([1, 0], [4097, 13], size=(300, 2))
    return assign([(int(tokens), int(tiles)) for tokens, tiles in pairs], 7)


@pytest.mark.full
def test_assignment_is_the_same_in_every_process() -> None:
    """The assignment does not depend on what differs between processes, such as the order of a set of strings."""
    message = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.train.data.test_packing import assign_drawn_samples; print(assign_drawn_samples())",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert message == f"{assign_drawn_samples()}\n"


def test_fewer_samples_than_ranks_leave_empty_rows() -> None:
    """A rank without samples has an empty row."""
    result = assign([(100, 1), (200, 5)], num_ranks=4)
    assert sorted(map(len, result.rows[0])) == [0, 0, 1, 1]
    assert result.num_micro_steps == 1


def test_one_rank_is_balanced() -> None:
    """One rank is always balanced."""
    assert assign([(4096, 0), (4096, 12), (1, 12)], num_ranks=1).balance == 1.0


def test_equal_samples_are_in_balance() -> None:
    """With the same number of equal samples for each rank, the balance is exactly 1."""
    result = assign([(512, 3)] * 16, num_ranks=4)
    assert result.balance == pytest.approx(1.0)
    assert [[len(row) for row in micro_step] for micro_step in result.rows] == [[4] * 4]


def test_balance_is_mean_over_maximum() -> None:
    """Two ranks with costs 3 and 1 have a balance of (3 + 1) / 2 / 3."""
    result = assign_rows(np.array([300, 100]), np.array([0, 0]), np.array([3.0, 1.0]), num_ranks=2, budgets=BUDGETS)
    assert result.balance == pytest.approx(2 / 3)


def test_ranks_take_turns_at_the_costlier_rows() -> None:
    """Rows that a sample fills cost 9, 7, 5 and 3: two ranks take them in two micro-steps, and each pays 12."""
    full = np.full(4, BUDGETS.max_tokens)
    costs = np.array([9.0, 7.0, 5.0, 3.0])
    result = assign_rows(full, 0 * full, costs, num_ranks=2, budgets=BUDGETS)
    assert result.num_micro_steps == 2
    of_ranks = [[costs[list(micro_step[rank])].sum() for micro_step in result.rows] for rank in (0, 1)]
    assert [sum(of_rank) for of_rank in of_ranks] == [12.0, 12.0]


def test_samples_are_exchanged_after_the_rows_are_filled() -> None:
    """The costs of Graham's example: the longest first gives rows of 11, 8 and 8; exchanges make them 9 each."""
    costs = np.array([5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0])
    tokens = np.full(len(costs), 100)
    result = assign_rows(tokens, 0 * tokens, costs, num_ranks=3, budgets=BUDGETS)
    assert result.balance == pytest.approx(1.0)


def test_real_lengths_are_balanced() -> None:
    """With lengths of a real mixture, 128 samples over 8 ranks have nearly equal costs."""
    generator = np.random.default_rng(0)
    tiles = generator.choice([0, 1, 3, 5], size=128, p=[0.1, 0.3, 0.3, 0.3])
    tokens = (generator.lognormal(5.0, 0.8, size=128) + 576 * tiles).astype(np.int64).clip(1, 4096)
    costs = StepCosts(tile=400.0 * 576, token=400.0, pair=0.02).flops(tokens, tiles, 0 * tokens)
    budgets = PackingConfig(max_tokens=16_384, max_tiles=48)
    assert assign_rows(tokens, tiles, costs, num_ranks=8, budgets=budgets).balance > 0.95


@pytest.mark.parametrize(("pair", "named"), [((4097, 0), "max_tokens=4096"), ((10, 13), "max_tiles=12")])
def test_sample_over_budget_names_the_budget(pair: tuple[int, int], named: str) -> None:
    """A sample that fits no row is an error with its number, the key and the fix."""
    with pytest.raises(PackingError, match=rf"{max(pair)} .*packing\.{named}; raise it"):
        assign([(5, 1), pair], num_ranks=2)


def test_full_rows_take_another_micro_step() -> None:
    """If the minimum number of micro-steps does not fit all samples, one more does."""
    # The sums fit two rows (1.5 budgets), but three samples of half a budget and one token more fit one a row.
    result = assign([(2049, 0)] * 3, num_ranks=1)
    assert result.num_micro_steps == 3
