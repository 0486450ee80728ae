"""Tests of the memory formulas: states computed by hand, activations against what autograd saves.

scripts/bench/plan.py accuracy compares the plan with the memory of whole processes (see test_bench_plan.py).
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_next.config import LoraConfig, ModelConfig
from llava_next.model.build import build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_recompute, set_trained_parts
from tests.llava_next.models import mixed, row
from tests.tiny import TowerName, tiny_model
from train.config.schema import PackingConfig, StageConfig
from train.plan.execution_settings import ExecutionSettings
from train.plan.memory import Row, estimate_activations, estimate_host_bytes, estimate_states
from train.plan.model_facts import LanguageShape, ModelFacts, TensorSizes, VisionShape, count_model

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
    tensors=TensorSizes((300, 20, 6680), (20, 6680), (20, 6680), num_groups=2),
    upper_tower=12,
    costs=SimpleNamespace(),  # type: ignore[arg-type]
)


def setting(
    zero: int,
    *,
    offload: bool = False,
    recompute: tuple[str, ...] = (),
    **more: Any,
) -> ExecutionSettings:
    """Returns the settings of a ZeRO stage."""
    options: dict[str, object] = {"stage": zero, **more}
    if offload:
        options["offload_optimizer"] = {"device": "cpu"}
    return ExecutionSettings({"zero_optimization": options}, recompute, PackingConfig(4096, 40), 1)


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
    """2 bytes of weights, 4 of gradients and 12 of AdamW, divided by the ranks from stage 3, 2 and 1 on."""
    assert estimate_states(FACTS, setting(zero), num_ranks=10, half=True) == pytest.approx(expected)


def test_a_copy_of_the_weights_in_every_node() -> None:
    """16 ranks on two nodes: 2 bytes per parameter, divided by the 8 ranks of a node, besides the share of all ranks;
    on one node there is no such copy. For a 34B model it is 8.7 GB."""
    copied = replace(setting(3, zero_hpz_partition_size=None), nodes=2)
    plain = replace(setting(3), nodes=2)
    more = [estimate_states(FACTS, settings, num_ranks=16, half=True)["weights"] for settings in (plain, copied)]
    assert more == [2 * 7000 / 16, 2 * 7000 / 16 + 2 * 7000 / 8]
    assert estimate_states(FACTS, replace(copied, nodes=1), num_ranks=16, half=True)["weights"] == 2 * 7000 / 16


def test_states_in_fp32_without_zero() -> None:
    """Without a copy of the weights: 4 + 4 + 8."""
    result = estimate_states(FACTS, setting(0), num_ranks=1, half=False)
    assert result == {"weights": 28_000, "gradients": 26_800, "optimizer": 53_600}


def test_offload_moves_states_to_the_host() -> None:
    """Offloaded states are on the host instead of the device; building the model needs its weights on the host."""
    on_device = estimate_states(FACTS, setting(2, offload=True), num_ranks=2, half=True)
    assert on_device == {"weights": 14_000, "gradients": 0, "optimizer": 0}
    assert estimate_host_bytes(FACTS, setting(2, offload=True), 2, 2) == 16 * 6700 / 2
    assert estimate_host_bytes(FACTS, setting(2, offload=True), 2, 4, ranks_per_node=2) == 2 * 16 * 6700 / 4
    assert estimate_host_bytes(FACTS, setting(2), 2, 8, ranks_per_node=8) == 2 * 7012  # rank 0 alone builds it


def saved_bytes(model: LlavaNext, batch: object) -> int:
    """Returns the bytes of the storages that autograd saves for the backward pass, without parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in owned:
            held[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)[0]
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[TowerName, ModelConfig]:
    """Returns tiny models of each kind of tower, wide enough that what the formulas omit is small."""
    towers: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
    }
    return {name: tiny_model(tmp_path_factory.mktemp(name), name, **sizes) for name in towers}


@pytest.mark.parametrize(
    ("tower", "parts", "recompute", "dtype"),
    [
        ("clip", ALL, (), torch.float32),
        ("siglip", ALL, (), torch.float32),
        ("dinov2", ALL, (), torch.float32),
        ("clip", ALL, (), torch.bfloat16),
        ("clip", ("projector",), (), torch.float32),
        ("clip", ("projector",), (), torch.bfloat16),
        ("clip", ("projector", "language_model"), (), torch.bfloat16),
        ("clip", ALL, ("language_model",), torch.float32),
        ("clip", ALL, ("vision_tower", "language_model"), torch.float32),
    ],
)
def test_activations_are_what_autograd_saves(
    models: dict[TowerName, ModelConfig],
    tower: TowerName,
    parts: tuple[str, ...],
    recompute: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """Within 3 %, for any trained parts, both dtypes, with and without recompute."""
    backbone = read_backbone(models[tower])
    model = build_model(backbone, dtype=dtype, seed=0, num_sources=8)
    set_trained_parts(model, parts)
    set_recompute(model, recompute)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    stage = StageConfig("test", dict.fromkeys(parts, 1e-3), 8, 4096)
    chosen = SimpleNamespace(stage=stage, model=models[tower], lora=None, seed=0)
    # Another backbone: to build a model changes the attention in its config.
    facts = count_model(read_backbone(models[tower]), chosen)  # type: ignore[arg-type]
    seen = Row(batch.input_ids.numel(), len(batch.tiles), len(batch.target_ids))
    laid = setting(0, recompute=recompute)
    planned = estimate_activations(facts, laid, seen, half=dtype == torch.bfloat16, on_gpu=False)
    remaining = sum(value for kind, value in planned.items() if kind.startswith("activations"))
    log_probabilities = 4 * seen.supervised * facts.language.vocabulary
    # The last block's attention keeps a mask, which beside real widths is nothing.
    each = zip(batch.segments.num_targets, batch.segments.lengths, strict=True)
    mask = 0 if recompute else dtype.itemsize * sum(targets * length for targets, length in each)
    assert remaining + log_probabilities + mask == pytest.approx(saved_bytes(model, batch), rel=0.03)


def test_adapters_keep_no_more_than_is_planned(models: dict[TowerName, ModelConfig]) -> None:
    """A part with adapters is planned as fully trained: at least what autograd saves, and at most 1.6 times that
    (adapters in two layers of a block)."""
    pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
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
        facts = count_model(backbone, chosen)  # type: ignore[arg-type]
        planned = estimate_activations(facts, setting(0), seen, half=False, on_gpu=False)
        remaining = sum(value for kind, value in planned.items() if kind.startswith("activations"))
        remaining += 4 * seen.supervised * facts.language.vocabulary
        assert 1.0 < remaining / saved_bytes(model, batch) < 1.6


def test_recompute_and_smaller_rows_take_less() -> None:
    """Every setting that the advice varies lowers the memory that it is varied for."""

    def total(parts: tuple[str, ...], tokens: int) -> float:
        chosen = setting(0, recompute=parts)
        return sum(estimate_activations(FACTS, chosen, Row(tokens, 10, 100), half=True, on_gpu=True).values())

    assert total(("language_model",), 8192) < total((), 8192) / 4
    assert total((), 4096) < total((), 8192) * 0.6
