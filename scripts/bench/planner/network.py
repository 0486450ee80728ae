"""The share of a step that ranks wait for communication, by the rate of the network.

    python scripts/bench/plan.py network

Plans stage 2 of the 7B and the 34B on 32 A100 (4 nodes) with the published batch of 128, and on 1,024 (128 nodes) with
four samples per rank, a batch of 4,096, which is not the recipe's. The settings are the fastest ones that fit on 4
nodes at 25 GB/s per node; the same rows with other engines, and with gradients reduced in bf16, are beside them. Every
share is given with overlap 0.7 and with none. Fails if a share exceeds 15 % on 32 A100 at 25 GB/s with overlap 0.7.
Nothing is run. Results: scripts/bench/results/network.json.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring.result_files import RESULTS, save, table
from planner.published import read_hardware

from data_recipes.schema.arguments import ArgumentParser
from train.config.compose import load
from train.plan.advice import advise
from train.plan.communication import OVERLAP
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import ExecutionSettings, read_settings
from train.plan.model_facts import count_model, read_architecture
from train.plan.plan_text import communication_values, format_shares
from train.plan.sample_lengths import load_population
from train.plan.stage_plan import NETWORK_RATES

MODELS = {"7B": "vicuna_7b", "34B": "hermes_yi_34b"}
NODES, MANY_NODES = 4, 128
GOAL, GOAL_RATE = 0.15, 25.0
SAMPLES_PER_RANK = 4
BF16 = "communication_data_type"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns 1 if the goal is missed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    models: dict[str, dict[str, Any]] = {}
    missed = []
    for size, language_model in MODELS.items():
        planner = make_planner(language_model, options.samples)
        best = find_fastest(planner)
        change = " ".join(best.list_overrides(read_settings(planner.config, NODES)))
        print(f"{size}: {change}", flush=True)
        few = plan_rates(planner, best, NODES)
        large = replace(planner.config.stage, batch_size=SAMPLES_PER_RANK * MANY_NODES * planner.hardware.gpus_per_node)
        config = replace(planner.config, stage=large)
        many = plan_rates(StagePlanner(config, planner.facts, planner.population, planner.hardware), best, MANY_NODES)
        for ranks, planned, batch in (
            (32, few, "128"),
            (1024, many, f"{large.batch_size:,}, not the recipe's"),
        ):
            print(f"{size} on {ranks:,} A100, batch {batch}: share of a step, overlap {OVERLAP:g} to 0")
            print(format_rates(planned), end="\n\n", flush=True)
        models[size] = {"settings": change, "32": few, "1024": many, "batch_of_1024": large.batch_size}
        share = few[best.engine_name][f"{GOAL_RATE:g}"]["share"]
        if share > GOAL:
            missed.append(f"{size}: {share:.1%}")
    print(f"at {GOAL_RATE:g} GB/s per node on 32 A100: " + ("; ".join(missed) or f"at most {GOAL:.0%} of a step"))
    save("network", "plan.py network", words, {"goal": GOAL, "models": models}, options.out)
    return 1 if missed else 0


def make_planner(language_model: str, num_samples: int | None) -> StagePlanner:
    """A planner of stage 2 on A100-80G whose nodes have `GOAL_RATE`."""
    config = load([f"model/language_model={language_model}", "mixture=llava_next_779k", "name=network"], folders=False)
    architecture = read_architecture(config.model)
    population = load_population(config, architecture, num_samples=num_samples)
    hardware = replace(read_hardware("a100_80g"), network_gb_s=GOAL_RATE)
    return StagePlanner(config, count_model(architecture, config), population, hardware)


def find_fastest(planner: StagePlanner) -> ExecutionSettings:
    """The fastest settings that fit on `NODES`."""
    best = advise(planner, planner.estimate(read_settings(planner.config, NODES))).best
    assert best is not None, "32 A100 have enough memory for both models"
    return best.settings


def plan_rates(planner: StagePlanner, settings: ExecutionSettings, nodes: int) -> dict[str, dict[str, Any]]:
    """The communication by engine and rate; engines that do not fit are left out."""
    settings = replace(settings, nodes=nodes)
    variants = {settings.engine_name: settings}
    variants[f"{settings.engine_name}, bf16 gradients"] = replace(settings, engine={**settings.engine, BF16: "bf16"})
    for name in ("zero1", "zero2", "zero3", "zero3_node"):
        # DeepSpeed's ZeRO-3 excludes torch.compile, and torch.compile nothing else.
        variants.setdefault(name, replace(settings.with_engine(name), compile=()))
    planned = {}
    for name, variant in variants.items():
        by_rate = {f"{rate:g}": planner.with_network(rate).estimate(variant) for rate in NETWORK_RATES}
        first = next(iter(by_rate.values()))
        if first.fits:
            planned[name] = {
                rate: {
                    **communication_values(each),
                    "text": format_shares(each),
                    "step_s": each.time.total,
                    "step_s_without_overlap": each.time.total_without_overlap,
                    "micro_steps": each.time.micro_steps,
                    "memory_gib": each.memory.total / 2**30,
                }
                for rate, each in by_rate.items()
            }
    return planned


def format_rates(planned: dict[str, dict[str, Any]]) -> str:
    """A table by engine and rate."""
    rows = [[name, *(values["text"] for values in by_rate.values())] for name, by_rate in planned.items()]
    return table(["engine", *(f"{rate:g} GB/s" for rate in NETWORK_RATES)], rows)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "plan.py network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, help="number of samples in an epoch, instead of the mixture's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)
