"""Formats a plan as text for the terminal and as plain values for JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from train.plan.advice import Advice
from train.plan.communication import OVERLAP
from train.plan.estimate import Estimate, StagePlanner

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        requested: with the requested settings.
        variants: with every engine.
        networks: with the requested settings and other rates of the network in GB/s per node; empty for one node.
    """

    planner: StagePlanner
    requested: Estimate
    variants: Mapping[str, Estimate]
    networks: Mapping[float, Estimate]
    advice: Advice

    @property
    def stored_bytes(self) -> float:
        """Disk that the checkpoints of the stage need: those that are kept, and one that is being written."""
        save = self.planner.config.save
        further = self.requested.num_steps // save.keep_every if save.keep_every else 0
        most = self.requested.num_steps // save.every if save.every else 0
        return self.requested.save.num_bytes * min(most, save.keep + further + 1)


def format_plan(plan: StagePlan) -> str:
    """Returns the text of one stage."""
    planner, requested = plan.planner, plan.requested
    config, facts, population = planner.config, planner.facts, planner.population
    stage, time = config.stage, requested.time
    lines = [
        f"stage {stage.name}: {config.model.language_model.name} ({facts.num_parameters / 1e9:.2f}B, "
        f"{facts.num_trained / 1e9:.2f}B trained) with {config.model.vision_tower.name}, "
        f"{population.num_samples:,} samples of {config.mixture.name}",
        f"on {requested.num_ranks} x {planner.hardware.name}, {requested.settings.nodes} node(s), "
        f"{'bf16' if planner.half else 'fp32'}, {requested.num_steps:,} steps of {stage.batch_size}; "
        f"{population.origin}",
        "",
        "memory per rank in GiB (* requested)",
        _format_memory(plan),
        f"assumed largest row: {requested.row.tokens:,} tokens, {requested.row.tiles} tiles, "
        f"{requested.row.supervised:,} supervised tokens",
        "",
        *(f"does not fit: {reason}" for reason in requested.problems),
        *(["fits"] if requested.fits else []),
        "",
        "seconds per step",
        format_table(
            ["", "s", "share"],
            [[kind, f"{value:.3f}", f"{value / time.total:.1%}"] for kind, value in time.kinds.items()]
            + [["total", f"{time.total:.3f}", ""]],
        ),
        f"{time.micro_steps:.1f} micro-steps, balance {time.balance:.3f}, MFU {time.mfu:.1%} of the dense rate, "
        f"{time.samples_per_s:.1f} samples/s",
        f"duration of the stage: {format_hours(requested)}",
        *(
            [
                f"(if computation hides up to {OVERLAP:.0%} of its duration of communication, or none; links: "
                f"{planner.hardware.link_gb_s:g} GB/s per GPU, {planner.hardware.network_gb_s:g} GB/s per node)"
            ]
            if time.communication.hidden_s
            else []
        ),
        *_format_save(plan),
        *_format_networks(plan),
        "",
        *_format_advice(plan),
    ]
    return "\n".join(lines)


def plan_values(plan: StagePlan) -> dict[str, Any]:
    """Returns the values of one stage for JSON."""
    planner = plan.planner
    best, nearest = plan.advice.best, plan.advice.nearest
    requested = plan.requested.settings
    return {
        "stage": planner.config.stage.name,
        "model": planner.config.model.language_model.name,
        "vision_tower": planner.config.model.vision_tower.name,
        "parameters": dict(planner.facts.parameters),
        "trained": dict(planner.facts.trained),
        "samples": planner.population.num_samples,
        "lengths": planner.population.origin,
        "hardware": asdict(planner.hardware),
        "asked": estimate_values(plan.requested),
        "zero": {name: estimate_values(estimate) for name, estimate in plan.variants.items()},
        "networks": [network_values(rate, estimate) for rate, estimate in plan.networks.items()],
        "best": best and {"change": list(best.settings.list_overrides(requested)), **estimate_values(best)},
        "nearest": nearest and {"change": list(nearest.settings.list_overrides(requested)), **estimate_values(nearest)},
        "nodes": [estimate_values(estimate) for estimate in plan.advice.nodes],
        "advised_nodes": plan.advice.advised_nodes,
        "held_back": list(plan.advice.bottlenecks),
    }


def estimate_values(estimate: Estimate) -> dict[str, Any]:
    """Returns the values of one estimate for JSON."""
    settings, time, save = estimate.settings, estimate.time, estimate.save
    return {
        "engine": settings.engine_name,
        "zero_stage": settings.zero_stage,
        "offload_optimizer": settings.offloads_optimizer,
        "recompute": list(settings.recompute),
        "compile": list(settings.compile),
        "max_tokens": settings.packing.max_tokens,
        "max_tiles": settings.packing.max_tiles,
        "nodes": settings.nodes,
        "ranks": estimate.num_ranks,
        "fits": estimate.fits,
        "why_not": list(estimate.problems),
        "row": asdict(estimate.row),
        "memory_gib": {kind: value / GIB for kind, value in estimate.memory.kinds.items()},
        "memory_total_gib": estimate.memory.total / GIB,
        "memory_limit_gib": estimate.limit_bytes / GIB,
        "memory_peak_in": estimate.memory.peak,
        "host_gib_a_node": estimate.memory.host / GIB,
        "step_s": dict(time.kinds),
        "step_total_s": time.total,
        "communication": communication_values(estimate),
        "save": {"bytes": save.num_bytes, "write_s": save.write_s, "stall_s": save.stall_s},
        "micro_steps": time.micro_steps,
        "balance": time.balance,
        "mfu": time.mfu,
        "flops_a_step": time.flops,
        "samples_per_s": time.samples_per_s,
        "steps": estimate.num_steps,
        "hours": estimate.hours,
        "hours_without_overlap": estimate.hours_without_overlap,
        "gpu_hours": estimate.gpu_hours,
        "gpu_hours_without_overlap": estimate.gpu_hours_without_overlap,
    }


def communication_values(estimate: Estimate) -> dict[str, float]:
    """Returns seconds, bytes and shares of the communication of a step."""
    time = estimate.time
    return {
        "total_s": time.communication.total_s,
        "hidden_s": time.communication.hidden_s,
        "across_bytes_a_node": time.communication.across_bytes,
        "inside_bytes_a_rank": time.communication.inside_bytes,
        "share": time.communication_share,
        "share_without_overlap": time.communication_share_without_overlap,
    }


def network_values(network_gb_s: float, estimate: Estimate) -> dict[str, float]:
    """Returns what the rate of the network changes."""
    return {
        "network_gb_s": network_gb_s,
        "share": estimate.time.communication_share,
        "share_without_overlap": estimate.time.communication_share_without_overlap,
        "hours": estimate.hours,
        "hours_without_overlap": estimate.hours_without_overlap,
    }


def format_shares(estimate: Estimate) -> str:
    """Returns the share of a step for communication as a range: with the assumed overlap, and without any."""
    low, high = (
        f"{share:.0%}"
        for share in (estimate.time.communication_share, estimate.time.communication_share_without_overlap)
    )
    return low if low == high else f"{low} to {high}"


def format_bracket(hours: float, hours_without_overlap: float, digits: int = 1) -> str:
    """Returns hours as a range: with the assumed overlap of communication, and without any."""
    low, high = f"{hours:,.{digits}f}", f"{hours_without_overlap:,.{digits}f}"
    return low if low == high else f"{low} to {high}"


def format_hours(estimate: Estimate) -> str:
    """Returns hours, as a range, and GPU-hours as text."""
    return f"{format_hour_range(estimate)} h, {format_gpu_hours(estimate)} GPU-hours"


def format_hour_range(estimate: Estimate) -> str:
    """Returns hours as a range."""
    return format_bracket(estimate.hours, estimate.hours_without_overlap)


def format_gpu_hours(estimate: Estimate) -> str:
    """Returns GPU-hours as a range."""
    return format_bracket(estimate.gpu_hours, estimate.gpu_hours_without_overlap, digits=0)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a text table with the first column left-aligned and the others right-aligned."""
    return tabulate(rows, header, "plain", disable_numparse=True, colglobalalign="right", colalign=("left",))


def _format_memory(plan: StagePlan) -> str:
    kinds = list(dict.fromkeys(kind for estimate in plan.variants.values() for kind in estimate.memory.kinds))
    rows = [
        [kind, *(f"{estimate.memory.kinds.get(kind, 0.0) / GIB:.1f}" for estimate in plan.variants.values())]
        for kind in kinds
    ]
    rows += [
        ["total", *(f"{estimate.memory.total / GIB:.1f}" for estimate in plan.variants.values())],
        ["available", *(f"{estimate.limit_bytes / GIB:.1f}" for estimate in plan.variants.values())],
        ["fits", *("yes" if estimate.fits else "no" for estimate in plan.variants.values())],
        ["hours", *(format_hour_range(estimate) for estimate in plan.variants.values())],
    ]
    return format_table(["", *plan.variants], rows)


def _format_save(plan: StagePlan) -> Iterator[str]:
    save, every = plan.requested.save, plan.planner.config.save.every
    if every:
        yield (
            f"checkpoint every {every} steps: {save.num_bytes / 1e9:,.1f} GB, {plan.stored_bytes / 1e9:,.0f} GB with "
            f"those that are kept; training stops for {save.stall_s:.1f} s, it is complete after {save.write_s:.0f} s"
        )


def _format_networks(plan: StagePlan) -> Iterator[str]:
    if plan.networks:
        yield f"\ncommunication by the rate of the network (overlap {OVERLAP:g} to 0)"
        yield format_table(
            ["GB/s per node", "share of a step", "h"],
            [
                [f"{rate:g}", format_shares(estimate), format_hour_range(estimate)]
                for rate, estimate in plan.networks.items()
            ],
        )


def _format_advice(plan: StagePlan) -> Iterator[str]:
    advice, requested = plan.advice, plan.requested
    for bottleneck in advice.bottlenecks:
        yield f"bottleneck: {bottleneck}"
    if advice.nearest is None:
        yield "no settings make it fit, not even on 64 nodes: use GPUs with more memory, or a smaller model"
    elif not requested.fits:
        overrides = " ".join(advice.nearest.settings.list_overrides(requested.settings))
        memory_gib = advice.nearest.memory.total / GIB
        yield f"fits with the fewest changes: {overrides} ({memory_gib:.1f} GiB, {format_hours(advice.nearest)})"
    if advice.best is not None:
        overrides = " ".join(advice.best.settings.list_overrides(requested.settings)) or "no changes"
        yield f"fastest on {requested.settings.nodes} node(s): {overrides} ({format_hours(advice.best)})"
    if len(advice.nodes) > 1:
        yield f"\nwith these settings{'' if advice.advised_nodes is None else f'; advised: {advice.advised_nodes}'}"
        yield format_table(
            ["nodes", "ranks", "fits", "h", "GPU-hours", "balance", "communication"],
            [
                [
                    str(estimate.settings.nodes),
                    str(estimate.num_ranks),
                    "yes" if estimate.fits else "no",
                    format_hour_range(estimate),
                    format_gpu_hours(estimate),
                    f"{estimate.time.balance:.3f}",
                    format_shares(estimate),
                ]
                for estimate in advice.nodes
            ],
        )
