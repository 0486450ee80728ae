"""Owns the proofs about dealing a step's samples into rows: nothing lost, nothing twice, budgets kept."""

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
    """Any length that a row holds; those at the edges of what two or one fit are drawn more often than by chance."""
    edges = [least, least + 1, budget // 3, budget // 2, budget // 2 + 1, budget - 1, budget]
    return st.one_of(st.integers(least, budget), st.sampled_from(edges))


samples = st.lists(
    st.tuples(lengths(BUDGETS.max_tokens, least=1), lengths(BUDGETS.max_tiles, least=0)), min_size=1, max_size=60
)


def dealt(pairs: list[tuple[int, int]], num_ranks: int, budgets: PackingConfig = BUDGETS) -> RowAssignment:
    """The deal of samples given as (tokens, tiles)."""
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    return assign_rows(tokens, tiles, COSTS.of(tokens, tiles, 0 * tokens), num_ranks=num_ranks, budgets=budgets)


@settings(deadline=None, max_examples=200)
@given(pairs=samples, num_ranks=st.integers(1, 9))
def test_deal_holds_every_sample_once_within_budgets(pairs: list[tuple[int, int]], num_ranks: int) -> None:
    """Any lengths, any number of ranks: every sample in one row, no row over a budget, one row for each rank in each
    micro-step, in the fewest micro-steps that the sums allow at best; and the figure of balance is a share."""
    result = dealt(pairs, num_ranks)
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
def test_deal_is_a_function_of_its_arguments(pairs: list[tuple[int, int]], num_ranks: int) -> None:
    """Ranks never talk about the deal, so each must come to the same one; and it leaves the table as it was."""
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    for values in (tokens, tiles):
        values.flags.writeable = False
    first, second = (
        assign_rows(tokens, tiles, COSTS.of(tokens, tiles, 0 * tokens), num_ranks=num_ranks, budgets=BUDGETS)
        for _ in range(2)
    )
    assert first == second


def drawn_deal() -> RowAssignment:
    """The deal of 300 samples drawn with a fixed seed."""
    pairs = np.random.default_rng(1).integers([1, 0], [4097, 13], size=(300, 2))
    return dealt([(int(tokens), int(tiles)) for tokens, tiles in pairs], 7)


@pytest.mark.full
def test_deal_is_the_same_in_every_process() -> None:
    """Nor does it hang on what differs between processes, as the order of a set of strings does."""
    told = subprocess.run(
        [sys.executable, "-c", "from tests.train.data.test_packing import drawn_deal; print(drawn_deal())"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told == f"{drawn_deal()}\n"


def test_fewer_samples_than_ranks_leave_empty_rows() -> None:
    """A rank that has nothing left still has a row, an empty one."""
    result = dealt([(100, 1), (200, 5)], num_ranks=4)
    assert sorted(map(len, result.rows[0])) == [0, 0, 1, 1]
    assert result.num_micro_steps == 1


def test_one_rank_takes_everything() -> None:
    """One rank is always in balance."""
    assert dealt([(4096, 0), (4096, 12), (1, 12)], num_ranks=1).balance == 1.0


def test_equal_samples_are_in_balance() -> None:
    """As many equal samples for each rank: the figure is exactly 1."""
    result = dealt([(512, 3)] * 16, num_ranks=4)
    assert result.balance == pytest.approx(1.0)
    assert [[len(row) for row in micro_step] for micro_step in result.rows] == [[4] * 4]


def test_balance_is_mean_over_maximum() -> None:
    """Two ranks with costs 3 and 1 are at (3 + 1) / 2 / 3."""
    result = assign_rows(np.array([300, 100]), np.array([0, 0]), np.array([3.0, 1.0]), num_ranks=2, budgets=BUDGETS)
    assert result.balance == pytest.approx(2 / 3)


def test_real_lengths_are_balanced() -> None:
    """On lengths spread as in a real mixture, 128 samples over 8 ranks cost each nearly the same."""
    generator = np.random.default_rng(0)
    tiles = generator.choice([0, 1, 3, 5], size=128, p=[0.1, 0.3, 0.3, 0.3])
    tokens = (generator.lognormal(5.0, 0.8, size=128) + 576 * tiles).astype(np.int64).clip(1, 4096)
    costs = StepCosts(tile=400.0 * 576, token=400.0, pair=0.02).of(tokens, tiles, 0 * tokens)
    budgets = PackingConfig(max_tokens=16_384, max_tiles=48)
    assert assign_rows(tokens, tiles, costs, num_ranks=8, budgets=budgets).balance > 0.95


@pytest.mark.parametrize(("pair", "named"), [((4097, 0), "max_tokens=4096"), ((10, 13), "max_tiles=12")])
def test_sample_over_budget_names_the_budget(pair: tuple[int, int], named: str) -> None:
    """A sample that fits no row is an error with its number, the key and the way out, and never an endless loop."""
    with pytest.raises(PackingError, match=rf"{max(pair)} .*packing\.{named}; raise it"):
        dealt([(5, 1), pair], num_ranks=2)


def test_full_rows_take_another_micro_step() -> None:
    """Where the least number of micro-steps does not hold all samples, one more does."""
    # The sums fit two rows (1.5 budgets), but three samples of half a budget and one token more fit one a row.
    result = dealt([(2049, 0)] * 3, num_ranks=1)
    assert result.num_micro_steps == 3
