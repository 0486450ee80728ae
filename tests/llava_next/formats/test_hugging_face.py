"""Model directories: stock transformers loads them with equal results, and damaged ones are errors that name the
tensor."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, ModelError
from llava_next.formats import tensors
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import read_hf, write_hf
from llava_next.formats.load_weights import load_weights
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, row, stock_inputs, stock_twin
from tests.tiny import SIZES_HW, TowerName

TOWERS: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")


def _model(backbone: Backbone, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaNext:
    return build_model(backbone, dtype=dtype, seed=seed)


def _processor(backbone: Backbone) -> Processor:
    return backbone.processor(template=None, views=ANYRES, max_length=4096)


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def _write(backbone: Backbone, folder: Path, seed: int = 0) -> LlavaNext:
    model = _model(backbone, seed)
    write_hf(model, backbone, _processor(backbone), folder)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_stock_transformers_loads_an_export(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """No tensor is missing, unexpected or changed, including the tower's upper layers, and logits are equal."""
    backbone = make_backbone(tower)
    model = _write(backbone, tmp_path / "export")
    stock, loading_info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    assert not loading_info["mismatched_keys"]
    expected = {"hf." + name: parameter for name, parameter in stock.named_parameters()}
    actual = _state(model)
    assert set(expected) == set(actual)
    for name, tensor in actual.items():
        assert torch.equal(expected[name], tensor), name

    sample = encoded(backbone, [(45, 61)], rounds=2)
    batch = row(backbone, [sample.example])
    with torch.no_grad():
        logits = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
    torch.testing.assert_close(model.target_logits(batch), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "tower_names"),
    [
        ("clip", ["vision_tower.vision_model.embeddings.patch_embedding.weight",
                  "vision_tower.vision_model.pre_layrnorm.weight",
                  "vision_tower.vision_model.encoder.layers.2.self_attn.k_proj.bias",
                  "vision_tower.vision_model.post_layernorm.bias"]),
        ("siglip", ["vision_tower.vision_model.embeddings.position_embedding.weight",
                    "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
                    "vision_tower.vision_model.head.probe"]),
        ("dinov2", ["vision_tower.embeddings.cls_token", "vision_tower.layernorm.weight"]),
    ],
)  # fmt: skip
def test_names_on_disk_are_published_names(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, tower_names: list[str]
) -> None:
    """The names are those of the released checkpoints, which vLLM and older transformers read."""
    _write(make_backbone(tower), tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "image_newline",
        *tower_names,
    } <= names
    assert all(
        name.startswith(("vision_tower.", "language_model.", "multi_modal_projector.", "image_newline"))
        for name in names
    )
    config = (tmp_path / "export" / "config.json").read_text()
    assert "llava_next_segments" not in config
    assert json.loads(config)["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert not (tmp_path / "export.partial").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_model_round_trip(make_backbone: MakeBackbone, tmp_path: Path, tied: bool) -> None:
    """`load_weights` and `read_hf` give equal tensors and the same loss."""
    backbone = make_backbone(tied=tied)
    model = _write(backbone, tmp_path / "export", seed=1)
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        assert ("language_model.lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    fresh = _model(make_backbone(tied=tied), seed=2)
    assert "model from" in load_weights(fresh, backbone, tmp_path / "export")
    read_backbone_config, read_model = read_hf(tmp_path / "export", backbone.config)
    assert read_backbone_config.config == backbone.config
    assert (read_backbone_config.tile, read_backbone_config.patches_per_side) == (
        backbone.tile,
        backbone.patches_per_side,
    )
    batch = row(backbone, [encoded(backbone, [(45, 61), (28, 90)]).example])
    read_model.num_sources = model.num_sources
    with torch.no_grad():
        expected = model(batch)[0]
        for other in (fresh, read_model):
            actual, reference = _state(model), _state(other)
            assert set(actual) == set(reference)
            assert all(torch.equal(actual[name], reference[name]) for name in actual)
            torch.testing.assert_close(other(batch)[0], expected)
    reloaded = _processor(read_backbone_config)
    messages = [Message("user", "<image>\nWhat?"), Message("assistant", "That.")]
    assert reloaded.fingerprint == _processor(backbone).fingerprint
    np.testing.assert_array_equal(
        reloaded.layout(messages, [(45, 61)]).ids, _processor(backbone).layout(messages, [(45, 61)]).ids
    )


def test_shards_are_indexed_and_read_back(
    make_backbone: MakeBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model larger than a shard has several files and an index, and stock transformers loads them."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 40_000)
    backbone = make_backbone()
    model = _write(backbone, tmp_path / "export", seed=1)
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in _state(model).values())
    stock, loading_info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not loading_info["missing_keys"]
    assert torch.equal(stock.model.image_newline, model.hf.model.image_newline)
    fresh = _model(make_backbone(), seed=2)
    load_weights(fresh, backbone, tmp_path / "export")
    assert torch.equal(fresh.hf.lm_head.weight, model.hf.lm_head.weight)


def test_directory_is_replaced(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An older export is replaced without leftover files. A rank without a target writes nothing."""
    backbone = make_backbone()
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    model = _write(backbone, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    gathered: list[int] = []

    class Gather:
        def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
            gathered.append(len(parameters))

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    write_hf(model, backbone, _processor(backbone), None, Gather)
    assert sum(gathered) == len(list(live_parameters(model)))


def test_model_of_another_shape_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A complete model with another tower is an error that names a tensor."""
    _write(make_backbone("clip"), tmp_path / "export")
    other = make_backbone("dinov2")
    with pytest.raises(ModelError, match=r"lacks \d+ tensor\(s\).*vision_tower"):
        load_weights(_model(other), other, tmp_path / "export")


@pytest.mark.parametrize("tower", TOWERS)
def test_linear_projector_loads_in_stock_transformers(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName
) -> None:
    """It is exported with a linear activation and an identity layer, gives equal logits, and is read as one layer."""
    backbone = make_backbone(tower, projector="linear")
    model = _write(backbone, tmp_path / "export", seed=1)
    stock, loading_info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert [problem for problem in loading_info.values() if problem] == []
    assert stock.config.projector_hidden_act == "linear"
    second = stock.model.multi_modal_projector.linear_2
    assert torch.equal(second.weight, torch.eye(len(second.bias)))
    assert not second.bias.any()
    sample = encoded(backbone, [(45, 61), (28, 90)], rounds=2)
    batch = row(backbone, [sample.example])
    with torch.no_grad():
        logits = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
    torch.testing.assert_close(model.target_logits(batch), logits, rtol=1e-5, atol=1e-6)

    reloaded, read_model = read_hf(tmp_path / "export", make_backbone(tower).config)
    assert reloaded.config == backbone.config
    assert reloaded.config.projector == "linear"
    fresh = _model(make_backbone(tower, projector="linear"), seed=2)
    load_weights(fresh, backbone, tmp_path / "export")
    for other in (read_model, fresh):
        actual, expected = _state(model), _state(other)
        assert set(actual) == set(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_layer_is_bitwise_exact(make_backbone: MakeBackbone, tmp_path: Path, dtype: torch.dtype) -> None:
    """The two exported layers give bitwise the output of the one layer, also in bf16."""
    backbone = make_backbone(projector="linear")
    model = _model(backbone, dtype=dtype)
    write_hf(model, backbone, _processor(backbone), tmp_path / "export")
    stock = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export", dtype=dtype)
    features = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(stock.model.multi_modal_projector(features), model.hf.model.multi_modal_projector(features))


def test_projector_of_another_kind_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Both kinds have the same tensors on disk, so the config and the second layer distinguish them. The message has
    both kinds and the setting."""
    linear, two_layers = make_backbone(projector="linear"), make_backbone()
    _write(linear, tmp_path / "linear")
    _write(two_layers, tmp_path / "two_layers")
    with pytest.raises(ModelError, match=r"of kind linear, this model's is mlp2x_gelu; set model.projector=linear"):
        load_weights(_model(two_layers), two_layers, tmp_path / "linear")
    with pytest.raises(ModelError, match=r"of kind mlp2x_gelu, this model's is linear; set model.projector=mlp2x_gelu"):
        load_weights(_model(linear), linear, tmp_path / "two_layers")
    config = tmp_path / "two_layers" / "config.json"
    for act, message in (("linear", r"linear_2.\w+ is not the identity"), ("relu", r"projector_hidden_act=relu")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "projector_hidden_act": act}))
        with pytest.raises(ModelError, match=message):
            load_weights(_model(linear), linear, tmp_path / "two_layers")
        with pytest.raises(ModelError, match=message):
            read_hf(tmp_path / "two_layers", linear.config)


@pytest.mark.parametrize("tower", TOWERS)
def test_tile_that_the_patch_does_not_divide(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """For a tower of 30 pixels and patches of 7 (SigLIP: 384 and 14), stock transformers makes the same tiles, token
    counts and logits in every grid."""
    config = make_backbone(tower).config
    config = replace(config, vision_tower=replace(config.vision_tower, overrides={"image_size": 30}))
    backbone = read_backbone(config)
    model = _write(backbone, tmp_path / "export")
    stock = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export")
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "export")
    grids = set()
    for number, size in enumerate([*SIZES_HW, (30, 60)]):
        sample = encoded(backbone, [size], seed=number)
        (layout,) = sample.example.layout.images
        grids.add(layout.grid)
        assert layout.patches_per_side == 4
        pixels = processor.image_processor(Image.open(io.BytesIO(sample.images[0])), return_tensors="pt")
        height, width = pixels["pixel_values"].shape[-2:]
        extra = processor.num_additional_image_tokens
        assert processor._get_number_of_features(*size, height, width) - extra == layout.num_tokens
        batch = row(backbone, [sample.example])
        with torch.no_grad():
            logits = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
        torch.testing.assert_close(model.target_logits(batch), logits, rtol=1e-5, atol=1e-6)
    assert grids == set(backbone.config.grids)


def test_empty_directory_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An empty directory is neither a connector nor a model; the message has the fix."""
    backbone = make_backbone()
    with pytest.raises(ModelError, match=r"neither a connector .* nor a model .*stage=align"):
        load_weights(_model(backbone), backbone, tmp_path)
    with pytest.raises(ModelError, match="transformers cannot load"):
        read_hf(tmp_path, backbone.config)


def test_grids_of_another_tower_are_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The message has the directory, the pinpoint, the tile and the fix."""
    backbone = make_backbone()
    _write(backbone, tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_grid_pinpoints": [[56, 28], [28, 60]]}))
    with pytest.raises(ModelError, match=r"export: image_grid_pinpoints contains \[28, 60\].*28 pixels.*config\.json"):
        read_hf(tmp_path / "export", backbone.config)


def test_missing_tensor_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """`read_hf` does not let transformers initialize a missing tensor."""
    backbone = make_backbone()
    _write(backbone, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "image_newline"}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*image_newline"):
        read_hf(tmp_path / "export", backbone.config)


def test_writing_does_not_modify_the_model(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An export during training changes neither weights nor attention: the next loss is equal."""
    backbone = make_backbone()
    model = _model(backbone)
    batch = row(backbone, [encoded(backbone, [(45, 61)]).example])
    before = float(model(batch)[0].detach())
    write_hf(model, backbone, _processor(backbone), tmp_path / "export")
    write_connector(model, backbone, tmp_path / "connector")
    assert float(model(batch)[0].detach()) == before
    assert stock_twin(model, backbone).config.vision_feature_layer == -2
