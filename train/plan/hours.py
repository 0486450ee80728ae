"""Computes the seconds of a step by kind from rows, FLOPs, and the rates of the hardware.

FLOPs come from `llava_next/model/flops.py`, rates from the hardware file, and further assumptions are constants here.
In formulas, R is the number of ranks, T the trained parameters, P all parameters, and s the bytes of a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.plan.communication import Communication, estimate_communication, list_collectives
from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware
from train.plan.model_facts import ModelFacts
from train.plan.saving import Save
from train.plan.simulated_steps import StepRows

MEMORY_SHARE = 0.8
"""Fraction of the memory bandwidth that AdamW reaches. Assumed."""
PLAIN_SHARE = 0.87
"""Rate of plain blocks on a GPU relative to compiled ones (results/gpu_h100_kernels.json: 35.5 of 41.0 %)."""
TILES_PER_CORE_S = 600.0
"""Tiles that a core decodes and cuts per second (scripts/bench/results/input.json: 494 tiles in 0.81 s)."""

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
        communication: of a step; `kinds` has its exposed seconds.
    """

    kinds: dict[str, float]
    balance: float
    mfu: float
    flops: float
    samples: float
    micro_steps: float
    communication: Communication

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.kinds.values())

    @property
    def total_without_overlap(self) -> float:
        """Seconds of a step if computation hides no communication."""
        return self.total + self.communication.hidden_s

    @property
    def communication_share(self) -> float:
        """Fraction of a step in which ranks wait for communication."""
        return self.communication.exposed_s / self.total

    @property
    def communication_share_without_overlap(self) -> float:
        """The same if computation hides no communication."""
        return self.communication.total_s / self.total_without_overlap

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
    save: Save | None = None,
    save_every: int = 0,
) -> StepTime:
    """Estimates the mean duration of some steps.

    A micro-step takes as long as its slowest rank: the computing kinds are means over the ranks, and `balance` is the
    additional time of the slowest. Input is prefetched, so only the time beyond the step itself counts.

    Args:
        save: one checkpoint; None: without saves.
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
    collectives = list_collectives(facts.tensors, settings, hardware.gpus_per_node, micro_steps / count, half=half)
    communication = estimate_communication(tuple(collectives), hardware, settings.nodes, compute_s)
    kinds["communication"] = communication.exposed_s
    kinds["gradients"] = micro_steps / count * estimate_accumulation(facts, settings, hardware, half=half)
    kinds["optimizer"] = estimate_optimizer(facts, settings, hardware, half=half)
    cores = min(max(workers, 1), max(1.0, hardware.cores_per_node / hardware.gpus_per_node))
    input_s = tiles / count / num_ranks / (cores * TILES_PER_CORE_S)
    kinds["input"] = input_s if not workers else max(0.0, input_s - sum(kinds.values()))
    kinds["save"] = save.seconds_per_step(save_every, sum(kinds.values())) if save else 0.0
    total = sum(kinds.values())
    computed_s = sum(kinds[kind] for kind in (*COMPUTING, "recompute"))
    return StepTime(
        kinds,
        balance=computed_s / (computed_s + kinds["balance"]),
        mfu=useful / count / (total * num_ranks * rate),
        flops=useful / count,
        samples=samples / count,
        micro_steps=micro_steps / count,
        communication=communication,
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
    tokens, attention, tiles, supervised = np.moveaxis(step.sums, 2, 0)
    passes = 3 if facts.trains_head else 2
    head = 2.0 * facts.language.width * facts.language.vocabulary * passes
    flops = {
        "vision": tiles * costs.tile,
        "language": tokens * costs.token + supervised * costs.target,
        "attention": attention,
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
