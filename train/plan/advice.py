"""Searches for settings that fit and are faster, and for a number of nodes that is still efficient.

The search varies settings that change nothing that is learned: ZeRO stage, offloading, recompute, compile, the budgets
of a row, and the number of nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from train.plan.estimate import Estimate, StagePlanner
from train.plan.execution_settings import ExecutionSettings
from train.plan.hours import COMPUTING

_ROW_TOKENS = (8192, 16_384, 32_768)
_MAX_NODES = 64
_HOURS_TOLERANCE = 0.05  # a smaller relative difference is not significant; then fewer changes are preferred
_MIN_EFFICIENCY = 0.8  # relative to the most efficient number of nodes


@dataclass(frozen=True)
class Advice:
    """Advice for a requested estimate.

    Attributes:
        best: the fastest settings that fit on the same number of nodes; None if none fit.
        nearest: the settings that fit with the fewest changes; on more nodes if none fit on the requested number.
        nodes: the best settings on other numbers of nodes.
        advised_nodes: the largest number of nodes that is still efficient; None if none fit.
        bottlenecks: sentences about what slows the step down, the largest loss first.
    """

    best: Estimate | None
    nearest: Estimate | None
    nodes: tuple[Estimate, ...]
    advised_nodes: int | None
    bottlenecks: tuple[str, ...]


def advise(planner: StagePlanner, requested: Estimate) -> Advice:
    """Estimates every combination of settings and returns the advice."""
    settings = requested.settings
    fitting = _find_fitting(planner, settings)
    candidates = fitting or _find_fitting_on_more_nodes(planner, settings)
    nearest = min(candidates, key=lambda e: (len(e.settings.list_overrides(settings)), e.middle_hours), default=None)
    best = _select_fastest(fitting, settings) if fitting else None
    other = _estimate_node_counts(planner, (best or nearest or requested).settings)
    return Advice(
        best,
        nearest,
        other,
        _find_efficient_nodes(other),
        tuple(find_bottlenecks(best or nearest or requested, planner)),
    )


def _iterate_settings(planner: StagePlanner, settings: ExecutionSettings) -> Iterator[ExecutionSettings]:
    names = ["zero1", "zero2", "zero3", *([] if planner.half else ["zero0"])]
    if settings.nodes > 1:
        names.append("zero3_node")
    engines = [settings, *(settings.with_engine(name) for name in names)]
    if planner.hardware.device == "cuda":
        engines += [settings.with_engine(name, offload=True) for name in ("zero2", "zero3")]
    recompute = [(), ("language_model",)]
    if planner.facts.trained["vision_tower"]:
        recompute += [("vision_tower",), ("vision_tower", "language_model")]
    length, rows = planner.config.stage.max_length, [settings.packing]
    for tokens in sorted({length, *(row for row in _ROW_TOKENS if row >= length)}):
        tiles = max(8, -(-settings.packing.max_tiles * tokens // settings.packing.max_tokens))
        rows.append(settings.with_row(tokens, tiles).packing)
    compiled = [settings.compile]
    if planner.hardware.device == "cuda":
        compiled.append(("vision_tower", "language_model"))
    parts = dict.fromkeys([settings.recompute, *recompute])
    for engine, again, packing, kernels in product(engines, parts, dict.fromkeys(rows), dict.fromkeys(compiled)):
        if kernels and engine.zero_stage == 3:  # not supported (train/config/rules.py)
            continue
        yield replace(engine, recompute=again, packing=packing, compile=kernels)


def _find_fitting(planner: StagePlanner, settings: ExecutionSettings) -> list[Estimate]:
    fitting = []
    for candidate in _iterate_settings(planner, settings):
        memory, _ = planner.estimate_memory(candidate)
        if not planner.list_problems(candidate, memory):
            fitting.append(planner.estimate(candidate))
    return fitting


def _find_fitting_on_more_nodes(planner: StagePlanner, settings: ExecutionSettings) -> list[Estimate]:
    nodes = settings.nodes
    while nodes < _MAX_NODES:
        nodes *= 2
        if fitting := _find_fitting(planner, replace(settings, nodes=nodes)):
            return fitting
    return []


def _select_fastest(fitting: list[Estimate], requested: ExecutionSettings) -> Estimate:
    """Returns the fastest of the settings with the fewest changes among those that are about as fast as the fastest."""
    least = min(estimate.middle_hours for estimate in fitting)
    near = [estimate for estimate in fitting if estimate.middle_hours <= least * (1 + _HOURS_TOLERANCE)]
    return min(near, key=lambda e: (len(e.settings.list_overrides(requested)), e.middle_hours))


def _estimate_node_counts(planner: StagePlanner, settings: ExecutionSettings) -> tuple[Estimate, ...]:
    counts, nodes = {settings.nodes}, 1
    while nodes * planner.hardware.gpus_per_node <= planner.config.stage.batch_size and nodes <= _MAX_NODES:
        counts.add(nodes)
        nodes *= 2
    return tuple(planner.estimate(replace(settings, nodes=count)) for count in sorted(counts))


def _find_efficient_nodes(estimates: tuple[Estimate, ...]) -> int | None:
    """Returns the largest number of nodes whose work per GPU-hour is at least `_MIN_EFFICIENCY` of the best."""
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    gpu_hours = {estimate.settings.nodes: estimate.middle_hours * estimate.num_ranks for estimate in fitting}
    return max(nodes for nodes, each in gpu_hours.items() if each <= min(gpu_hours.values()) / _MIN_EFFICIENCY)


def find_bottlenecks(estimate: Estimate, planner: StagePlanner) -> Iterator[str]:
    """Yields sentences about overheads of at least 5 % of a step, with the fix."""
    time = estimate.time
    batch = planner.config.stage.batch_size
    fixes = {
        "recompute": "blocks run twice to save memory: use a higher ZeRO stage or smaller rows",
        "balance": f"{batch} samples do not divide evenly into the rows of {estimate.num_ranks} ranks: use fewer nodes",
        "communication": "it is only partly overlapped with computation: use larger rows (fewer micro-steps), "
        "engine=zero3_node, a lower ZeRO stage, fewer nodes or faster links",
        "gradients": "every micro-step accumulates gradients: use larger rows (fewer micro-steps)",
        "optimizer": "AdamW is bound by memory bandwidth: do not offload it, or use more ranks",
        "input": f"images are decoded too slowly: raise data.workers (now {planner.config.data.workers})",
        "save": f"a checkpoint every {planner.config.save.every} steps takes too long: raise save.every",
    }
    losses = {kind: value / time.total for kind, value in time.kinds.items() if kind not in COMPUTING}
    for kind, share in sorted(losses.items(), key=lambda item: -item[1]):
        if share >= 0.05:
            yield f"{kind} {share:.0%} of a step: {fixes[kind]}"
    if estimate.num_ranks > batch:
        yield f"{estimate.num_ranks - batch} of {estimate.num_ranks} ranks have no sample in a batch of {batch}"
