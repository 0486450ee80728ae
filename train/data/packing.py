"""The samples of a step → rows for the ranks that exist.

Execution only: nothing here decides what is learned. Every rank computes the same deal from the same integers, so no
message is needed. Rows are balanced by cost in FLOPs (tiles, tokens, attention's square) within the budgets.

Two moves: longest processing time first (Graham, 1969) fills the rows, then the most expensive row exchanges samples
with others as long as that lowers the larger of the two costs. How well that does: `scripts/bench/balance.py`.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from train.config.schema import PackingConfig

EVEN_ENOUGH = 0.995
"""Mean over maximum cost at which exchanging ends: what is left to gain is below half a per cent of a step."""


class PackingError(ValueError):
    """A sample that fits no row; the message names it and the budget."""


@dataclass(frozen=True)
class RowAssignment:
    """`rows[m][r]` are the positions, within the step, of the samples in rank r's row of micro-step m.

    `balance` is mean over maximum cost of the ranks, averaged over micro-steps by their maximum (1 is perfect).
    """

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    balance: float

    @property
    def num_micro_steps(self) -> int:
        return len(self.rows)


def assign_rows(
    tokens: np.ndarray, tiles: np.ndarray, sample_costs: np.ndarray, *, num_ranks: int, budgets: PackingConfig
) -> RowAssignment:
    """Deals a step's samples into the fewest micro-steps that keep both budgets, balanced by cost.

    When a sample finds no row with room, a micro-step more is tried. Deterministic: ties go to the lower number.

    Args:
        tokens, tiles: int [num_samples], of the step's samples.
        sample_costs: float64 [num_samples], what each takes to compute (`StepCosts.of`).
        num_ranks: rows of every micro-step.

    Raises:
        PackingError: a sample alone exceeds a budget.
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
    return _by_micro_step(_rebalance(rows, sizes, budgets), sample_costs, num_ranks)


def _fill(
    order: np.ndarray,
    costs: np.ndarray,
    tokens: np.ndarray,
    tiles: np.ndarray,
    num_rows: int,
    budgets: PackingConfig,
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [(budgets.max_tokens, budgets.max_tiles)] * num_rows
    heap = [(0.0, row) for row in range(num_rows)]
    for sample in order.tolist():
        refused = []
        while heap:
            cost, row = heapq.heappop(heap)
            tokens_left, tiles_left = room[row]
            if tokens[sample] <= tokens_left and tiles[sample] <= tiles_left:
                break
            refused.append((cost, row))
        else:
            return None
        rows[row].append(sample)
        room[row] = (tokens_left - int(tokens[sample]), tiles_left - int(tiles[sample]))
        heapq.heappush(heap, (cost + float(costs[sample]), row))
        for entry in refused:
            heapq.heappush(heap, entry)
    return rows


def _rebalance(rows: list[list[int]], sizes: np.ndarray, budgets: PackingConfig) -> list[list[int]]:
    """The rows after exchanges: of all that lower the cost of the most expensive row and raise no other as far, the
    best, repeated.

    Args:
        sizes: float64 [3, num_samples]: cost, tokens and tiles of each sample.

    A sample may also be given for nothing: every row holds an empty one more, of size 0, which is taken and stays.
    """
    num_samples, num_rows = sizes.shape[1], len(rows)
    sizes = np.concatenate([sizes, np.zeros((3, num_rows))], axis=1)
    row_of = np.concatenate([np.zeros(num_samples, dtype=np.int64), np.arange(num_rows)])
    for number, row in enumerate(rows):
        row_of[row] = number
    loads = np.stack([np.bincount(row_of, size, num_rows) for size in sizes])
    most = np.array([np.inf, budgets.max_tokens, budgets.max_tiles])[:, None, None]
    mean = loads[0].mean()
    while True:
        costliest = int(loads[0].argmax())
        cost = loads[0, costliest]
        if mean >= EVEN_ENOUGH * cost:
            break
        given = np.flatnonzero(row_of[:num_samples] == costliest)
        moved = sizes[:, given, None] - sizes[:, None, :]  # [3, given, taken]: what the exchange moves away
        here, there = loads[:, costliest, None, None] - moved, loads[:, row_of][:, None, :] + moved
        larger_cost = np.maximum(here[0], there[0])
        larger_cost[((here > most) | (there > most)).any(axis=0)] = np.inf
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


def _by_micro_step(rows: list[list[int]], costs: np.ndarray, num_ranks: int) -> RowAssignment:
    """Rows of like cost share a micro-step; within it ranks take turns at the more expensive ones, so that totals even
    out."""
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
