"""Owns the proofs about the memory formulas: states by hand, activations against what autograd really saves.

That whole processes use what is planned is proved by scripts/bench/plan.py (see test_plan_bench.py).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_next.config import AttentionKernel, ElementwiseKernel, LoraConfig, ModelConfig
from llava_next.kernels.cpu import elementwise as cpu_fused
from llava_next.model.build import build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.speedups import use_fused
from tests.llava_next.models import mixed, row
from tests.tiny import TowerName, tiny_model
from train.config.schema import PackingConfig, StageConfig
from train.plan.memory import Row, activations, host_bytes, states
from train.plan.model_facts import LanguageShape, ModelFacts, VisionShape, model_facts
from train.plan.setting import Setting

ALL = ("vision_tower", "projector", "image_newline", "language_model")
LANGUAGE = LanguageShape(width=4096, mlp=11_008, layers=32, heads=32, query=4096, key=4096, vocabulary=32_064)
VISION = VisionShape("clip_vision_model", 1024, 4096, 23, 576, 1, 336, quick_gelu=True)
FACTS = ModelFacts(
    LANGUAGE,
    VISION,
    parameters={"vision_tower": 300, "projector": 20, "image_newline": 0, "language_model": 6680},
    trained={"vision_tower": 0, "projector": 20, "image_newline": 0, "language_model": 6680},
    largest_group=6680,
    largest_block=200,
    num_tensors=1,
    upper_tower=12,
    costs=SimpleNamespace(),  # type: ignore[arg-type]
)


PLAIN = ("sdpa", "torch")
OWN = ("varlen", "fused")
"""Kernels of attention, and of norms and gates."""


def setting(
    zero: int,
    *,
    offload: bool = False,
    recompute: tuple[str, ...] = (),
    kernels: tuple[str, str] = PLAIN,
    **more: int,
) -> Setting:
    """A setting of a ZeRO stage."""
    options: dict[str, object] = {"stage": zero, **more}
    if offload:
        options["offload_optimizer"] = {"device": "cpu"}
    return Setting({"zero_optimization": options}, recompute, PackingConfig(4096, 40), 1, (), *kernels)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        # Of 7000 parameters 6700 are trained; ten ranks; bf16.
        (1, {"weights": 14_000, "gradients": 26_800, "optimizer": 8040}),
        (2, {"weights": 14_000, "gradients": 2680, "optimizer": 8040}),
        (3, {"weights": 1400, "gradients": 2680, "optimizer": 8040}),
    ],
)
def test_states_by_zero_stage(zero: int, expected: dict[str, float]) -> None:
    """2 bytes of weight, 4 of gradient, 12 of AdamW, divided by the ranks from stage 3, 2, 1 on."""
    assert states(FACTS, setting(zero), num_ranks=10, half=True) == pytest.approx(expected)


def test_states_in_fp32_without_zero() -> None:
    """No copy of the weights: 4 + 4 + 8."""
    found = states(FACTS, setting(0), num_ranks=1, half=False)
    assert found == {"weights": 28_000, "gradients": 26_800, "optimizer": 53_600}


def test_offload_moves_states_to_the_host() -> None:
    """What the device no longer holds, the host does; building the model whole costs the host its weights."""
    on_device = states(FACTS, setting(2, offload=True), num_ranks=2, half=True)
    assert on_device == {"weights": 14_000, "gradients": 0, "optimizer": 0}
    assert host_bytes(FACTS, setting(2, offload=True), 2, 2) == 16 * 6700 / 2
    assert host_bytes(FACTS, setting(2, offload=True), 2, 4, ranks_per_node=2) == 2 * 16 * 6700 / 4
    assert host_bytes(FACTS, setting(2), 2, 8, ranks_per_node=8) == 2 * 7012  # rank 0 alone builds it


def saved_bytes(model: LlavaNext, batch: object) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            held[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)[0]
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[TowerName, ModelConfig]:
    """Tiny models of each kind of tower, wide enough that what the formulas leave out is small."""
    towers: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
    }
    return {name: tiny_model(tmp_path_factory.mktemp(name), name, **sizes) for name in towers}


@pytest.mark.parametrize(
    ("tower", "parts", "recompute", "dtype", "kernels"),
    [
        ("clip", ALL, (), torch.float32, PLAIN),
        ("siglip", ALL, (), torch.float32, PLAIN),
        ("dinov2", ALL, (), torch.float32, PLAIN),
        ("clip", ALL, (), torch.bfloat16, PLAIN),
        ("clip", ("projector",), (), torch.float32, PLAIN),
        ("clip", ("projector",), (), torch.bfloat16, PLAIN),
        ("clip", ("projector", "language_model"), (), torch.bfloat16, PLAIN),
        ("clip", ALL, ("language_model",), torch.float32, PLAIN),
        ("clip", ALL, ("vision_tower", "language_model"), torch.float32, PLAIN),
        ("clip", ALL, (), torch.float32, OWN),
        ("clip", ALL, (), torch.float32, ("sdpa", "fused")),
        ("siglip", ALL, (), torch.float32, ("varlen", "torch")),
        ("clip", ("projector",), (), torch.float32, OWN),
        ("clip", ALL, ("language_model",), torch.float32, OWN),
    ],
)
def test_activations_are_what_autograd_saves(
    models: dict[TowerName, ModelConfig],
    tower: TowerName,
    parts: tuple[str, ...],
    recompute: tuple[str, ...],
    dtype: torch.dtype,
    kernels: tuple[AttentionKernel, ElementwiseKernel],
) -> None:
    """Within 3 %, whatever trains, in either type, with blocks run again or not, by torch's kernels and by ours."""
    if kernels != PLAIN and (why_not := cpu_fused.unavailable_reason()):
        pytest.skip(why_not)
    backbone = read_backbone(models[tower])
    attention, elementwise = kernels
    model = build_model(backbone, dtype=dtype, seed=0, num_sources=8, attention=attention)
    set_trained_parts(model, parts)
    set_recompute(model, recompute)
    if elementwise == "fused":
        use_fused(model)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    stage = StageConfig("test", dict.fromkeys(parts, 1e-3), 8, 4096)
    chosen = SimpleNamespace(stage=stage, model=models[tower], lora=None, seed=0)
    # Another backbone: to build a model changes the attention in its config.
    facts = model_facts(read_backbone(models[tower]), chosen)  # type: ignore[arg-type]
    seen = Row(batch.input_ids.numel(), len(batch.tiles), len(batch.target_ids))
    laid = setting(0, recompute=recompute, kernels=kernels)
    planned = activations(facts, laid, seen, half=dtype == torch.bfloat16, on_gpu=False)
    kept = sum(value for kind, value in planned.items() if kind.startswith("activations"))
    log_probabilities = 4 * seen.supervised * facts.language.vocabulary
    # The last block's attention keeps a mask, which beside real widths is nothing.
    each = zip(batch.segments.num_targets, batch.segments.lengths, strict=True)
    masked = attention == "sdpa" and not recompute
    mask = dtype.itemsize * sum(targets * length for targets, length in each) if masked else 0
    # The tiny towers' heads of 8 values are filled up to 16: queries, keys, values and outputs, which are copied back.
    filled = 0
    if attention == "varlen" and "vision_tower" in parts:
        vision = facts.vision
        filled = 4 * 5 * vision.width * vision.layers * seen.tiles * (vision.patches + vision.prefix)
    assert kept + log_probabilities + mask + filled == pytest.approx(saved_bytes(model, batch), rel=0.03)


def test_adapters_keep_no_more_than_is_planned(models: dict[TowerName, ModelConfig]) -> None:
    """A part with adapters is planned as one that trains whole: never less than autograd saves, and at most 1.6 times
    that (adapters in two layers of a block)."""
    pytest.importorskip("peft")
    backbone = read_backbone(models["clip"])
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    seen = Row(batch.input_ids.numel(), len(batch.tiles), len(batch.target_ids))
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for targets in (every, every[:1]):
        lora = {"language_model": LoraConfig(1, 1.0, targets)}
        model = build_model(backbone, dtype=torch.float32, seed=0, num_sources=8, attention="sdpa")
        add_adapters(model, lora, seed=0)
        set_trained_parts(model, ("projector", "language_model"))
        stage = StageConfig("test", {"projector": 1e-3, "language_model": 1e-3}, 8, 4096)
        chosen = SimpleNamespace(stage=stage, model=models["clip"], lora=lora, seed=0)
        facts = model_facts(backbone, chosen)  # type: ignore[arg-type]
        planned = activations(facts, setting(0), seen, half=False, on_gpu=False)
        kept = sum(value for kind, value in planned.items() if kind.startswith("activations"))
        kept += 4 * seen.supervised * facts.language.vocabulary
        assert 1.0 < kept / saved_bytes(model, batch) < 1.6


def test_recompute_and_smaller_rows_take_less() -> None:
    """Every knob that the advice turns lowers what it is turned for."""

    def total(parts: tuple[str, ...], tokens: int) -> float:
        chosen = setting(0, recompute=parts)
        return sum(activations(FACTS, chosen, Row(tokens, 10, 100), half=True, on_gpu=True).values())

    assert total(("language_model",), 8192) < total((), 8192) / 4
    assert total((), 4096) < total((), 8192) * 0.6
