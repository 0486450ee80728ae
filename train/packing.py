"""The samples of a step → rows for the ranks that exist.

Execution only: nothing here decides what is learned. Every rank computes the same deal from the same integers, so no
message is needed. Rows are balanced by cost in FLOPs (tiles, tokens, attention's square) within the budgets.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from llava_next.costs import StepCosts
from train.config import PackingConfig


class PackingError(ValueError):
    """A sample that fits no row; the message names it and the budget."""


@dataclass(frozen=True)
class Deal:
    """`rows[m][r]` are the positions, within the step, of the samples in rank r's row of micro-step m.

    `balance` is mean over maximum cost of the ranks, averaged over micro-steps by their maximum (1 is perfect).
    """

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    balance: float

    @property
    def num_micro_steps(self) -> int:
        return len(self.rows)


def deal(tokens: np.ndarray, tiles: np.ndarray, *, num_ranks: int, budgets: PackingConfig, costs: StepCosts) -> Deal:
    """Deals a step's samples into the fewest micro-steps that keep both budgets, balanced by cost.

    Longest processing time first: samples by falling cost, each into the cheapest row that has room for it. When one
    finds none, a micro-step more is tried. Deterministic: ties go to the lower number.

    Args:
        tokens, tiles: int [num_samples], of the step's samples.
        num_ranks: rows of every micro-step.

    Raises:
        PackingError: a sample alone exceeds a budget.
    """
    for name, values, budget in (("tokens", tokens, budgets.max_tokens), ("tiles", tiles, budgets.max_tiles)):
        if len(values) and values.max() > budget:
            raise PackingError(
                f"a sample of {values.max()} {name} exceeds packing.max_{name}={budget}; raise it to at least that"
            )
    sample_costs = np.asarray(costs.of(tokens, tiles, tokens.astype(np.float64) ** 2))  # type: ignore[arg-type]
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
    return _by_micro_step(rows, sample_costs, num_ranks)


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


def _by_micro_step(rows: list[list[int]], costs: np.ndarray, num_ranks: int) -> Deal:
    """Rows of like cost share a micro-step; within it ranks take turns at the dearer ones, so that totals even out."""
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
    return Deal(tuple(micro_steps), mean_sum / max_sum if max_sum else 1.0)
