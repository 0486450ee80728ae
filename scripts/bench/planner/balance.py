"""How evenly the work of a step is divided among ranks: mean over maximum cost per micro-step.

    python scripts/bench/plan.py balance [--steps 200]

Lengths are those of the published 779K mixture, costs those of stage 2 of Vicuna-7B with CLIP ViT-L/14-336, every part
trained. `train.data.packing.assign_rows` is compared with longest-processing-time alone, and with a stock trainer:
random batches of four, padded to their longest sample. Nothing is timed: the numbers are the same on every machine.
Results: scripts/bench/results/balance.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from measuring.result_files import RESULTS, save, table

from data_recipes.mixture.order import samples_of_step
from data_recipes.schema.arguments import ArgumentParser
from llava_next.model.flops import StepCosts
from train.config.compose import load
from train.config.schema import PackingConfig
from train.data import packing
from train.plan.model_facts import count_model, read_architecture
from train.plan.sample_lengths import Population, load_population

Array = npt.NDArray[np.int64]
BATCH_SIZE = 128
RANKS = (8, 16, 32, 64)
GOALS = {8: 0.99, 32: 0.98, 64: 0.95}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns 1 if a goal is missed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    config = load(["mixture=llava_next_779k", "name=balance"], folders=False)
    architecture = read_architecture(config.model)
    costs, population = (
        count_model(architecture, config).costs,
        load_population(config, architecture, num_samples=779_278),
    )
    budgets = PackingConfig(max_tokens=options.max_tokens, max_tiles=options.max_tokens // 256)

    def ours(tokens: Array, tiles: Array, num_ranks: int) -> float:
        # The number of supervised tokens is not published for each sample: all tokens are counted.
        sample_costs = costs.flops(tokens, tiles, tokens)
        return packing.assign_rows(tokens, tiles, sample_costs, num_ranks=num_ranks, budgets=budgets).balance

    def longest_first(tokens: Array, tiles: Array, num_ranks: int) -> float:
        before, packing.TARGET_BALANCE = packing.TARGET_BALANCE, 0.0  # never uneven, so no exchange follows
        try:
            return ours(tokens, tiles, num_ranks)
        finally:
            packing.TARGET_BALANCE = before

    def padded(tokens: Array, tiles: Array, num_ranks: int) -> float:
        return padded_balance(tokens, tiles, num_ranks, costs)

    methods = {"ours": ours, "longest_first": longest_first, "padded": padded}
    balance = {
        str(ranks): {name: _mean_balance(method, ranks, population, options.steps) for name, method in methods.items()}
        for ranks in RANKS
    }
    rows = [
        [ranks, *(f"{value:.4f}" for value in values.values()), str(GOALS.get(int(ranks), ""))]
        for ranks, values in balance.items()
    ]
    print(table(["ranks", "ours", "longest first alone", "padded batches of 4", "goal"], rows))
    results = {"batch_size": BATCH_SIZE, "max_tokens": options.max_tokens, "steps": options.steps}
    save("balance", "plan.py balance", words, {**results, "balance": balance, "goals": GOALS}, options.out)
    return 0 if all(balance[str(ranks)]["ours"] >= goal for ranks, goal in GOALS.items()) else 1


def padded_balance(tokens: Array, tiles: Array, num_ranks: int, costs: StepCosts) -> float:
    """Balance of batches of four in the given order, each padded to its longest sample."""
    per_rank = min(4, len(tokens) // num_ranks)
    num_whole = len(tokens) // (num_ranks * per_rank) * num_ranks * per_rank
    batches = tokens[:num_whole].reshape(-1, num_ranks, per_rank)
    longest = batches.max(axis=2)
    cost = per_rank * (longest * (costs.token + costs.target) + costs.attention(longest))
    cost += tiles[:num_whole].reshape(batches.shape).sum(axis=2) * costs.tile
    return float(cost.mean(axis=1).sum() / cost.max(axis=1).sum())


def _mean_balance(
    method: Callable[[Array, Array, int], float], num_ranks: int, population: Population, num_steps: int
) -> float:
    num_samples, values = len(population.tokens), []
    for step in range(num_steps):
        numbers = samples_of_step(step, num_samples, BATCH_SIZE, 0, num_steps * BATCH_SIZE / num_samples)
        values.append(method(population.tokens[numbers], population.tiles[numbers], num_ranks))
    return float(np.mean(values))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("plan.py balance", description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of a row (default 16384)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)
