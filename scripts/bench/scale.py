"""How far it carries: 64 to 4,096 ranks, 1 to 100 million samples; what breaks first.

    python scripts/bench/scale.py [--quick]

Measured here, with the code that every rank runs: the order of an epoch (data_recipes/mixture/order.py) by number of
samples, in seconds and memory; the deal of one step (train/data/packing.py) by number of ranks. Planned (train/plan):
step time, memory and communication of Vicuna-7B's stage 2 on H100 nodes, ZeRO-3, with the published batch of 128 and
with four samples a rank. Lengths are the published mixture's. Every rank deals every step, on its own processor, beside
the step.

Owns the limits beyond which something counts as broken.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from job import MemoryMark
from results import RESULTS, machine_facts, save, table

from data_recipes.mixture import order
from train.config.compose import load
from train.config.schema import CONFIG_DIR, RunConfig
from train.data.length_table import ROW
from train.data.packing import assign_rows
from train.plan.estimate import StagePlanner
from train.plan.hardware import Hardware, check_hardware
from train.plan.model_facts import ModelFacts, model_facts, read_architecture
from train.plan.sample_lengths import Population, population_of
from train.plan.setting import setting_of

RANKS = (64, 256, 1024, 4096)
SAMPLES = (1_000_000, 10_000_000, 100_000_000)
PUBLISHED_BATCH = 128
LEAST_BALANCE = 0.90
MOST_COMMUNICATION = 0.30
MOST_HOST_SHARE = 0.10
"""Of a node's memory, for the orders that its ranks hold; of a step's time, for planning it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    options = _options(arguments)
    hardware = check_hardware(yaml.safe_load((CONFIG_DIR / "hardware" / "h100_80g.yaml").read_text(encoding="utf-8")))
    config = load(
        ["mixture=llava_next_779k", "engine=zero3", "recompute=[language_model]", "name=scale"], folders=False
    )
    architecture = read_architecture(config.model)
    facts, population = model_facts(architecture, config), population_of(config, architecture, num_samples=SAMPLES[0])
    orders = [measure_order(count, hardware) for count in (SAMPLES[:2] if options.quick else SAMPLES)]
    print(_table(orders, ORDER_COLUMNS), end="\n\n", flush=True)
    scales = []
    for num_ranks in RANKS[:2] if options.quick else RANKS:
        for batch in (PUBLISHED_BATCH, 4 * num_ranks):
            scales.append(measure_ranks(config, facts, population, hardware, num_ranks, batch))
    print(_table(scales, SCALE_COLUMNS))
    for line in broken(orders, scales):
        print(line)
    command = ["python", "scripts/bench/scale.py", *(arguments if arguments is not None else sys.argv[1:])]
    results = {"orders": orders, "scales": scales, "broken": list(broken(orders, scales))}
    save("scale", command, machine_facts(), results, options.out)
    return 0


def measure_order(num_samples: int, hardware: Hardware) -> dict[str, Any]:
    """The permutation of one epoch, as each rank makes it, and what it and the length table weigh."""
    order._permutation.cache_clear()
    mark, started = MemoryMark("cpu"), time.process_time()
    order.samples_of_step(0, num_samples, PUBLISHED_BATCH, 0, 1.0)
    seconds, peak = time.process_time() - started, mark.peak_gib()
    order._permutation.cache_clear()
    held = 8 * num_samples / 2**30
    return {
        "samples": num_samples,
        "order_s": seconds,
        "order_peak_gib": peak,
        "order_held_gib": held,
        "of_a_node": peak * hardware.gpus_per_node / hardware.host_memory_gib,
        "table_gib": ROW.itemsize * num_samples / 2**30,
    }


def measure_ranks(
    config: RunConfig, facts: ModelFacts, population: Population, hardware: Hardware, num_ranks: int, batch: int
) -> dict[str, Any]:
    """One step's deal on that many ranks, and the plan of such a run."""
    config = replace(config, stage=replace(config.stage, batch_size=batch))
    numbers = order.samples_of_step(0, len(population.tokens), batch, 0, max(1.0, batch / len(population.tokens)))
    seconds = []
    for shift in range(3):
        chosen = (numbers + 7919 * shift) % len(population.tokens)
        tokens, tiles, supervised = (
            values[chosen] for values in (population.tokens, population.tiles, population.supervised)
        )
        started = time.process_time()
        costs = facts.costs.of(tokens, tiles, supervised)
        assign_rows(tokens, tiles, costs, num_ranks=num_ranks, budgets=config.packing)
        seconds.append(time.process_time() - started)
    planner = StagePlanner(config, facts, population, hardware)
    estimate = planner.estimate(setting_of(config, num_ranks // hardware.gpus_per_node))
    return {
        "ranks": num_ranks,
        "batch": batch,
        "deal_s": float(np.median(seconds)),
        "step_s": estimate.time.total,
        "deal_of_step": float(np.median(seconds)) / estimate.time.total,
        "balance": estimate.time.balance,
        "idle": max(0.0, 1 - batch / num_ranks),
        "communication": estimate.time.kinds["communication"] / estimate.time.total,
        "samples_per_s": estimate.time.samples_per_s,
        "mfu": estimate.time.mfu,
        "memory_gib": estimate.memory.total / 2**30,
        "host_gib_a_node": estimate.memory.host * hardware.gpus_per_node / 2**30,
    }


def broken(orders: Sequence[dict[str, Any]], scales: Sequence[dict[str, Any]]) -> list[str]:
    """What leaves its limit first, in words, in the order of ranks and samples."""
    lines = []
    for name, batch_of in (("a batch of 128", lambda n: PUBLISHED_BATCH), ("four samples a rank", lambda n: 4 * n)):
        rows = [row for row in scales if row["batch"] == batch_of(row["ranks"])]
        limits = (
            ("balance", lambda row: row["balance"] < LEAST_BALANCE, lambda row: f"balance {row['balance']:.2f}"),
            (
                "communication",
                lambda row: row["communication"] > MOST_COMMUNICATION,
                lambda row: f"communication {row['communication']:.0%} of a step",
            ),
            (
                "deal",
                lambda row: row["deal_of_step"] > MOST_HOST_SHARE,
                lambda row: f"planning takes {row['deal_of_step']:.0%} of a step's time",
            ),
        )
        said = []
        for _, is_broken, words in limits:
            first = next((row for row in rows if is_broken(row)), None)
            if first:
                said.append((first["ranks"], f"{words(first)} at {first['ranks']} ranks"))
        lines.append(f"{name}: " + ("; ".join(text for _, text in sorted(said)) or "nothing breaks up to here"))
    first = next((row for row in orders if row["of_a_node"] > MOST_HOST_SHARE), None)
    last = orders[-1]
    lines.append(
        f"samples: making the order takes {(first or last)['of_a_node']:.1%} of a node's memory at "
        f"{(first or last)['samples']:,}" + ("" if first else ", below its limit")
    )
    return lines


ORDER_COLUMNS = (
    ("samples", "samples", ",d"),
    ("order_s", "order s", ".1f"),
    ("order_peak_gib", "peak GiB a rank", ".2f"),
    ("order_held_gib", "held GiB a rank", ".2f"),
    ("of_a_node", "of a node of 8", ".2%"),
    ("table_gib", "length table GiB", ".2f"),
)
SCALE_COLUMNS = (
    ("ranks", "ranks", ",d"),
    ("batch", "batch", ",d"),
    ("deal_s", "deal s", ".3f"),
    ("step_s", "step s", ".2f"),
    ("balance", "balance", ".3f"),
    ("communication", "communication", ".0%"),
    ("samples_per_s", "samples/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
    ("memory_gib", "GiB a rank", ".1f"),
)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    cells = [[format(row[key], form) for key, _, form in columns] for row in rows]
    return table([title for _, title, _ in columns], cells)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller half of it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
