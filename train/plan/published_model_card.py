"""The model card's three rows, planned: what the authors needed, what ours would, and the MFU that each implies.

Owns the card's numbers (LLaVA-NeXT's blog of January 2024: GPUs times hours on A100). The card does not say whether its
hours hold stage 1; they are read as stage 2's, on 760K samples, since stage 1 was LLaVA-1.5's.
"""

from train.config.compose import load
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.hardware import Hardware
from train.plan.model_facts import model_facts, read_architecture
from train.plan.plan_text import text_table
from train.plan.sample_lengths import population_of
from train.plan.setting import setting_of

SAMPLES = 760_000
CARD = (("7B", "vicuna_7b", 8, 20.0), ("13B", "vicuna_13b", 16, 24.0), ("34B", "hermes_yi_34b", 32, 30.0))
"""Size, language model, A100s, hours."""


def card_rows(hardware: Hardware) -> list[dict[str, object]]:
    """One row for each size: plain values. `hardware` is an A100 node of eight."""
    rows: list[dict[str, object]] = []
    for size, language_model, gpus, hours in CARD:
        overrides = [f"model/language_model={language_model}", "mixture=llava_next_760k", "name=card"]
        config = load(overrides, folders=False)
        architecture = read_architecture(config.model)
        population = population_of(config, architecture, num_samples=SAMPLES)
        planner = StagePlanner(config, model_facts(architecture, config), population, hardware)
        asked = planner.estimate(setting_of(config, gpus // hardware.gpus_per_node))
        advice = advise(planner, asked)
        ours = advice.best or advice.nearest or asked
        flops = ours.time.flops * ours.num_steps
        rows.append(
            {
                "size": size,
                "gpus": gpus,
                "card_hours": hours,
                "card_mfu": flops / (gpus * hours * 3600 * hardware.flops_per_s(half=True)),
                "our_gpus": ours.num_ranks,
                "our_hours": ours.hours,
                "our_mfu": ours.time.mfu,
                "change": list(ours.setting.words(asked.setting)),
                "memory_gib": ours.memory.total / 2**30,
                "fits": ours.fits,
            }
        )
    return rows


def card_text(rows: list[dict[str, object]]) -> str:
    """The table, and under it how each is set."""
    cells = [
        [
            str(row["size"]),
            f"{row['gpus']} x {row['card_hours']:.0f} h",
            f"{row['card_mfu']:.1%}",
            f"{row['our_gpus']} x {row['our_hours']:.1f} h",
            f"{row['our_mfu']:.1%}",
            f"{row['memory_gib']:.1f}",
            " ".join(map(str, row["change"])) if isinstance(row["change"], list) else "",
        ]
        for row in rows
    ]
    header = ["", "the card", "its MFU", "planned", "its MFU", "GiB a rank", "with"]
    return text_table(header, cells)
