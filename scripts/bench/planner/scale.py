"""Runs of 64 to 4,096 ranks and of 1 to 100 million samples, and which limit is reached first.

    python scripts/bench/plan.py scale [--quick]

Measured, with the code that every rank runs: time and memory of the order of an epoch (data_recipes/mixture/order.py)
by number of samples, and the time of assigning a step's samples to ranks (train/data/packing.py) by number of ranks;
every rank does both on its own processor. Planned (train/plan): step time, memory and communication of stage 2 of
Vicuna-7B on H100 nodes, ZeRO-3, with the published batch of 128 and with four samples per rank. Lengths are those of
the published mixture. Results: scripts/bench/results/scale.json.
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
from measuring.result_files import RESULTS, columns_table, save
from training_step.job import MemoryMark

from data_recipes.mixture import order
from data_recipes.schema.arguments import ArgumentParser
from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.compose import load
from train.config.schema import RunConfig
from train.data.length_table import ROW
from train.data.packing import assign_rows
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware, check_hardware
from train.plan.model_facts import ModelFacts, count_model, read_architecture
from train.plan.sample_lengths import Population, load_population

RANKS = (64, 256, 1024, 4096)
SAMPLES = (1_000_000, 10_000_000, 100_000_000)
PUBLISHED_BATCH = 128
LEAST_BALANCE = 0.90
MOST_COMMUNICATION = 0.30
MOST_HOST_SHARE = 0.10
"""Share of a node's memory for the orders of its ranks; share of a step's time for assigning its samples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    hardware = check_hardware(yaml.safe_load((CONFIG_DIR / "hardware" / "h100_80g.yaml").read_text(encoding="utf-8")))
    config = load(
        ["mixture=llava_next_779k", "engine=zero3", "recompute=[language_model]", "name=scale"], folders=False
    )
    architecture = read_architecture(config.model)
    facts, population = count_model(architecture, config), load_population(config, architecture, num_samples=SAMPLES[0])
    orders = [measure_order(count, hardware) for count in (SAMPLES[:2] if options.quick else SAMPLES)]
    print(
        columns_table(ORDER_COLUMNS, {f"{row['samples']:,}": row for row in orders}, "samples"), end="\n\n", flush=True
    )
    scales = []
    for num_ranks in RANKS[:2] if options.quick else RANKS:
        for batch in (PUBLISHED_BATCH, 4 * num_ranks):
            scales.append(measure_ranks(config, facts, population, hardware, num_ranks, batch))
    print(
        columns_table(SCALE_COLUMNS, {f"{row['ranks']:,} x {row['batch']:,}": row for row in scales}, "ranks x batch")
    )
    limits = exceeded_limits(orders, scales)
    print("\n".join(limits))
    save("scale", "plan.py scale", words, {"orders": orders, "scales": scales, "broken": limits}, options.out)
    return 0


def measure_order(num_samples: int, hardware: Hardware) -> dict[str, Any]:
    """The permutation of one epoch, as each rank makes it: its time and memory, and the memory of the length table."""
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
    """The assignment of one step's samples to so many ranks, and the plan of such a run."""
    config = replace(config, stage=replace(config.stage, batch_size=batch))
    numbers = order.samples_of_step(0, len(population.tokens), batch, 0, max(1.0, batch / len(population.tokens)))
    seconds = []
    for shift in range(3):
        chosen = (numbers + 7919 * shift) % len(population.tokens)
        tokens, tiles, supervised = (
            values[chosen] for values in (population.tokens, population.tiles, population.supervised)
        )
        started = time.process_time()
        costs = facts.costs.flops(tokens, tiles, supervised)
        assign_rows(tokens, tiles, costs, num_ranks=num_ranks, budgets=config.packing)
        seconds.append(time.process_time() - started)
    planner = StagePlanner(config, facts, population, hardware)
    estimate = planner.estimate(read_settings(config, num_ranks // hardware.gpus_per_node))
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


def exceeded_limits(orders: Sequence[dict[str, Any]], scales: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on the first limit that is exceeded, for both kinds of batch and for the number of samples."""
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
        exceeded = []
        for _, is_exceeded, describe in limits:
            first = next((row for row in rows if is_exceeded(row)), None)
            if first:
                exceeded.append((first["ranks"], f"{describe(first)} at {first['ranks']} ranks"))
        lines.append(f"{name}: " + ("; ".join(text for _, text in sorted(exceeded)) or "no limit is exceeded"))
    first = next((row for row in orders if row["of_a_node"] > MOST_HOST_SHARE), None)
    last = orders[-1]
    lines.append(
        f"samples: making the order takes {(first or last)['of_a_node']:.1%} of a node's memory at "
        f"{(first or last)['samples']:,}" + ("" if first else ", below its limit")
    )
    return lines


ORDER_COLUMNS = (
    ("order_s", "order s", ".1f"),
    ("order_peak_gib", "peak GiB a rank", ".2f"),
    ("order_held_gib", "held GiB a rank", ".2f"),
    ("of_a_node", "of a node of 8", ".2%"),
    ("table_gib", "length table GiB", ".2f"),
)
SCALE_COLUMNS = (
    ("deal_s", "deal s", ".3f"),
    ("step_s", "step s", ".2f"),
    ("balance", "balance", ".3f"),
    ("communication", "communication", ".0%"),
    ("samples_per_s", "samples/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
    ("memory_gib", "GiB a rank", ".1f"),
)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("plan.py scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the smaller half of the ranks, without the largest number of samples"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)
