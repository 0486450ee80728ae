"""How evenly a step's work lies on the ranks: mean over maximum cost per micro-step.

    python scripts/bench/balance.py [--steps 200]

Lengths are drawn as the published 779K mixture is thought to have them (data_recipes/schema/published_mixture.py), cut
at 4,096 tokens; costs are those of CLIP ViT-L/14-336 and Vicuna-7B, every part trained. Ours is
`train.data.packing.deal`; beside it stand longest-processing-time alone, and what a stock trainer does: random batches
of four, padded to their longest. No clock decides anything here: the numbers are the same on every machine.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from results import machine_facts, save, table
from transformers import CLIPVisionConfig, LlamaConfig

from data_recipes.mixture.order import samples_of_step
from data_recipes.schema.published_mixture import draw_shapes
from llava_next.config import AUTHORS_GRIDS
from llava_next.inputs.anyres import image_layout
from llava_next.model.flops import StepCosts, step_costs
from train.config.schema import PackingConfig
from train.data import packing

Array = npt.NDArray[np.int64]
NUM_SAMPLES = 779_278
MAX_LENGTH = 4096
BATCH_SIZE = 128
GOALS = {8: 0.99, 32: 0.98, 64: 0.95}


def published_lengths() -> tuple[Array, Array]:
    """Tokens and tiles of every sample of the mixture, int64 [num_samples] each."""
    shapes = draw_shapes(NUM_SAMPLES)
    sizes, which = np.unique(shapes.sizes_hw, axis=0, return_inverse=True)
    counts = np.zeros((len(sizes), 2), dtype=np.int64)
    for number, (height, width) in enumerate(sizes.tolist()):
        if height:
            layout = image_layout((height, width), mode="anyres", grids=AUTHORS_GRIDS, tile=336, patches_per_side=24)
            counts[number] = layout.num_tokens, layout.num_tiles
    tokens = shapes.text_tokens + counts[which.ravel(), 0]
    return np.minimum(tokens, MAX_LENGTH), counts[which.ravel(), 1]


def costs_of_7b() -> StepCosts:
    """CLIP ViT-L/14-336 cut at its last layer but one, and a language model of Vicuna-7B's shape."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    return step_costs(
        vision,
        LlamaConfig(),
        projector="mlp2x_gelu",
        num_vision_layers=23,
        trains_tower=True,
        trains_language_model=True,
    )


def padded_balance(tokens: Array, tiles: Array, num_ranks: int, costs: StepCosts) -> float:
    """Batches of four in the order in which they come, each padded to its longest sample."""
    per_rank = min(4, len(tokens) // num_ranks)
    num_whole = len(tokens) // (num_ranks * per_rank) * num_ranks * per_rank
    batches = tokens[:num_whole].reshape(-1, num_ranks, per_rank)
    longest = batches.max(axis=2)
    ran = per_rank * (longest * (costs.token + costs.target) + longest.astype(np.float64) ** 2 / 2 * costs.pair)
    ran += tiles[:num_whole].reshape(batches.shape).sum(axis=2) * costs.tile
    return float(ran.mean(axis=1).sum() / ran.max(axis=1).sum())


def measure(
    deal: Callable[[Array, Array, int], float], num_ranks: int, lengths: tuple[Array, Array], steps: int
) -> float:
    """Mean over the steps' balance."""
    values = []
    for step in range(steps):
        numbers = samples_of_step(step, NUM_SAMPLES, BATCH_SIZE, seed=0, epochs=1.0)
        values.append(deal(lengths[0][numbers], lengths[1][numbers], num_ranks))
    return float(np.mean(values))


def main() -> int:
    """The program; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of a row")
    args = parser.parse_args()
    lengths, costs = published_lengths(), costs_of_7b()
    budgets = PackingConfig(max_tokens=args.max_tokens, max_tiles=args.max_tokens // 256)

    def ours(tokens: Array, tiles: Array, num_ranks: int) -> float:
        # How many tokens of a sample are supervised is not published: as if all were.
        return packing.assign_rows(
            tokens, tiles, costs.of(tokens, tiles, tokens), num_ranks=num_ranks, budgets=budgets
        ).balance

    def longest_first(tokens: Array, tiles: Array, num_ranks: int) -> float:
        before, packing.EVEN_ENOUGH = packing.EVEN_ENOUGH, 0.0  # nothing is uneven: no exchange
        try:
            return ours(tokens, tiles, num_ranks)
        finally:
            packing.EVEN_ENOUGH = before

    found: dict[str, dict[str, float]] = {}
    lines = []
    for num_ranks in (8, 16, 32, 64):
        values = {
            "ours": measure(ours, num_ranks, lengths, args.steps),
            "longest_first": measure(longest_first, num_ranks, lengths, args.steps),
            "padded": measure(lambda t, i, n: padded_balance(t, i, n, costs), num_ranks, lengths, args.steps),
        }
        found[str(num_ranks)] = values
        lines.append([str(num_ranks), *(f"{value:.4f}" for value in values.values()), str(GOALS.get(num_ranks, ""))])
    print(table(["ranks", "ours", "longest first alone", "padded batches of 4", "goal"], lines))
    results = {
        "batch_size": BATCH_SIZE,
        "max_tokens": args.max_tokens,
        "steps": args.steps,
        "balance": found,
        "goals": GOALS,
    }
    save("balance", ["python", "scripts/bench/balance.py", *sys.argv[1:]], machine_facts(), results)
    return 0 if all(found[str(ranks)]["ours"] >= goal for ranks, goal in GOALS.items()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
