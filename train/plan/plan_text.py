"""A plan as text for a terminal and as plain values for JSON.

Owns their form; the numbers are `estimate.py`'s and `advice.py`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.plan.advice import Advice
from train.plan.estimate import Estimate, StagePlanner

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """One stage's plan: what was asked, the same under every ZeRO stage, and what is advised."""

    planner: StagePlanner
    asked: Estimate
    variants: Mapping[str, Estimate]
    advice: Advice


def plan_text(plan: StagePlan) -> str:
    """The terminal's page of one stage."""
    planner, asked = plan.planner, plan.asked
    config, facts, population = planner.config, planner.facts, planner.population
    stage, time = config.stage, asked.time
    lines = [
        f"stage {stage.name}: {config.model.language_model.name} ({facts.num_parameters / 1e9:.2f}B, "
        f"{facts.num_trained / 1e9:.2f}B trained) behind {config.model.vision_tower.name}, "
        f"{population.num_samples:,} samples of {config.mixture.name}",
        f"on {asked.num_ranks} x {planner.hardware.name}, {asked.setting.nodes} node(s), "
        f"{'bf16' if planner.half else 'fp32'}, {asked.num_steps:,} steps of {stage.batch_size}; {population.origin}",
        "",
        "memory of a rank in GiB (* asked for)",
        _memory_table(plan),
        f"largest row taken: {asked.row.tokens:,} tokens, {asked.row.tiles} tiles, {asked.row.supervised:,} supervised",
        "",
        *(f"does not fit: {reason}" for reason in asked.why_not),
        *(["fits"] if asked.fits else []),
        "",
        "a step in seconds",
        text_table(
            ["", "s", "share"],
            [[kind, f"{value:.3f}", f"{value / time.total:.1%}"] for kind, value in time.kinds.items()]
            + [["all", f"{time.total:.3f}", ""]],
        ),
        f"{time.micro_steps:.1f} micro-steps, balance {time.balance:.3f}, MFU {time.mfu:.1%} of the dense rate, "
        f"{time.samples_per_s:.1f} samples/s",
        f"the stage: {hours_text(asked)}",
        "",
        *_advice_lines(plan),
    ]
    return "\n".join(lines)


def plan_values(plan: StagePlan) -> dict[str, Any]:
    """Plain values of one stage."""
    planner = plan.planner
    best, nearest = plan.advice.best, plan.advice.nearest
    asked = plan.asked.setting
    return {
        "stage": planner.config.stage.name,
        "model": planner.config.model.language_model.name,
        "vision_tower": planner.config.model.vision_tower.name,
        "parameters": dict(planner.facts.parameters),
        "trained": dict(planner.facts.trained),
        "samples": planner.population.num_samples,
        "lengths": planner.population.origin,
        "hardware": asdict(planner.hardware),
        "asked": estimate_values(plan.asked),
        "zero": {name: estimate_values(estimate) for name, estimate in plan.variants.items()},
        "best": best and {"change": list(best.setting.words(asked)), **estimate_values(best)},
        "nearest": nearest and {"change": list(nearest.setting.words(asked)), **estimate_values(nearest)},
        "nodes": [estimate_values(estimate) for estimate in plan.advice.nodes],
        "advised_nodes": plan.advice.advised_nodes,
        "held_back": list(plan.advice.held_back),
    }


def estimate_values(estimate: Estimate) -> dict[str, Any]:
    """Plain values of one setting."""
    setting, time = estimate.setting, estimate.time
    return {
        "zero_stage": setting.zero_stage,
        "offload_optimizer": setting.offloads_optimizer,
        "recompute": list(setting.recompute),
        "compile": list(setting.compile),
        "max_tokens": setting.packing.max_tokens,
        "max_tiles": setting.packing.max_tiles,
        "nodes": setting.nodes,
        "ranks": estimate.num_ranks,
        "fits": estimate.fits,
        "why_not": list(estimate.why_not),
        "row": asdict(estimate.row),
        "memory_gib": {kind: value / GIB for kind, value in estimate.memory.kinds.items()},
        "memory_total_gib": estimate.memory.total / GIB,
        "memory_limit_gib": estimate.limit_bytes / GIB,
        "memory_peak_in": estimate.memory.peak,
        "host_gib_a_node": estimate.memory.host / GIB,
        "step_s": dict(time.kinds),
        "step_total_s": time.total,
        "micro_steps": time.micro_steps,
        "balance": time.balance,
        "mfu": time.mfu,
        "flops_a_step": time.flops,
        "samples_per_s": time.samples_per_s,
        "steps": estimate.num_steps,
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
    }


def hours_text(estimate: Estimate) -> str:
    """Hours, GPU-hours."""
    return f"{estimate.hours:,.1f} h, {estimate.gpu_hours:,.0f} GPU-hours"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table: the first column to the left, all others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (header, *rows):
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    return "\n".join(lines)


def _memory_table(plan: StagePlan) -> str:
    kinds = list(dict.fromkeys(kind for estimate in plan.variants.values() for kind in estimate.memory.kinds))
    rows = [
        [kind, *(f"{estimate.memory.kinds.get(kind, 0.0) / GIB:.1f}" for estimate in plan.variants.values())]
        for kind in kinds
    ]
    rows += [
        ["all", *(f"{estimate.memory.total / GIB:.1f}" for estimate in plan.variants.values())],
        ["available", *(f"{estimate.limit_bytes / GIB:.1f}" for estimate in plan.variants.values())],
        ["fits", *("yes" if estimate.fits else "no" for estimate in plan.variants.values())],
        ["hours", *(f"{estimate.hours:.1f}" for estimate in plan.variants.values())],
    ]
    return text_table(["", *plan.variants], rows)


def _advice_lines(plan: StagePlan) -> Iterator[str]:
    advice, asked = plan.advice, plan.asked
    for reason in advice.held_back:
        yield f"holds it back: {reason}"
    if advice.nearest is None:
        yield "nothing that changes no result makes it fit, on 64 nodes neither: another card, or a smaller model"
    elif not asked.fits:
        words = " ".join(advice.nearest.setting.words(asked.setting))
        yield f"nearest that fits: {words} ({advice.nearest.memory.total / GIB:.1f} GiB, {hours_text(advice.nearest)})"
    if advice.best is not None:
        words = " ".join(advice.best.setting.words(asked.setting)) or "as it is"
        yield f"best on {asked.setting.nodes} node(s): {words} ({hours_text(advice.best)})"
    if len(advice.nodes) > 1:
        yield f"\nnodes (with it){'' if advice.advised_nodes is None else f'; advised: {advice.advised_nodes}'}"
        yield text_table(
            ["nodes", "ranks", "fits", "h", "GPU-hours", "balance", "communication"],
            [
                [
                    str(estimate.setting.nodes),
                    str(estimate.num_ranks),
                    "yes" if estimate.fits else "no",
                    f"{estimate.hours:.1f}",
                    f"{estimate.gpu_hours:,.0f}",
                    f"{estimate.time.balance:.3f}",
                    f"{estimate.time.kinds['communication'] / estimate.time.total:.0%}",
                ]
                for estimate in advice.nodes
            ],
        )
