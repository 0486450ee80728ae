"""Compares the training costs of the published model card with plans, and computes the card's MFU.

The costs are those of the LLaVA-NeXT blog post of January 2024, in GPUs and hours on A100. It does not say whether
they include stage 1; they are taken as stage 2 on 760K samples, since stage 1 was that of LLaVA-1.5.
"""

from train.config.compose import load
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware
from train.plan.model_facts import count_model, read_architecture
from train.plan.plan_text import format_bracket, format_table
from train.plan.sample_lengths import load_population

SAMPLES = 760_000
CARD = (("7B", "vicuna_7b", 8, 20.0), ("13B", "vicuna_13b", 16, 24.0), ("34B", "hermes_yi_34b", 32, 30.0))
"""Size, language model, number of A100s, hours."""


def plan_card(hardware: Hardware) -> list[dict[str, object]]:
    """Plans each size of the card; returns plain values. `hardware` must be nodes of eight A100s."""
    rows: list[dict[str, object]] = []
    for size, language_model, gpus, hours in CARD:
        overrides = [f"model/language_model={language_model}", "mixture=llava_next_760k", "name=card"]
        config = load(overrides, folders=False)
        architecture = read_architecture(config.model)
        population = load_population(config, architecture, num_samples=SAMPLES)
        planner = StagePlanner(config, count_model(architecture, config), population, hardware)
        requested = planner.estimate(read_settings(config, gpus // hardware.gpus_per_node))
        advice = advise(planner, requested)
        ours = advice.best or advice.nearest or requested
        flops = ours.time.flops * ours.num_steps
        rows.append(
            {
                "size": size,
                "gpus": gpus,
                "card_hours": hours,
                "card_mfu": flops / (gpus * hours * 3600 * hardware.flops_per_s(half=True)),
                "our_gpus": ours.num_ranks,
                "our_hours": ours.hours,
                "our_hours_without_overlap": ours.hours_without_overlap,
                "change": list(ours.settings.list_overrides(requested.settings)),
                "memory_gib": ours.memory.total / 2**30,
                "fits": ours.fits,
            }
        )
    return rows


def _format_hours(row: dict[str, object]) -> str:
    hours, without_overlap = row["our_hours"], row["our_hours_without_overlap"]
    assert isinstance(hours, float)
    assert isinstance(without_overlap, float)
    return format_bracket(hours, without_overlap)


def format_card(rows: list[dict[str, object]]) -> str:
    """Returns the rows as a text table."""
    cells = [
        [
            str(row["size"]),
            f"{row['gpus']} x {row['card_hours']:.0f} h",
            f"{row['card_mfu']:.1%}",
            f"{row['our_gpus']} x {_format_hours(row)} h",
            f"{row['memory_gib']:.1f}",
            " ".join(map(str, row["change"])) if isinstance(row["change"], list) else "",
        ]
        for row in rows
    ]
    header = ["", "card", "card's MFU", "planned", "GiB per rank", "changes"]
    return format_table(header, cells)
