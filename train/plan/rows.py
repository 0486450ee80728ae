"""Samples → the sums of their rows, dealt exactly as a run deals them, for some of its steps.

Owns `StepRows`: tokens, squared tokens, tiles and answers of every row, which memory and time are computed from.
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
    """One step: `sums` float64 [micro-steps, ranks, 4] are each row's tokens, squared tokens, tiles, supervised tokens.

    `samples` int64 [micro-steps, ranks]: how many share the row.
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
    """`count` steps, evenly spread over a pass through the population. Errors are `packing.deal`'s."""
    total = len(population.tokens)
    epochs = max(1.0, batch_size * count / total)
    whole = max(1, int(total * epochs) // batch_size)  # the last step of a run may be smaller
    steps = np.unique(np.linspace(0, whole - 1, count).astype(int))
    drawn = []
    for step in steps.tolist():
        numbers = samples_of_step(step, total, batch_size, seed, epochs)
        tokens, tiles, supervised = (
            values[numbers] for values in (population.tokens, population.tiles, population.supervised)
        )
        dealt = assign_rows(tokens, tiles, costs.of(tokens, tiles, supervised), num_ranks=num_ranks, budgets=packing)
        values = np.stack([tokens, tokens**2, tiles, supervised], axis=1).astype(np.float64)
        sums = np.array([[values[list(row)].sum(axis=0) for row in micro_step] for micro_step in dealt.rows])
        drawn.append(StepRows(sums, np.array([[len(row) for row in micro_step] for micro_step in dealt.rows])))
    return drawn


def largest_seen(steps: list[StepRows]) -> Row:
    """The most tokens, tiles and answers that a row of these steps has."""
    tokens, _, tiles, supervised = np.concatenate([step.sums.reshape(-1, 4) for step in steps]).max(axis=0)
    return Row(int(tokens), max(1, int(tiles)), int(supervised))  # a row without a picture runs one blank tile


def largest_row(steps: list[StepRows], population: Population, packing: PackingConfig) -> Row:
    """What the largest row of the run may hold: a tenth more than any seen, within the budgets, and any one sample."""
    seen = largest_seen(steps)
    tokens = min(packing.max_tokens, max(int(1.1 * seen.tokens), int(population.tokens.max())))
    tiles = min(packing.max_tiles, max(int(np.ceil(1.1 * seen.tiles)), int(population.tiles.max())))
    return Row(tokens, tiles, min(tokens, max(int(1.1 * seen.supervised), int(population.supervised.max()))))
