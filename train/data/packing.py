"""Assigns the samples of a step to rows, and the rows to ranks, balanced by cost in FLOPs within the budgets.

The assignment changes nothing that is learned. Every rank computes it from the same integers, without communication.
Rows are filled with the longest processing time first (Graham, 1969). Then the most expensive row exchanges samples
with others while that lowers the larger of the two costs. `scripts/bench/plan.py balance` measures the balance.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from train.config.schema import PackingConfig

TARGET_BALANCE = 0.995
"""Mean over maximum cost at which the exchanges stop: at most 0.5 % of a step could still be gained."""


class PackingError(ValueError):
    """A sample exceeds a budget; the message has both numbers."""


@dataclass(frozen=True)
class RowAssignment:
    """The rows of a step.

    Attributes:
        rows: `rows[m][r]` are the positions, within the step, of the samples in rank r's row of micro-step m.
        balance: mean over maximum cost of the ranks, averaged over the micro-steps weighted by their maximum (1 is
            perfect).
    """

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    balance: float

    @property
    def num_micro_steps(self) -> int:
        return len(self.rows)


def assign_rows(
    tokens: np.ndarray, tiles: np.ndarray, sample_costs: np.ndarray, *, num_ranks: int, budgets: PackingConfig
) -> RowAssignment:
    """Assigns a step's samples to the fewest micro-steps that keep both budgets, balanced by cost.

    If a sample fits into no row, one more micro-step is tried. Ties go to the lower number, so the result is unique.

    Args:
        tokens, tiles: of the step's samples, int [num_samples].
        sample_costs: FLOPs of each sample (`StepCosts.of`), float64 [num_samples].
        num_ranks: number of rows in every micro-step.

    Raises:
        PackingError: one sample exceeds a budget.
    """
    for name, values, budget in (("tokens", tokens, budgets.max_tokens), ("tiles", tiles, budgets.max_tiles)):
        if len(values) and values.max() > budget:
            raise PackingError(
                f"a sample of {values.max()} {name} exceeds packing.max_{name}={budget}; raise it to at least that"
            )
    order = np.lexsort((np.arange(len(tokens)), -sample_costs))
    least = max(
        1,
        -(-int(tokens.sum()) // (num_ranks * budgets.max_tokens)),
        -(-int(tiles.sum()) // (num_ranks * budgets.max_tiles)),
    )
    num_micro_steps = least
    while True:
        rows = _fill(order, sample_costs, tokens, tiles, num_micro_steps * num_ranks, budgets)
        if rows is not None:
            break
        num_micro_steps += 1
    sizes = np.stack([sample_costs, tokens, tiles])
    return _group_by_micro_step(_rebalance(rows, sizes, budgets), sample_costs, num_ranks)


def _fill(
    order: np.ndarray,
    costs: np.ndarray,
    tokens: np.ndarray,
    tiles: np.ndarray,
    num_rows: int,
    budgets: PackingConfig,
) -> list[list[int]] | None:
    """Fills rows, always the cheapest that has space; None if a sample fits into no row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    space = [(budgets.max_tokens, budgets.max_tiles)] * num_rows
    heap = [(0.0, row) for row in range(num_rows)]
    for sample in order.tolist():
        full = []
        while heap:
            cost, row = heapq.heappop(heap)
            tokens_left, tiles_left = space[row]
            if tokens[sample] <= tokens_left and tiles[sample] <= tiles_left:
                break
            full.append((cost, row))
        else:
            return None
        rows[row].append(sample)
        space[row] = (tokens_left - int(tokens[sample]), tiles_left - int(tiles[sample]))
        heapq.heappush(heap, (cost + float(costs[sample]), row))
        for entry in full:
            heapq.heappush(heap, entry)
    return rows


def _rebalance(rows: list[list[int]], sizes: np.ndarray, budgets: PackingConfig) -> list[list[int]]:
    """Exchanges samples of the most expensive row with other rows, the best exchange first, until none helps.

    An exchange helps if both rows cost less than the most expensive row did. Every row also has an empty sample of size
    0, so that an exchange can move a sample without returning one.

    Args:
        sizes: cost, tokens and tiles of each sample, float64 [3, num_samples].
    """
    num_samples, num_rows = sizes.shape[1], len(rows)
    sizes = np.concatenate([sizes, np.zeros((3, num_rows))], axis=1)
    row_of = np.concatenate([np.zeros(num_samples, dtype=np.int64), np.arange(num_rows)])
    for number, row in enumerate(rows):
        row_of[row] = number
    loads = np.stack([np.bincount(row_of, size, num_rows) for size in sizes])
    limits = np.array([np.inf, budgets.max_tokens, budgets.max_tiles])[:, None, None]
    mean = loads[0].mean()
    while True:
        costliest = int(loads[0].argmax())
        cost = loads[0, costliest]
        if mean >= TARGET_BALANCE * cost:
            break
        given = np.flatnonzero(row_of[:num_samples] == costliest)
        moved = sizes[:, given, None] - sizes[:, None, :]  # [3, given, taken]: the size that an exchange moves away
        here, there = loads[:, costliest, None, None] - moved, loads[:, row_of][:, None, :] + moved
        larger_cost = np.maximum(here[0], there[0])
        larger_cost[((here > limits) | (there > limits)).any(axis=0)] = np.inf
        larger_cost[:, row_of == costliest] = np.inf
        best = int(larger_cost.argmin())
        if larger_cost.flat[best] >= cost * (1 - 1e-9):
            break
        left, taken = int(given[best // larger_cost.shape[1]]), best % larger_cost.shape[1]
        other = int(row_of[taken])
        loads[:, costliest] -= sizes[:, left] - sizes[:, taken]
        loads[:, other] += sizes[:, left] - sizes[:, taken]
        row_of[left] = other
        if taken < num_samples:
            row_of[taken] = costliest
    return [np.flatnonzero(row_of[:num_samples] == row).tolist() for row in range(num_rows)]


def _group_by_micro_step(rows: list[list[int]], costs: np.ndarray, num_ranks: int) -> RowAssignment:
    """Groups rows of similar cost into micro-steps, and gives the more expensive rows to the ranks with the least total
    cost so far."""
    row_costs = [float(costs[row].sum()) if row else 0.0 for row in rows]
    by_cost = sorted(range(len(rows)), key=lambda row: (-row_costs[row], row))
    micro_steps, mean_sum, max_sum = [], 0.0, 0.0
    totals = [0.0] * num_ranks
    for start in range(0, len(rows), num_ranks):
        chosen = by_cost[start : start + num_ranks]
        ranks = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        micro_step: list[tuple[int, ...]] = [()] * num_ranks
        for rank, row in zip(ranks, chosen, strict=True):
            micro_step[rank] = tuple(sorted(rows[row]))
            totals[rank] += row_costs[row]
        micro_steps.append(tuple(micro_step))
        mean_sum += sum(row_costs[row] for row in chosen) / num_ranks
        max_sum += max(row_costs[row] for row in chosen)
    return RowAssignment(tuple(micro_steps), mean_sum / max_sum if max_sum else 1.0)
