"""Seconds of a step by kind, from rows, FLOPs, rates and links. Pure arithmetic.

Owns the formulas; FLOPs are `llava_next/model/flops.py`'s, rates and links the hardware file's. What is assumed beyond
them stands in the constants here. R is the number of ranks, T the trained parameters, P all of them, s a weight's
bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.plan.hardware import Hardware
from train.plan.model_facts import ModelFacts
from train.plan.rows import StepRows
from train.plan.setting import Setting

LINK_SHARE = 0.8
"""Of a link's rate, what a collective of large messages reaches. Assumed."""
OVERLAP = 0.7
"""Of a step's computing, the part that communication can hide behind where it overlaps. Assumed."""
MEMORY_SHARE = 0.8
"""Of the memory's rate, what AdamW's stream reaches. Assumed."""
PLAIN_SHARE = 0.87
"""Of the rate of compiled blocks, what plain ones reach on a GPU (results/gpu_h100_kernels.json: 35.5 of 41.0 %)."""
TILES_PER_CORE_S = 600.0
"""Pictures decoded and cut, in tiles a second and core (scripts/bench/results/input.json: 494 tiles in 0.81 s)."""
SMALL_ALL_REDUCE = 500_000_000
"""Elements of an all-reduce without ZeRO (DeepSpeed's deepspeed.py, MEMORY_OPT_ALLREDUCE_SIZE)."""

COMPUTING = ("vision", "language", "attention", "head")
"""The kinds that are the samples' own work; all others are what it costs to do it."""

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepTime:
    """Mean seconds of a step by kind, and what follows.

    `balance`: mean over maximum of the ranks' computing. `mfu`: useful FLOPs (no recompute) over the dense rate.
    `samples` and `micro_steps`: means of a step.
    """

    kinds: dict[str, float]
    balance: float
    mfu: float
    flops: float
    samples: float
    micro_steps: float

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.total


def step_time(
    facts: ModelFacts,
    setting: Setting,
    steps: Sequence[StepRows],
    hardware: Hardware,
    *,
    half: bool,
    workers: int,
    save_every: int,
) -> StepTime:
    """The mean over some steps of a run.

    A micro-step takes as long as its slowest rank: computing is the ranks' mean, and `balance` what the slowest takes
    more. Input is read ahead, so only what it takes longer than the step is waited for.
    """
    num_ranks = setting.nodes * hardware.gpus_per_node
    rate = hardware.flops_per_s(half=half)
    kinds = dict.fromkeys((*COMPUTING, "recompute", "balance"), 0.0)
    useful = tiles = micro_steps = samples = 0.0
    for step in steps:
        seconds, flops = computing(facts, setting.recompute, step, hardware, half=half, compiled=setting.compile)
        whole = np.stack(list(seconds.values())).sum(axis=0)
        for kind, values in seconds.items():
            kinds[kind] += float(values.mean(axis=1).sum())
        kinds["balance"] += float((whole.max(axis=1) - whole.mean(axis=1)).sum())
        useful += flops
        tiles += float(step.sums[..., 2].sum())
        micro_steps += len(step.sums)
        samples += float(step.samples.sum())
    count = len(steps)
    kinds = {kind: value / count for kind, value in kinds.items()}
    busy = sum(kinds.values())
    kinds["communication"] = communication(facts, setting, hardware, micro_steps / count, busy, half=half)
    kinds["gradients"] = micro_steps / count * adding_up(facts, setting, hardware, half=half)
    kinds["optimizer"] = optimizer(facts, setting, hardware, half=half)
    own_cores = min(max(workers, 1), max(1.0, hardware.cores_per_node / hardware.gpus_per_node))
    reading = tiles / count / num_ranks / (own_cores * TILES_PER_CORE_S)
    kinds["input"] = reading if not workers else max(0.0, reading - sum(kinds.values()))
    kinds["save"] = saving(facts, setting, hardware, half=half) / save_every if save_every else 0.0
    total = sum(kinds.values())
    computed = sum(kinds[kind] for kind in (*COMPUTING, "recompute"))
    return StepTime(
        kinds,
        balance=computed / (computed + kinds["balance"]),
        mfu=useful / count / (total * num_ranks * rate),
        flops=useful / count,
        samples=samples / count,
        micro_steps=micro_steps / count,
    )


def computing(
    facts: ModelFacts,
    recompute: Sequence[str],
    step: StepRows,
    hardware: Hardware,
    *,
    half: bool,
    compiled: Sequence[str] = (),
) -> tuple[dict[str, Seconds], float]:
    """Seconds [micro-steps, ranks] by kind, and the useful FLOPs of all of them.

    A row's FLOPs are costs.py's and the head's at supervised positions: 2 D V each way, three ways where it is trained,
    two where not. Recompute is one forward pass more of a part's blocks.
    """
    costs, rate = facts.costs, hardware.flops_per_s(half=half)
    tokens, squared, tiles, supervised = np.moveaxis(step.sums, 2, 0)
    ways = 3 if facts.trains_head else 2
    head = 2.0 * facts.language.width * facts.language.vocabulary * ways
    flops = {
        "vision": tiles * costs.tile,
        "language": tokens * costs.token + supervised * costs.target,
        "attention": squared / 2 * costs.pair,
        "head": supervised * head,
    }
    plain = PLAIN_SHARE if hardware.device == "cuda" else 1.0
    vision_share = hardware.vision_share * (1.0 if "vision_tower" in compiled else plain)
    shares = {
        "vision": vision_share,
        "language": hardware.language_share * (1.0 if "language_model" in compiled else plain),
        "attention": hardware.attention_share,
        "head": hardware.language_share,
    }
    seconds = {kind: value / (rate * shares[kind]) for kind, value in flops.items()}
    again = np.zeros_like(tokens)
    if "language_model" in recompute:
        again += seconds["language"] / ways + seconds["attention"] / 3
    if "vision_tower" in recompute and facts.trained["vision_tower"]:
        projector = 6.0 * facts.vision.patches * facts.parameters["projector"]
        again += tiles * (costs.tile - projector) / 3 / (rate * vision_share)
    return seconds | {"recompute": again}, float(sum(value.sum() for value in flops.values()))


def ring(num_bytes: float, hardware: Hardware, nodes: int) -> float:
    """Seconds of one all-gather or reduce-scatter of that many bytes (an all-reduce is two).

    A ring of R takes R - 1 hops and moves (R - 1) / R of the bytes through every link (Thakur, Rabenseifner, Gropp
    2005). Between nodes every node passes it on through all of its ports together, as NCCL's parallel rings do.
    """
    num_ranks = nodes * hardware.gpus_per_node
    if num_ranks == 1:
        return 0.0
    rate = min(hardware.link_gb_s, hardware.network_gb_s) if nodes > 1 else hardware.link_gb_s
    between = nodes if nodes > 1 else 0
    latency = (num_ranks - 1 - between) * hardware.link_latency_us + between * hardware.network_latency_us
    return (num_ranks - 1) / num_ranks * num_bytes / (rate * 1e9 * LINK_SHARE) + max(0.0, latency) * 1e-6


def communication(
    facts: ModelFacts, setting: Setting, hardware: Hardware, micro_steps: float, busy: float, *, half: bool
) -> float:
    """Seconds of a step that ranks wait for one another's bytes.

    Gradients travel in fp32. Without ZeRO and at stage 1 they are all-reduced once a step, at stage 2 in every
    micro-step (DeepSpeed all-reduces its buckets there, too), at stage 3 reduce-scattered in every micro-step. Stages 1
    and 2 gather the trained weights at the step's end; stage 3 gathers all weights in forward and backward, and once
    more where blocks run again.
    """
    s, stage, nodes = 2 if half else 4, setting.zero_stage, setting.nodes
    trained, bucket = facts.num_trained, min(setting.reduce_bucket, facts.num_trained)
    if stage == 0:
        bucket = min(trained, SMALL_ALL_REDUCE)
    buckets = -(-trained // bucket)
    reduce_once = buckets * ring(4.0 * trained / buckets, hardware, nodes)
    if stage <= 1:
        reduced, hidden = 2 * reduce_once, False
    elif stage == 2:
        reduced, hidden = 2 * reduce_once * micro_steps, setting.overlaps
    else:
        passes = 3 if "language_model" in setting.recompute else 2
        blocks = facts.language.layers + facts.vision.layers
        gather = blocks * ring(s * facts.num_parameters / blocks, hardware, nodes)
        reduced, hidden = (reduce_once + passes * gather) * micro_steps, setting.overlaps
    exposed = max(0.0, reduced - OVERLAP * busy) if hidden else reduced
    closing = ring(float(s * trained), hardware, nodes) if stage in (1, 2) else 0.0
    return exposed + closing


def adding_up(facts: ModelFacts, setting: Setting, hardware: Hardware, *, half: bool) -> float:
    """Seconds after a micro-step's backward pass until its gradients are in the step's fp32 sum, bound by memory.

    From stage 2 on each is copied into a bucket (2 s), and the rank's share of the buckets read and added to the sum
    (s + 8); below, all of them are added where they are.
    """
    s = 2 if half else 4
    if setting.zero_stage < 2:
        moved = float(facts.num_trained * (s + 8))
    else:
        moved = facts.num_trained * (2 * s + (s + 8) / (setting.nodes * hardware.gpus_per_node))
    return moved / (hardware.memory_gb_s * 1e9 * MEMORY_SHARE)


def optimizer(facts: ModelFacts, setting: Setting, hardware: Hardware, *, half: bool) -> float:
    """Seconds of AdamW's step, which memory's rate bounds.

    A trained element of the rank's share: two moments and the fp32 weight are read and written (24), its gradient is
    read for its norm, clipped, flattened and read again (20), its weight written (s). Offloaded, the host does it with
    its node's share of memory, and gradient and weight cross the link.
    """
    s = 2 if half else 4
    share = facts.num_trained / (1 if setting.zero_stage == 0 else setting.nodes * hardware.gpus_per_node)
    if setting.offloads_optimizer:
        on_host = share * (28 + s) / (hardware.host_memory_gb_s * 1e9 / hardware.gpus_per_node * MEMORY_SHARE)
        return on_host + share * (4 + s) / (hardware.host_link_gb_s * 1e9)
    return share * (44 + s) / (hardware.memory_gb_s * 1e9 * MEMORY_SHARE)


def saving(facts: ModelFacts, setting: Setting, hardware: Hardware, *, half: bool) -> float:
    """Seconds of one checkpoint: what the first node writes, at its rate to the disk.

    Optimizer 12 T / R a rank (8 T without ZeRO, by one rank); weights s P by one rank, at stage 3 / R by each.
    """
    s, gpus = 2 if half else 4, hardware.gpus_per_node
    weights, num_ranks = float(s * facts.num_parameters), setting.nodes * gpus
    if setting.zero_stage == 0:
        return (weights + 8.0 * facts.num_trained) / (hardware.disk_gb_s * 1e9)
    if setting.zero_stage == 3:
        weights /= setting.nodes
    return (weights + 12.0 * facts.num_trained * gpus / num_ranks) / (hardware.disk_gb_s * 1e9)
