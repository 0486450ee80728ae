"""What to change: the fastest setting that fits, the nearest one, and how many nodes pay.

Owns the search. It turns only knobs that change nothing that is learned: ZeRO, offload, recompute, compile, the row's
budgets, the number of nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from train.plan.estimate import Estimate, StagePlanner
from train.plan.hours import COMPUTING
from train.plan.setting import Setting

_ROWS = (8192, 16_384, 32_768)
_MOST_NODES = 64
_SAME = 0.05  # of the hours: what the plan cannot tell apart; then fewer changes are better
_WORTH = 0.8  # of the smallest fitting number of nodes' GPU efficiency


@dataclass(frozen=True)
class Advice:
    """What follows from an estimate; words are command-line overrides.

    Attributes:
        best: the fastest fitting setting on as many nodes, None where nothing fits.
        nearest: the fitting setting with the fewest changes; where nothing fits on these nodes, on more of them.
        nodes: the best setting on other numbers of nodes.
        held_back: sentences, the largest loss first.
    """

    best: Estimate | None
    nearest: Estimate | None
    nodes: tuple[Estimate, ...]
    advised_nodes: int | None
    held_back: tuple[str, ...]


def advise(planner: StagePlanner, asked: Estimate) -> Advice:
    """Looks at every combination of the knobs."""
    setting = asked.setting
    fitting = _fitting(planner, setting)
    nearest_of = fitting or _on_more_nodes(planner, setting)
    nearest = min(nearest_of, key=lambda e: (len(e.setting.words(setting)), e.hours), default=None)
    best = _fastest(fitting, setting) if fitting else None
    other = _node_counts(planner, (best or nearest or asked).setting)
    return Advice(best, nearest, other, _advised(other), tuple(held_back(best or nearest or asked, planner)))


def _settings(planner: StagePlanner, setting: Setting) -> Iterator[Setting]:
    stages = (1, 2, 3) if planner.half else (0, 1, 2, 3)
    engines = [setting, *(setting.with_zero(stage) for stage in stages)]
    if planner.hardware.device == "cuda":
        engines += [setting.with_zero(stage, offload=True) for stage in (2, 3)]
    recompute = [(), ("language_model",)]
    if planner.facts.trained["vision_tower"]:
        recompute += [("vision_tower",), ("vision_tower", "language_model")]
    length, rows = planner.config.stage.max_length, [setting.packing]
    for tokens in sorted({length, *(row for row in _ROWS if row >= length)}):
        tiles = max(8, -(-setting.packing.max_tiles * tokens // setting.packing.max_tokens))
        rows.append(setting.with_row(tokens, tiles).packing)
    compiled = [setting.compile]
    if planner.hardware.device == "cuda":
        compiled.append(("vision_tower", "language_model"))
    parts = dict.fromkeys([setting.recompute, *recompute])
    for engine, again, packing, kernels in product(engines, parts, dict.fromkeys(rows), dict.fromkeys(compiled)):
        if kernels and engine.zero_stage == 3:  # refused (train/config/rules.py)
            continue
        yield replace(engine, recompute=again, packing=packing, compile=kernels)


def _fitting(planner: StagePlanner, setting: Setting) -> list[Estimate]:
    found = []
    for candidate in _settings(planner, setting):
        memory, _ = planner.memory(candidate)
        if not planner.why_not(candidate, memory):
            found.append(planner.estimate(candidate))
    return found


def _on_more_nodes(planner: StagePlanner, setting: Setting) -> list[Estimate]:
    nodes = setting.nodes
    while nodes < _MOST_NODES:
        nodes *= 2
        if found := _fitting(planner, replace(setting, nodes=nodes)):
            return found
    return []


def _fastest(fitting: list[Estimate], asked: Setting) -> Estimate:
    least = min(estimate.hours for estimate in fitting)
    near = [estimate for estimate in fitting if estimate.hours <= least * (1 + _SAME)]
    return min(near, key=lambda e: (len(e.setting.words(asked)), e.memory.total))


def _node_counts(planner: StagePlanner, setting: Setting) -> tuple[Estimate, ...]:
    counts, nodes = {setting.nodes}, 1
    while nodes * planner.hardware.gpus_per_node <= planner.config.stage.batch_size and nodes <= _MOST_NODES:
        counts.add(nodes)
        nodes *= 2
    return tuple(planner.estimate(replace(setting, nodes=count)) for count in sorted(counts))


def _advised(estimates: tuple[Estimate, ...]) -> int | None:
    """The most nodes that still do four fifths of the work for a GPU-hour that the fewest do."""
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        return None
    least = min(estimate.gpu_hours for estimate in fitting)
    return max(estimate.setting.nodes for estimate in fitting if estimate.gpu_hours <= least / _WORTH)


def held_back(estimate: Estimate, planner: StagePlanner) -> Iterator[str]:
    """What takes more than a twentieth of a step without being the samples' own work, and what to do."""
    time = estimate.time
    batch = planner.config.stage.batch_size
    ways_out = {
        "recompute": "blocks run twice to save memory: shard more, or take smaller rows",
        "balance": f"{batch} samples do not divide evenly into the rows of {estimate.num_ranks} ranks: fewer nodes",
        "communication": "weights and gradients travel longer than they can hide: larger rows mean fewer micro-steps; "
        "a lower ZeRO stage, fewer nodes or faster links help too",
        "gradients": "each micro-step adds its gradients to the step's: larger rows mean fewer micro-steps",
        "optimizer": "AdamW waits for memory: no offload, or more ranks to share it",
        "input": f"pictures are cut too slowly: raise data.workers (now {planner.config.data.workers})",
        "save": f"a checkpoint every {planner.config.save.every} steps is written too slowly: raise save.every",
    }
    losses = {kind: value / time.total for kind, value in time.kinds.items() if kind not in COMPUTING}
    for kind, share in sorted(losses.items(), key=lambda item: -item[1]):
        if share >= 0.05:
            yield f"{kind} {share:.0%} of a step: {ways_out[kind]}"
    if estimate.num_ranks > batch:
        yield f"{estimate.num_ranks - batch} of {estimate.num_ranks} ranks have no sample in a batch of {batch}"
