"""LoRA adapters: new ones do not change the output, only they are trained, and the merged model loads in stock
transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from llava_next.config import ANYRES, LoraConfig, ModelError
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import is_adapter, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, row, stock_inputs
from tests.tiny import TowerName

pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")

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
def test_merged_adapters_equal_the_adapted_model(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """New adapters leave the logits bitwise equal. With other weights, the export loads in stock transformers and has
    the adapted model's logits (1e-5)."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)], rounds=2)
    batch = row(backbone, [sample.example])
    before = build_model(backbone, dtype=torch.float32, seed=0).target_logits(batch)
    assert torch.equal(model.target_logits(batch), before)

    generator = torch.Generator().manual_seed(1)
    for tensor in _adapters(model).values():
        tensor.normal_(std=0.3, generator=generator)
    actual = model.target_logits(batch)
    assert float((actual - before).norm() / before.norm()) > 1e-2
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(model, backbone, processor, tmp_path / "export")
    assert torch.equal(model.target_logits(batch), actual), "the live model is as it was"
    stock, loading_info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    with torch.no_grad():
        expected = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_only_adapters_are_trained(make_backbone: MakeBackbone) -> None:
    """In a part with adapters nothing else is trained, including embedding and head. Initial weights depend on the seed
    only, and a model without weights has adapters of the same names, shapes and dtypes."""
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
    ("part", "adapters", "message"),
    [
        (
            "tower",
            LORA["vision_tower"],
            r"lora.tower: unknown part; adapters are supported in vision_tower and language",
        ),
        ("projector", LORA["vision_tower"], r"lora.projector: adapters are supported in .* only"),
        ("language_model", LoraConfig(0, 1.0, ("q_proj",)), r"lora.language_model.rank must be at least 1, got 0"),
        (
            "language_model",
            LoraConfig(1, 0.0, ("q_proj",)),
            r"lora.language_model.alpha must be positive and finite, got 0",
        ),
        ("language_model", LoraConfig(1, 1.0, ()), r"lora.language_model.targets is empty"),
        (
            "language_model",
            LoraConfig(1, 1.0, ("q_proj", "query")),
            r"no linear layer query; choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            "vision_tower",
            LoraConfig(1, 1.0, ("layer_norm1",)),
            r"no linear layer layer_norm1; choose from fc1, fc2, k_proj, out_proj, q_proj, v_proj",
        ),
    ],
)
def test_invalid_settings_are_errors(
    make_backbone: MakeBackbone, part: str, adapters: LoraConfig, message: str
) -> None:
    """The message has the key, the rule and the value; for an unknown layer, the known ones."""
    model = build_model(make_backbone(), dtype=torch.float32, seed=0, parts=())
    with pytest.raises(ModelError, match=message):
        add_adapters(model, {part: adapters}, seed=0)


def test_missing_peft_is_an_error(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has both fixes."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = build_model(make_backbone(), dtype=torch.float32, seed=0, parts=())
    with pytest.raises(
        ModelError, match=r"peft is not installed; run `\./scripts/setup\.sh --extras lora`, or set lora=null"
    ):
        add_adapters(model, LORA, seed=0)
