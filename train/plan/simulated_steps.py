"""Packs some steps of a run exactly as the run does, and sums the lengths of each row.

Memory and time are computed from these sums: tokens, FLOPs of attention, tiles and supervised tokens.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_recipes.mixture.order import samples_of_step
from llava_next.model.flops import StepCosts
from train.config.schema import PackingConfig
from train.data.packing import assign_rows
from train.plan.memory import Row
from train.plan.sample_lengths import Population

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        sums: tokens, FLOPs of attention, tiles and supervised tokens of each row, float64
            [num_micro_steps, num_ranks, 4].
        samples: number of samples in each row, int64 [num_micro_steps, num_ranks].
    """

    sums: Sums
    samples: npt.NDArray[np.int64]


def draw_steps(
    population: Population,
    packing: PackingConfig,
    costs: StepCosts,
    *,
    num_ranks: int,
    batch_size: int,
    seed: int,
    count: int,
) -> list[StepRows]:
    """Packs `count` steps that are evenly spread over a pass through the population.

    Raises:
        PackingError: a sample exceeds a budget.
    """
    total = len(population.tokens)
    epochs = max(1.0, batch_size * count / total)
    num_full = max(1, int(total * epochs) // batch_size)  # the last step of a run may be smaller
    steps = np.unique(np.linspace(0, num_full - 1, count).astype(int))
    drawn = []
    for step in steps.tolist():
        numbers = samples_of_step(step, total, batch_size, seed, epochs)
        tokens, tiles, supervised = (
            values[numbers] for values in (population.tokens, population.tiles, population.supervised)
        )
        assignment = assign_rows(
            tokens, tiles, costs.flops(tokens, tiles, supervised), num_ranks=num_ranks, budgets=packing
        )
        values = np.stack([tokens, costs.attention(tokens), tiles, supervised], axis=1).astype(np.float64)
        sums = np.array([[values[list(row)].sum(axis=0) for row in micro_step] for micro_step in assignment.rows])
        drawn.append(StepRows(sums, np.array([[len(row) for row in micro_step] for micro_step in assignment.rows])))
    return drawn


def largest_drawn_row(steps: list[StepRows]) -> Row:
    """Returns the largest numbers of tokens, tiles and supervised tokens in a row of these steps."""
    tokens, _, tiles, supervised = np.concatenate([step.sums.reshape(-1, 4) for step in steps]).max(axis=0)
    return Row(int(tokens), max(1, int(tiles)), int(supervised))  # a row without images runs one blank tile


def largest_row(steps: list[StepRows], population: Population, packing: PackingConfig) -> Row:
    """Estimates the largest row of the run: 10 % above the drawn steps, within the budgets, and at least any sample."""
    drawn = largest_drawn_row(steps)
    tokens = min(packing.max_tokens, max(int(1.1 * drawn.tokens), int(population.tokens.max())))
    tiles = min(packing.max_tiles, max(int(np.ceil(1.1 * drawn.tiles)), int(population.tiles.max())))
    return Row(tokens, tiles, min(tokens, max(int(1.1 * drawn.supervised), int(population.supervised.max()))))
