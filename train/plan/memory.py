"""Bytes of a rank by kind, from a model's facts, a setting and the largest row. Pure arithmetic.

Owns the formulas. They follow what this code keeps, read in torch's, transformers' and DeepSpeed's sources (0.19), and
tests hold them to what autograd saves and to what processes really use. P is the number of parameters, T the trained
ones, R the ranks, s the bytes of a weight (2 in bf16, 4 in fp32); a row has t tokens and n tiles.
"""

from dataclasses import dataclass

from llava_next.model.loss import CHUNK_LOGITS
from train.plan.model_facts import LanguageShape, ModelFacts, VisionShape
from train.plan.setting import Setting

FRAGMENTATION = 0.05
"""Of what comes and goes on a GPU, the share that torch's allocator loses between blocks. Assumed. A CPU's malloc gives
nothing back: a row's activations are still the process's when AdamW steps (seen with scripts/bench/plan.py)."""

LOGIT_BYTES = 12
"""Of a logit, at the most, in fp32: its log-probability, and two gradients of that size (loss.py, cross entropy)."""

_MAIN_DTYPE_BYTES = (
    4  # of the optimizer's copy and of gradients, whatever the weights are (train/engine/deepspeed_engine.py)
)


@dataclass(frozen=True)
class Row:
    """The largest row of a run: tokens, tiles, and tokens that are supervised."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the moment when most is held, by kind; and of its share of the host.

    Attributes:
        kinds: adds up to `total`.
        peak: which moment that is: backward, reduce or step.
        host: bytes on the host, all ranks of a node together (offload, and the model while it is built).
    """

    kinds: dict[str, float]
    peak: str
    host: float

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def memory_of(
    facts: ModelFacts, setting: Setting, row: Row, *, num_ranks: int, half: bool, on_gpu: bool, margin: bool = True
) -> Memory:
    """The moments of a run that can be the fullest, and the fullest of them.

    backward: weights, states, gradients, all of a row's activations, empty buckets (which a CPU has not touched yet).
    reduce: the end of a backward pass: no activations, a pass's fresh gradients beside the accumulated ones.
    step: no activations; gradients flattened for AdamW, one group at a time.

    `margin`: with what the allocator does not give back, which no formula knows.
    """
    s = 2 if half else 4
    held = states(facts, setting, num_ranks=num_ranks, half=half)
    if not on_gpu:
        held["weights"] += _MAIN_DTYPE_BYTES * facts.upper_tower
    row_kinds = activations(facts, setting, row, half=half, on_gpu=on_gpu)
    bucket, gathered = bucket_bytes(facts, setting, half=half), gathered_bytes(facts, setting, num_ranks, half=half)
    fresh = float(s * facts.num_trained / num_ranks) if setting.zero_stage == 2 else 0.0
    moments = {
        "backward": {**held, **row_kinds, "buffers": gathered + (bucket if on_gpu else 0.0)},
        "reduce": {**held, "buffers": gathered + bucket + fresh},
        "step": {**held, "buffers": step_bytes(facts, setting, num_ranks)},
    }
    if margin:
        _add_margin(moments, held, sum(row_kinds.values()), on_gpu=on_gpu)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(
        {kind: float(value) for kind, value in moments[peak].items()},
        peak,
        host_bytes(facts, setting, s, num_ranks, -(-num_ranks // setting.nodes)),
    )


def _add_margin(moments: dict[str, dict[str, float]], held: dict[str, float], row: float, *, on_gpu: bool) -> None:
    """Writes `fragmentation` into the moments; `row` are the bytes of a row's activations."""
    if not on_gpu:
        moments["step"]["fragmentation"] = row
        return
    for kinds in moments.values():
        kinds["fragmentation"] = FRAGMENTATION * sum(value for kind, value in kinds.items() if kind not in held)


def states(facts: ModelFacts, setting: Setting, *, num_ranks: int, half: bool) -> dict[str, float]:
    """What lies on the device all the time (ZeRO, Rajbhandari et al. 2020, with fp32 gradients).

    Weights s P, at stage 3 / R. Gradients 4 T, from stage 2 on / R (stage 1 accumulates all of them: this engine
    reduces at the step). Optimizer: AdamW's moments 8 T, from stage 1 on / R, and with it a copy of the weights 4 T / R
    (DeepSpeed keeps one beside fp32 weights, too). Offloaded states lie on the host.
    """
    s, stage, trained = 2 if half else 4, setting.zero_stage, facts.num_trained
    share = 1 / num_ranks
    weights = s * facts.num_parameters * (share if stage == 3 else 1.0)
    gradients = _MAIN_DTYPE_BYTES * trained * (share if stage >= 2 else 1.0)
    optimizer = 8.0 * trained if stage == 0 else 12.0 * trained * share
    if setting.offloads_parameters:
        weights = 0.0
    if setting.offloads_optimizer:
        optimizer = 0.0
        gradients = 0.0 if stage >= 2 else gradients
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def bucket_bytes(facts: ModelFacts, setting: Setting, *, half: bool) -> float:
    """Buckets of gradients on their way: at most T, in weights' type and once more in fp32 for the wire; two of them
    where reducing overlaps. Below stage 2 the gradients that were accumulated travel themselves, at the step."""
    if setting.zero_stage < 2:
        return 0.0
    bucket = min(setting.reduce_bucket, facts.num_trained)
    return float(bucket * (2 + _MAIN_DTYPE_BYTES if half else 4) * (2 if setting.overlaps else 1))


def gathered_bytes(facts: ModelFacts, setting: Setting, num_ranks: int, *, half: bool) -> float:
    """What of stage 3's whole parameters is other ranks': as many as it may keep alive, two blocks at least."""
    if setting.zero_stage < 3:
        return 0.0
    alive = min(facts.num_parameters, max(setting.live_parameters, 2 * facts.largest_block))
    return (2 if half else 4) * alive * (1 - 1 / num_ranks)


def step_bytes(facts: ModelFacts, setting: Setting, num_ranks: int) -> float:
    """What AdamW's step needs besides: the largest group's gradients flattened, 4 bytes each.

    At stage 0 gradients are flattened for the all-reduce, at most a bucket of DeepSpeed's default size at a time. At
    stage 3 a group is cut into pieces of at most sub_group_size elements before it is divided.
    """
    if setting.offloads_optimizer:
        return 0.0
    group = float(facts.largest_group)
    if setting.zero_stage == 0:
        return _MAIN_DTYPE_BYTES * min(group, 500_000_000)
    if setting.zero_stage == 3:
        group = min(group, float(setting.zero.get("sub_group_size", 1_000_000_000)))
    return _MAIN_DTYPE_BYTES * group / num_ranks


def host_bytes(
    facts: ModelFacts, setting: Setting, weight_bytes: int, num_ranks: int, ranks_per_node: int = 1
) -> float:
    """Of a node's ranks together on its host: the model, which rank 0 builds there for all, or what is offloaded (the
    more of both).

    Offloaded, of each rank: AdamW's 12 T / R and the gradients' 4 T / R; at stage 3 the weights, s P / R.
    """
    offloaded = 16.0 * facts.num_trained / num_ranks if setting.offloads_optimizer else 0.0
    if setting.offloads_parameters:
        offloaded += weight_bytes * facts.num_parameters / num_ranks
    built = float(weight_bytes * (facts.num_parameters + facts.upper_tower))
    return max(built, offloaded * ranks_per_node)


def activations(facts: ModelFacts, setting: Setting, row: Row, *, half: bool, on_gpu: bool) -> dict[str, float]:
    """What a row needs by the end of its forward pass and in the backward: by part, logits and work apart.

    A compiled tower is taken for a plain one: measured (plan_gpu.json, gpu_h200.json) it keeps hardly less. A part with
    adapters is taken for one that trains whole, which keeps 1.1 (adapters in every layer) to 1.5 times as much. On a
    CPU the kernels that a setting chooses are taken to run, as they do where there is a compiler.
    """
    recompute, compiled = setting.recompute, setting.compile
    joins = not on_gpu and (half or setting.attention == "sdpa")
    fused = not on_gpu and not half and setting.elementwise != "torch"
    trains = {part: count > 0 for part, count in facts.trained.items()}
    s = 2 if half else 4
    language, vision = facts.language, facts.vision
    trained = trains["language_model"]
    block = language_block_bytes(language, trained=trained, half=half, joins_outputs=joins, fused=fused)
    if "language_model" in compiled:
        block = compiled_block_bytes(language, half=half)
    redo = "language_model" in recompute
    kept = s * language.width if redo else block
    last_norm = norm_bytes(language, trained=trained, half=half, fused=fused)
    language_bytes = row.tokens * (language.layers * kept + last_norm)
    if not redo:
        mlp = mlp_bytes(language, trained=trained, half=half, fused=fused)
        if "language_model" in compiled:
            mlp = 2.0 * s * language.mlp
        # The last block keeps its MLP's for supervised tokens alone, and on a CPU, where attention looks for them, its
        # queries, outputs and log-sums too (llava_next/model/last_block.py).
        attention = 0 if on_gpu else s * language.query * (2 + (trained and joins)) + 4 * language.heads
        language_bytes -= (row.tokens - row.supervised) * (mlp + attention)
    working = row.tokens * (block if redo else 0.0) + row.tokens * language_work_bytes(language, half=half)

    tile_tokens = row.tiles * (vision.patches + vision.prefix)
    vision_block = vision_block_bytes(vision, half=half, fused=fused)
    if not trains["vision_tower"]:
        vision_bytes = 0.0
    elif "vision_tower" in recompute:
        vision_bytes = tile_tokens * s * vision.width * vision.layers
        working = max(working, tile_tokens * vision_block)
    else:
        vision_bytes = tile_tokens * vision_block * vision.layers
    pixels = row.tiles * vision.tile**2 * 3 * (1 + (s if trains["vision_tower"] else 0))
    # The projector keeps its input, and what goes into and comes out of GELU.
    projector = row.tiles * vision.patches * s * (vision.width + 2 * language.width) if trains["projector"] else 0.0
    logits = LOGIT_BYTES * min(row.supervised * language.vocabulary, CHUNK_LOGITS)
    if facts.trains_head:
        logits += s * language.vocabulary * language.width  # the head's gradient, while all else is still there
    return {
        "activations: vision": float(vision_bytes + pixels),
        "activations: projector": float(projector),
        "activations: language": float(language_bytes),
        # The head is done before the first block's backward begins.
        "logits and work": float(max(logits, working)),
    }


def language_block_bytes(shape: LanguageShape, *, trained: bool, half: bool, joins_outputs: bool, fused: bool) -> float:
    """What autograd saves of a token in one block of a Llama-like decoder: that of two norms, attention and the MLP.

    Attention keeps queries, keys, values, its output (s) and a log-sum of each head (4). `joins_outputs`: SDPA sample
    by sample joins its outputs in a copy, which a trained output projection keeps.
    """
    s = 2 if half else 4
    attention = s * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    if joins_outputs and trained:
        attention += s * shape.query
    kinds = {"trained": trained, "half": half, "fused": fused}
    return 2 * norm_bytes(shape, **kinds) + attention + mlp_bytes(shape, **kinds)


def norm_bytes(shape: LanguageShape, *, trained: bool, half: bool, fused: bool) -> float:
    """An RMS norm keeps its input in fp32 (4 D); trained, also what its weight is multiplied with (s D) and its output,
    which the projections read (s D). `fused`: not the former, but a number for each token (4)."""
    s = 2 if half else 4
    if fused:
        return float(4 * shape.width + 4 + (s * shape.width if trained else 0))
    return float(4 * shape.width + (2 * s * shape.width if trained else 0))


def mlp_bytes(shape: LanguageShape, *, trained: bool, half: bool, fused: bool) -> float:
    """A gated MLP keeps what enters SiLU, what leaves it unless it is `fused`, and the other factor (s I each);
    trained, the product (s I)."""
    s = 2 if half else 4
    return float(s * shape.mlp * (2 + (not fused) + trained))


def compiled_block_bytes(shape: LanguageShape, *, half: bool) -> float:
    """The same of a block that torch.compile has translated: what enters both norms, queries, keys, values, attention's
    output and log-sums, and what enters the MLP's product. What an elementwise kernel can make again it does not keep.
    """
    s = 2 if half else 4
    return float(s * (2 * shape.width + 2 * shape.query + 2 * shape.key + 2 * shape.mlp) + 4 * shape.heads)


def language_work_bytes(shape: LanguageShape, *, half: bool) -> float:
    """What the backward pass of a block needs for a token besides: gradients of the MLP's three inner tensors and of
    the stream, twice, and in bf16 a norm's in fp32."""
    s = 2 if half else 4
    return float(s * (3 * shape.mlp + 2 * shape.width) + (8 * shape.width if half else 0))


def vision_block_bytes(shape: VisionShape, *, half: bool, fused: bool) -> float:
    """What autograd saves of a tile's token in one trained block of a tower.

    Two layer norms keep input and output (4 W), attention queries, keys, values and output (4 W), the MLP what enters
    and leaves its activation (2 M), quick GELU unless it is `fused` its sigmoid besides (M), DINO's layer scales what
    they scale (2 W).
    """
    s = 2 if half else 4
    widths = 8 + (2 if shape.kind.startswith("dinov") else 0)
    return float(s * (widths * shape.width + (3 if shape.quick_gelu and not fused else 2) * shape.mlp))
