"""Bytes that the ranks exchange in one optimizer step, from the engine's settings and the counts of the model.

The formulas are those of DeepSpeed 0.19.8, as tests record its collectives. This module imports neither torch nor
DeepSpeed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.engine.node_sharding import KEY

REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default of stage3_max_reuse_distance, in elements."""


@dataclass(frozen=True)
class Volume:
    """Bytes of the collectives of one step.

    A collective counts what goes once round a ring of its ranks: an all-gather, reduce-scatter or reduce the size of
    the whole tensor, an all-reduce twice that. A link of a ring of R ranks carries (R - 1) / R of it.

    Attributes:
        all_ranks: in groups of all ranks, so between nodes if there are several.
        node: in groups of the ranks of a node.
    """

    all_ranks: float
    node: float


@dataclass(frozen=True)
class Counts:
    """Elements of the model by their part in a step.

    Attributes:
        parameters: of all parameters.
        trained: of the trained ones.
        backward: of the parameters that ZeRO-3 gathers once more for the backward pass: those of all modules whose
            output has a gradient, so all from the first trained part on, without frozen embeddings.
        persistent: of those that ZeRO-3 never frees, because they are smaller than its threshold.
    """

    parameters: int
    trained: int
    backward: int
    persistent: int = 0


def step_volume(
    zero: Mapping[str, Any], counts: Counts, *, micro_steps: float, half: bool, reduce_bytes: int
) -> Volume:
    """Returns the bytes of one step, without its messages of a few numbers.

    Stages 0 and 1 reduce the accumulated gradients once per step, stages 2 and 3 those of every micro-step. Stages 1
    and 2 gather the trained weights after the update. Stage 3 gathers all weights in every forward and backward pass,
    but for those that the backward pass uses soon after the forward pass (half of `stage3_max_reuse_distance`, in whole
    modules). The second forward pass of recompute takes no gather of its own as long as two blocks are not larger than
    that distance: it leaves a block's weights for the backward pass beside it. With a
    copy in every node, the first gather of a trained weight after an update is over all ranks, and any other inside the
    node.

    Args:
        zero: DeepSpeed's `zero_optimization`, as the engine gets it.
        micro_steps: rows of each rank in a step.
        half: whether the weights are bf16.
        reduce_bytes: bytes of an element in a reduction (`communication_data_type`): 2 or 4.
    """
    stage, weight_bytes = int(zero.get("stage", 0)), 2 if half else 4
    gradients = float(reduce_bytes * counts.trained)
    if stage < 3:
        # In bf16, stage 1 has an optimizer of its own, which knows all-reduce only.
        reduces_to_owner = not zero.get("use_multi_rank_bucket_allreduce", True) and (stage == 2 or not half)
        scatters = stage > 0 and zero.get("reduce_scatter", True)
        reductions = (1 if reduces_to_owner and scatters else 2) * (micro_steps if stage == 2 else 1)
        return Volume(reductions * gradients + (weight_bytes * counts.trained if stage else 0), 0.0)
    reused = zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2
    persistent = counts.persistent
    passes = counts.parameters - persistent + max(0.0, counts.backward - persistent - reused)
    gathers, updated = micro_steps * passes, max(0, counts.trained - persistent)
    reduced = gradients * micro_steps * (1 if zero.get("reduce_scatter", True) else 2)
    if (zero.get(KEY, 1) or 1) == 1:
        return Volume(weight_bytes * (gathers + persistent) + reduced, 0.0)
    return Volume(weight_bytes * (updated + persistent) + reduced, weight_bytes * (gathers - updated))
