"""Estimates the memory of a rank by kind from the model's counts, the settings and the largest row.

The formulas follow the sources of torch, transformers and DeepSpeed (0.19); tests compare them with the tensors that
autograd saves and with the memory of processes. In formulas, P is the number of parameters, T that of the trained ones,
R that of the ranks, and s the bytes of a weight (2 in bf16, 4 in fp32).
"""

from dataclasses import dataclass

from llava_next.model.loss import CHUNK_LOGITS
from llava_next.model.towers import TOWER_FAMILIES
from train.plan.execution_settings import ExecutionSettings
from train.plan.model_facts import LanguageShape, ModelFacts, VisionShape

FRAGMENTATION = 0.05
"""Fraction of the temporary memory on a GPU that torch's allocator loses to fragmentation. Assumed. On a CPU, malloc
does not return memory: a row's activations still count in the AdamW step (measured with scripts/bench/plan.py)."""

LOGIT_BYTES = 12
"""Peak bytes per logit, in fp32: the log-probability and two gradients of that size (loss.py, cross entropy)."""

_MAIN_DTYPE_BYTES = 4
"""Bytes per element of the optimizer's weights and of gradients, for any dtype of the weights (deepspeed_engine.py)."""


@dataclass(frozen=True)
class Row:
    """The lengths of a row: tokens, tiles and supervised tokens."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank.

    Attributes:
        kinds: bytes by kind at the peak.
        peak: moment of the peak: backward, reduce or step.
        host: host memory of all ranks of a node, in bytes (offloading, and the model while it is built).
    """

    kinds: dict[str, float]
    peak: str
    host: float

    @property
    def total(self) -> float:
        """Peak memory in bytes."""
        return sum(self.kinds.values())


def estimate_memory(
    facts: ModelFacts,
    settings: ExecutionSettings,
    row: Row,
    *,
    num_ranks: int,
    half: bool,
    on_gpu: bool,
    margin: bool = True,
) -> Memory:
    """Computes the memory at three moments and returns the largest.

    backward: weights, optimizer states, gradients, all activations of a row, and buckets (on a GPU only, since a CPU
        has not touched them yet).
    reduce: at the end of the backward pass: no activations; the new gradients in addition to the accumulated ones.
    step: no activations; the gradients of one group flattened for AdamW.

    Args:
        row: the largest row of the run.
        half: whether the weights are bf16.
        margin: include the fragmentation of the allocator.
    """
    s = 2 if half else 4
    resident = estimate_states(facts, settings, num_ranks=num_ranks, half=half)
    if not on_gpu:
        resident["weights"] += _MAIN_DTYPE_BYTES * facts.upper_tower
    row_kinds = estimate_activations(facts, settings, row, half=half, on_gpu=on_gpu)
    bucket = estimate_bucket_bytes(facts, settings, half=half)
    gathered = estimate_gathered_bytes(facts, settings, num_ranks, half=half)
    fresh = float(s * facts.num_trained / num_ranks) if settings.zero_stage == 2 else 0.0
    moments = {
        "backward": {**resident, **row_kinds, "buffers": gathered + (bucket if on_gpu else 0.0)},
        "reduce": {**resident, "buffers": gathered + bucket + fresh},
        "step": {**resident, "buffers": estimate_step_bytes(facts, settings, num_ranks)},
    }
    if margin:
        _add_margin(moments, resident, sum(row_kinds.values()), on_gpu=on_gpu)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(
        {kind: float(value) for kind, value in moments[peak].items()},
        peak,
        estimate_host_bytes(facts, settings, s, num_ranks, -(-num_ranks // settings.nodes)),
    )


def _add_margin(moments: dict[str, dict[str, float]], resident: dict[str, float], row: float, *, on_gpu: bool) -> None:
    """Adds `fragmentation` to the moments; `row` is the size of a row's activations in bytes."""
    if not on_gpu:
        moments["step"]["fragmentation"] = row
        return
    for kinds in moments.values():
        kinds["fragmentation"] = FRAGMENTATION * sum(value for kind, value in kinds.items() if kind not in resident)


def estimate_states(facts: ModelFacts, settings: ExecutionSettings, *, num_ranks: int, half: bool) -> dict[str, float]:
    """Returns the bytes that are always on the device (ZeRO, Rajbhandari et al. 2020, with fp32 gradients).

    Weights: s P, at stage 3 s P / R, and s P / N more with a copy of the weights in every N ranks of a node (hpZ). An
    update frees the trained part of the copy, and the next forward pass allocates it again. Gradients: 4 T, from stage
    2 on 4 T / R (stage 1 accumulates all of them, since this engine reduces at the step). Optimizer: AdamW's moments,
    8 T; from stage 1 on 8 T / R and a copy of the weights, 4 T / R (also of fp32 weights). Offloaded states are on the
    host.
    """
    s, stage, trained = 2 if half else 4, settings.zero_stage, facts.num_trained
    share = 1 / num_ranks
    weights = s * facts.num_parameters * (share if stage == 3 else 1.0)
    gradients = _MAIN_DTYPE_BYTES * trained * (share if stage >= 2 else 1.0)
    optimizer = 8.0 * trained if stage == 0 else 12.0 * trained * share
    if settings.offloads_parameters:
        weights = 0.0
    if (ranks_per_copy := settings.ranks_per_copy(num_ranks)) > 1:
        weights += s * facts.num_parameters / ranks_per_copy
    if settings.offloads_optimizer:
        optimizer = 0.0
        gradients = 0.0 if stage >= 2 else gradients
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def estimate_bucket_bytes(facts: ModelFacts, settings: ExecutionSettings, *, half: bool) -> float:
    """Returns the bytes of the gradient buckets.

    A bucket has at most T elements in the dtype of the weights and a copy in fp32 for communication. With overlap there
    are two. Below stage 2 the accumulated gradients are reduced in place at the step, without buckets.
    """
    if settings.zero_stage < 2:
        return 0.0
    bucket = min(settings.reduce_bucket, facts.num_trained)
    return float(bucket * (2 + _MAIN_DTYPE_BYTES if half else 4) * (2 if settings.overlaps else 1))


def estimate_gathered_bytes(facts: ModelFacts, settings: ExecutionSettings, num_ranks: int, *, half: bool) -> float:
    """Returns the bytes of other ranks' parameters that stage 3 keeps gathered: at least those of two blocks."""
    if settings.zero_stage < 3:
        return 0.0
    alive = min(facts.num_parameters, max(settings.live_parameters, 2 * facts.largest_block))
    return (2 if half else 4) * alive * (1 - 1 / num_ranks)


def estimate_step_bytes(facts: ModelFacts, settings: ExecutionSettings, num_ranks: int) -> float:
    """Returns the additional bytes of the AdamW step: the flattened gradients of the largest group, 4 bytes each.

    At stage 0 the gradients are flattened for the all-reduce, at most a bucket of DeepSpeed's default size at a time.
    At stage 3 a group is split into pieces of at most sub_group_size elements before it is partitioned.
    """
    if settings.offloads_optimizer:
        return 0.0
    group = float(facts.largest_group)
    if settings.zero_stage == 0:
        return _MAIN_DTYPE_BYTES * min(group, 500_000_000)
    if settings.zero_stage == 3:
        group = min(group, float(settings.zero.get("sub_group_size", 1_000_000_000)))
    return _MAIN_DTYPE_BYTES * group / num_ranks


def estimate_host_bytes(
    facts: ModelFacts, settings: ExecutionSettings, weight_bytes: int, num_ranks: int, ranks_per_node: int = 1
) -> float:
    """Returns the host memory of all ranks of a node, in bytes.

    It is the larger of the model, which rank 0 builds on the host, and the offloaded states: per rank AdamW's 12 T / R
    and the gradients' 4 T / R, and at stage 3 the weights' s P / R.
    """
    offloaded = 16.0 * facts.num_trained / num_ranks if settings.offloads_optimizer else 0.0
    if settings.offloads_parameters:
        offloaded += weight_bytes * facts.num_parameters / num_ranks
    built = float(weight_bytes * (facts.num_parameters + facts.upper_tower))
    return max(built, offloaded * ranks_per_node)


def estimate_activations(
    facts: ModelFacts, settings: ExecutionSettings, row: Row, *, half: bool, on_gpu: bool
) -> dict[str, float]:
    """Returns the bytes of a row's activations by part, and those of logits and temporary tensors.

    A compiled tower is computed as a plain one, since it saves hardly less (plan_gpu.json, gpu_h200.json). A part with
    adapters is computed as a fully trained one, which saves 1.1 (adapters in every layer) to 1.5 times as much.
    """
    recompute, compiled = settings.recompute, settings.compile
    trains = {part: count > 0 for part, count in facts.trained.items()}
    s = 2 if half else 4
    language, vision = facts.language, facts.vision
    trained = trains["language_model"]
    block = language_block_bytes(language, trained=trained, half=half, joins_outputs=not on_gpu)
    if "language_model" in compiled:
        block = compiled_block_bytes(language, half=half)
    recomputes = "language_model" in recompute
    saved = s * language.width if recomputes else block
    last_norm = norm_bytes(language, trained=trained, half=half)
    language_bytes = row.tokens * (language.layers * saved + last_norm)
    if not recomputes:
        mlp = mlp_bytes(language, trained=trained, half=half)
        if "language_model" in compiled:
            mlp = 2.0 * s * language.mlp
        # The last block saves its MLP's tensors for supervised tokens only. On a CPU the same holds for its queries,
        # attention outputs and log-sums (llava_next/model/supervised_last_block.py).
        attention = 0 if on_gpu else s * language.query * (2 + trained) + 4 * language.heads
        language_bytes -= (row.tokens - row.supervised) * (mlp + attention)
    working = row.tokens * (block if recomputes else 0.0) + row.tokens * language_work_bytes(language, half=half)

    tile_tokens = row.tiles * (vision.patches + vision.prefix)
    vision_block = vision_block_bytes(vision, half=half)
    if not trains["vision_tower"]:
        vision_bytes = 0.0
    elif "vision_tower" in recompute:
        vision_bytes = tile_tokens * s * vision.width * vision.layers
        working = max(working, tile_tokens * vision_block)
    else:
        vision_bytes = tile_tokens * vision_block * vision.layers
    pixels = row.tiles * vision.tile**2 * 3 * (1 + (s if trains["vision_tower"] else 0))
    # The projector saves its input, and the input and output of GELU.
    projector = row.tiles * vision.patches * s * (vision.width + 2 * language.width) if trains["projector"] else 0.0
    logits = LOGIT_BYTES * min(row.supervised * language.vocabulary, CHUNK_LOGITS)
    if facts.trains_head:
        logits += s * language.vocabulary * language.width  # the head's gradient, which exists at the same time
    return {
        "activations: vision": float(vision_bytes + pixels),
        "activations: projector": float(projector),
        "activations: language": float(language_bytes),
        # The backward pass of the head ends before that of the last block begins.
        "logits and work": float(max(logits, working)),
    }


def language_block_bytes(shape: LanguageShape, *, trained: bool, half: bool, joins_outputs: bool) -> float:
    """Returns the bytes that autograd saves per token in one block of a Llama-like decoder.

    Attention saves queries, keys, values and its output (s bytes per element) and a log-sum per head (4 bytes).

    Args:
        joins_outputs: SDPA runs per sample and its outputs are concatenated, which a trained output projection saves.
        fused: the fused elementwise kernels are used; see `norm_bytes` and `mlp_bytes`.
    """
    s = 2 if half else 4
    attention = s * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    if joins_outputs and trained:
        attention += s * shape.query
    kinds = {"trained": trained, "half": half}
    return 2 * norm_bytes(shape, **kinds) + attention + mlp_bytes(shape, **kinds)


def norm_bytes(shape: LanguageShape, *, trained: bool, half: bool) -> float:
    """Returns the bytes that an RMS norm saves per token.

    It saves its input in fp32 (4 D). If trained, it also saves the factor of its weight (s D) and its output, which the
    projections read (s D).
    """
    s = 2 if half else 4
    return float(4 * shape.width + (2 * s * shape.width if trained else 0))


def mlp_bytes(shape: LanguageShape, *, trained: bool, half: bool) -> float:
    """Returns the bytes that a gated MLP saves per token.

    It saves the input of SiLU, its output and the other factor (s I each), and if trained the product
    (s I).
    """
    s = 2 if half else 4
    return float(s * shape.mlp * (3 + trained))


def compiled_block_bytes(shape: LanguageShape, *, half: bool) -> float:
    """Returns the bytes that autograd saves per token in a block that is compiled with torch.compile.

    It saves the inputs of both norms, queries, keys, values, the output and log-sums of attention, and the factors of
    the MLP's product; elementwise results are recomputed.
    """
    s = 2 if half else 4
    return float(s * (2 * shape.width + 2 * shape.query + 2 * shape.key + 2 * shape.mlp) + 4 * shape.heads)


def language_work_bytes(shape: LanguageShape, *, half: bool) -> float:
    """Returns the temporary bytes per token in the backward pass of a block.

    These are the gradients of the MLP's three inner tensors, two of the residual stream, and in bf16 those of a norm in
    fp32.
    """
    s = 2 if half else 4
    return float(s * (3 * shape.mlp + 2 * shape.width) + (8 * shape.width if half else 0))


def vision_block_bytes(shape: VisionShape, *, half: bool) -> float:
    """Returns the bytes that autograd saves per token of a tile in one trained block of a tower.

    Two layer norms save input and output (4 W), attention saves queries, keys, values and output (4 W), the MLP saves
    input and output of its activation (2 M), quick GELU also its sigmoid (M), and DINO's layer scales
    save their inputs (2 W).
    """
    s = 2 if half else 4
    widths = 8 + (2 if TOWER_FAMILIES[shape.kind].has_layer_scale else 0)
    return float(s * (widths * shape.width + (3 if shape.quick_gelu else 2) * shape.mlp))
