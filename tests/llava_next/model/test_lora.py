"""Owns the proofs about adapters in a model: fresh ones change nothing, they alone train, and merged they are the model
that stock transformers loads.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from llava_next.config import LoraConfig, ModelError
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import is_adapter, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, row, stock_inputs
from tests.tiny import TowerName

pytest.importorskip("peft")

LORA = {
    "vision_tower": LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "fc1")),  # layers with a bias
    "language_model": LoraConfig(rank=2, alpha=5.0, targets=("q_proj", "mlp.down_proj")),
}


def _model(backbone: Backbone, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaNext:
    model = build_model(backbone, dtype=dtype, seed=seed)
    add_adapters(model, LORA, seed=seed)
    return model


def _adapters(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if is_adapter(name)}


@pytest.mark.parametrize(
    "tower", ["clip", *(pytest.param(tower, marks=pytest.mark.full) for tower in ("siglip", "dinov2"))]
)
def test_merged_adapters_are_the_live_model(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """Fresh adapters leave the logits as they were, to the bit; with other weights, what is written is loaded whole by
    stock transformers and has the live model's logits (1e-5)."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)], rounds=2)
    batch = row(backbone, [sample.example])
    before = build_model(backbone, dtype=torch.float32, seed=0).target_logits(batch)
    assert torch.equal(model.target_logits(batch), before)

    generator = torch.Generator().manual_seed(1)
    for tensor in _adapters(model).values():
        tensor.normal_(std=0.3, generator=generator)
    ours = model.target_logits(batch)
    assert float((ours - before).norm() / before.norm()) > 1e-2
    processor = backbone.processor(template=None, image_mode="anyres", max_length=4096)
    write_hf(model, backbone, processor, tmp_path / "export")
    assert torch.equal(model.target_logits(batch), ours), "the live model is as it was"
    stock, found = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        theirs = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_adapters_alone_train_and_depend_on_the_seed_alone(make_backbone: MakeBackbone) -> None:
    """Of a part with adapters nothing else trains, its embedding and head included; the projector trains whole. First
    weights are the seed's, and a model without weights has the same adapters by name, shape and type."""
    backbone = make_backbone()
    model = _model(backbone, dtype=torch.bfloat16)
    set_trained_parts(model, ["vision_tower", "projector", "language_model"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.startswith("hf.model.multi_modal_projector.")} == set(_adapters(model))
    assert len(trained) == 2 * (2 * 2 + 2 * 2) + 4  # A and B of two layers of two blocks each; the projector's four
    set_trained_parts(model, ["language_model"])
    assert not any("vision_tower" in name for name, parameter in model.named_parameters() if parameter.requires_grad)

    torch.manual_seed(77)
    again, other = _adapters(_model(backbone, dtype=torch.bfloat16)), _adapters(_model(backbone, seed=5))
    for name, tensor in _adapters(model).items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name].bfloat16()) == (".lora_B." in name), name
    bare = build_model(backbone, dtype=torch.bfloat16, seed=0, parts=())
    add_adapters(bare, LORA, seed=0)
    assert all(parameter.is_meta for parameter in bare.hf.parameters())
    described = [(name, parameter.shape, parameter.dtype) for name, parameter in bare.named_parameters()]
    assert described == [(name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(
    ("part", "chosen", "told"),
    [
        (
            "tower",
            LORA["vision_tower"],
            r"lora.tower: there is no such part; adapters go into vision_tower or language",
        ),
        ("projector", LORA["vision_tower"], r"lora.projector: this part is small, it trains whole or not at all"),
        ("language_model", LoraConfig(0, 1.0, ("q_proj",)), r"lora.language_model.rank must be at least 1, got 0"),
        ("language_model", LoraConfig(1, 0.0, ("q_proj",)), r"lora.language_model.alpha must be above 0, got 0"),
        ("language_model", LoraConfig(1, 1.0, ()), r"lora.language_model.targets names no layer"),
        (
            "language_model",
            LoraConfig(1, 1.0, ("q_proj", "query")),
            r"no linear layer query; they have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            "vision_tower",
            LoraConfig(1, 1.0, ("layer_norm1",)),
            r"no linear layer layer_norm1; they have fc1, fc2, k_proj, out_proj, q_proj, v_proj",
        ),
    ],
)
def test_what_no_adapter_can_be_is_told(make_backbone: MakeBackbone, part: str, chosen: LoraConfig, told: str) -> None:
    """The key, the rule, the value; of a layer that is not there, those that are."""
    model = build_model(make_backbone(), dtype=torch.float32, seed=0, parts=())
    with pytest.raises(ModelError, match=told):
        add_adapters(model, {part: chosen}, seed=0)


def test_a_missing_package_is_one_sentence(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peft: what is missing, and both ways out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = build_model(make_backbone(), dtype=torch.float32, seed=0, parts=())
    with pytest.raises(
        ModelError, match=r"peft is not installed here; `./scripts/setup.sh --extras lora`, or lora=null"
    ):
        add_adapters(model, LORA, seed=0)
