"""Computes the seconds of a step by kind from rows, FLOPs, and the rates of the hardware.

FLOPs come from `llava_next/model/flops.py`, rates from the hardware file, and further assumptions are constants here.
In formulas, R is the number of ranks, T the trained parameters, P all parameters, and s the bytes of a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware
from train.plan.model_facts import ModelFacts
from train.plan.simulated_steps import StepRows

LINK_SHARE = 0.8
"""Fraction of a link's rate that a collective with large messages reaches. Assumed."""
OVERLAP = 0.7
"""Fraction of a step's computation that overlapped communication can be hidden behind. Assumed."""
MEMORY_SHARE = 0.8
"""Fraction of the memory bandwidth that AdamW reaches. Assumed."""
PLAIN_SHARE = 0.87
"""Rate of plain blocks on a GPU relative to compiled ones (results/gpu_h100_kernels.json: 35.5 of 41.0 %)."""
TILES_PER_CORE_S = 600.0
"""Tiles that a core decodes and cuts per second (scripts/bench/results/input.json: 494 tiles in 0.81 s)."""
SMALL_ALL_REDUCE = 500_000_000
"""Elements of an all-reduce without ZeRO (DeepSpeed's deepspeed.py, MEMORY_OPT_ALLREDUCE_SIZE)."""

COMPUTING = ("vision", "language", "attention", "head")
"""The kinds that compute the samples; all others are overhead."""

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepTime:
    """The mean duration of a step.

    Attributes:
        kinds: seconds by kind.
        balance: mean over maximum of the ranks' computation time.
        mfu: FLOPs without recompute, relative to the dense rate.
        flops: of a step on all ranks, without recompute.
        samples, micro_steps: means per step.
        hidden_s: seconds of communication that are assumed to be hidden behind computation; not part of `kinds`.
    """

    kinds: dict[str, float]
    balance: float
    mfu: float
    flops: float
    samples: float
    micro_steps: float
    hidden_s: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.kinds.values())

    @property
    def total_without_overlap(self) -> float:
        """Seconds of a step if computation hides no communication."""
        return self.total + self.hidden_s

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.total


def estimate_step_time(
    facts: ModelFacts,
    settings: ExecutionSettings,
    steps: Sequence[StepRows],
    hardware: Hardware,
    *,
    half: bool,
    workers: int,
    save_every: int,
) -> StepTime:
    """Estimates the mean duration of some steps.

    A micro-step takes as long as its slowest rank: the computing kinds are means over the ranks, and `balance` is the
    additional time of the slowest. Input is prefetched, so only the time beyond the step itself counts.
    """
    num_ranks = settings.nodes * hardware.gpus_per_node
    rate = hardware.flops_per_s(half=half)
    kinds = dict.fromkeys((*COMPUTING, "recompute", "balance"), 0.0)
    useful = tiles = micro_steps = samples = 0.0
    for step in steps:
        seconds, flops = estimate_computation(
            facts, settings.recompute, step, hardware, half=half, compiled=settings.compile
        )
        totals = np.stack(list(seconds.values())).sum(axis=0)
        for kind, values in seconds.items():
            kinds[kind] += float(values.mean(axis=1).sum())
        kinds["balance"] += float((totals.max(axis=1) - totals.mean(axis=1)).sum())
        useful += flops
        tiles += float(step.sums[..., 2].sum())
        micro_steps += len(step.sums)
        samples += float(step.samples.sum())
    count = len(steps)
    kinds = {kind: value / count for kind, value in kinds.items()}
    compute_s = sum(kinds.values())
    kinds["communication"], hidden_s = estimate_communication(
        facts, settings, hardware, micro_steps / count, compute_s, half=half
    )
    kinds["gradients"] = micro_steps / count * estimate_accumulation(facts, settings, hardware, half=half)
    kinds["optimizer"] = estimate_optimizer(facts, settings, hardware, half=half)
    cores = min(max(workers, 1), max(1.0, hardware.cores_per_node / hardware.gpus_per_node))
    input_s = tiles / count / num_ranks / (cores * TILES_PER_CORE_S)
    kinds["input"] = input_s if not workers else max(0.0, input_s - sum(kinds.values()))
    kinds["save"] = estimate_saving(facts, settings, hardware, half=half) / save_every if save_every else 0.0
    total = sum(kinds.values())
    computed_s = sum(kinds[kind] for kind in (*COMPUTING, "recompute"))
    return StepTime(
        kinds,
        balance=computed_s / (computed_s + kinds["balance"]),
        mfu=useful / count / (total * num_ranks * rate),
        flops=useful / count,
        samples=samples / count,
        micro_steps=micro_steps / count,
        hidden_s=hidden_s,
    )


def estimate_computation(
    facts: ModelFacts,
    recompute: Sequence[str],
    step: StepRows,
    hardware: Hardware,
    *,
    half: bool,
    compiled: Sequence[str] = (),
) -> tuple[dict[str, Seconds], float]:
    """Estimates the computation of a step.

    A row's FLOPs are those of `facts.costs` and of the head at supervised positions: 2 D V per pass, with three passes
    if it is trained and two if not. Recompute adds one forward pass of a part's blocks.

    Returns:
        Seconds by kind, [num_micro_steps, num_ranks] each, and the FLOPs of the step without recompute.
    """
    costs, rate = facts.costs, hardware.flops_per_s(half=half)
    tokens, squared, tiles, supervised = np.moveaxis(step.sums, 2, 0)
    passes = 3 if facts.trains_head else 2
    head = 2.0 * facts.language.width * facts.language.vocabulary * passes
    flops = {
        "vision": tiles * costs.tile,
        "language": tokens * costs.token + supervised * costs.target,
        "attention": squared / 2 * costs.pair,
        "head": supervised * head,
    }
    plain_share = PLAIN_SHARE if hardware.device == "cuda" else 1.0
    vision_share = hardware.vision_share * (1.0 if "vision_tower" in compiled else plain_share)
    shares = {
        "vision": vision_share,
        "language": hardware.language_share * (1.0 if "language_model" in compiled else plain_share),
        "attention": hardware.attention_share,
        "head": hardware.language_share,
    }
    seconds = {kind: value / (rate * shares[kind]) for kind, value in flops.items()}
    recompute_s = np.zeros_like(tokens)
    if "language_model" in recompute:
        recompute_s += seconds["language"] / passes + seconds["attention"] / 3
    if "vision_tower" in recompute and facts.trained["vision_tower"]:
        projector = 6.0 * facts.vision.patches * facts.parameters["projector"]
        recompute_s += tiles * (costs.tile - projector) / 3 / (rate * vision_share)
    return seconds | {"recompute": recompute_s}, float(sum(value.sum() for value in flops.values()))


def estimate_ring(num_bytes: float, hardware: Hardware, nodes: int) -> float:
    """Returns the seconds of one all-gather or reduce-scatter of that many bytes (an all-reduce takes twice as long).

    A ring of R ranks takes R - 1 hops and moves (R - 1) / R of the bytes through every link (Thakur, Rabenseifner,
    Gropp 2005). Between nodes, every node uses all of its ports together, as NCCL's parallel rings do.
    """
    num_ranks = nodes * hardware.gpus_per_node
    if num_ranks == 1:
        return 0.0
    rate = min(hardware.link_gb_s, hardware.network_gb_s) if nodes > 1 else hardware.link_gb_s
    node_hops = nodes if nodes > 1 else 0
    latency = (num_ranks - 1 - node_hops) * hardware.link_latency_us + node_hops * hardware.network_latency_us
    return (num_ranks - 1) / num_ranks * num_bytes / (rate * 1e9 * LINK_SHARE) + max(0.0, latency) * 1e-6


def estimate_communication(
    facts: ModelFacts,
    settings: ExecutionSettings,
    hardware: Hardware,
    micro_steps: float,
    compute_s: float,
    *,
    half: bool,
) -> tuple[float, float]:
    """Returns the seconds of a step that ranks wait for communication, and those that computation is assumed to hide.

    Gradients are communicated in fp32. At stages 0 and 1 they are all-reduced once per step, at stage 2 in every
    micro-step (where DeepSpeed all-reduces its buckets too), at stage 3 reduce-scattered in every micro-step. Stages 1
    and 2 all-gather the trained weights at the end of the step; stage 3 all-gathers all weights in forward and
    backward, and once more with recompute.
    """
    s, stage, nodes = 2 if half else 4, settings.zero_stage, settings.nodes
    trained = facts.num_trained
    bucket = settings.reduce_bucket(nodes * hardware.gpus_per_node, trained)
    if stage == 0:
        bucket = min(trained, SMALL_ALL_REDUCE)
    buckets = -(-trained // bucket)
    reduce_once = buckets * estimate_ring(4.0 * trained / buckets, hardware, nodes)
    if stage <= 1:
        total, overlaps = 2 * reduce_once, False
    elif stage == 2:
        total, overlaps = 2 * reduce_once * micro_steps, settings.overlaps
    else:
        passes = 3 if "language_model" in settings.recompute else 2
        blocks = facts.language.layers + facts.vision.layers
        gather = blocks * estimate_ring(s * facts.num_parameters / blocks, hardware, nodes)
        total, overlaps = (reduce_once + passes * gather) * micro_steps, settings.overlaps
    hidden = min(total, OVERLAP * compute_s) if overlaps else 0.0
    final_gather = estimate_ring(float(s * trained), hardware, nodes) if stage in (1, 2) else 0.0
    return total - hidden + final_gather, hidden


def estimate_accumulation(facts: ModelFacts, settings: ExecutionSettings, hardware: Hardware, *, half: bool) -> float:
    """Returns the seconds to accumulate a micro-step's gradients in fp32, which memory bandwidth bounds.

    From stage 2 on, each gradient is copied into a bucket (2 s bytes), and the rank's share of the buckets is read and
    added (s + 8 bytes). At lower stages all gradients are added in place.
    """
    s = 2 if half else 4
    if settings.zero_stage < 2:
        moved = float(facts.num_trained * (s + 8))
    else:
        moved = facts.num_trained * (2 * s + (s + 8) / (settings.nodes * hardware.gpus_per_node))
    return moved / (hardware.memory_gb_s * 1e9 * MEMORY_SHARE)


def estimate_optimizer(facts: ModelFacts, settings: ExecutionSettings, hardware: Hardware, *, half: bool) -> float:
    """Returns the seconds of the AdamW step, which memory bandwidth bounds.

    Per trained element of the rank's share, two moments and the fp32 weight are read and written (24 bytes), the
    gradient is read for its norm, clipped, flattened and read again (20 bytes), and the weight is written (s bytes).
    With offloading, the host does this with its share of the node's bandwidth, and gradient and weight cross the link.
    """
    s = 2 if half else 4
    share = facts.num_trained / (1 if settings.zero_stage == 0 else settings.nodes * hardware.gpus_per_node)
    if settings.offloads_optimizer:
        on_host = share * (28 + s) / (hardware.host_memory_gb_s * 1e9 / hardware.gpus_per_node * MEMORY_SHARE)
        return on_host + share * (4 + s) / (hardware.host_link_gb_s * 1e9)
    return share * (44 + s) / (hardware.memory_gb_s * 1e9 * MEMORY_SHARE)


def estimate_saving(facts: ModelFacts, settings: ExecutionSettings, hardware: Hardware, *, half: bool) -> float:
    """Returns the seconds of one checkpoint: the bytes that the first node writes over its rate to the disk.

    The optimizer takes 12 T / R bytes per rank (8 T of one rank without ZeRO), the weights s P of one rank (s P / R of
    each at stage 3).
    """
    s, gpus = 2 if half else 4, hardware.gpus_per_node
    weights, num_ranks = float(s * facts.num_parameters), settings.nodes * gpus
    if settings.zero_stage == 0:
        return (weights + 8.0 * facts.num_trained) / (hardware.disk_gb_s * 1e9)
    if settings.zero_stage == 3:
        weights /= settings.nodes
    return (weights + 12.0 * facts.num_trained * gpus / num_ranks) / (hardware.disk_gb_s * 1e9)
