"""Directories: what we write is loaded by stock transformers and means the same; what is damaged is told by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

from data_recipes.sample import Message
from llava_next import hf
from llava_next.build import Backbone, build_model
from llava_next.config import ModelError
from llava_next.hf import live_parameters, load_weights, read_hf, write_connector, write_hf
from llava_next.model import LlavaNext, set_trained_parts
from llava_next.processor import Processor
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, row, stock_inputs, stock_twin
from tests.tiny import TowerName

TOWERS: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")


def _model(backbone: Backbone, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaNext:
    return build_model(backbone, dtype=dtype, seed=seed)


def _processor(backbone: Backbone) -> Processor:
    return backbone.processor(template=None, image_mode="anyres", max_length=4096)


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def _write(backbone: Backbone, folder: Path, seed: int = 0) -> LlavaNext:
    model = _model(backbone, seed)
    write_hf(model, backbone, _processor(backbone), folder)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_stock_transformers_loads_what_we_write(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """No tensor is missing, left over or changed, the tower's upper layers included; logits are ours."""
    backbone = make_backbone(tower)
    model = _write(backbone, tmp_path / "export")
    stock, found = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    theirs = {"hf." + name: parameter for name, parameter in stock.named_parameters()}
    ours = _state(model)
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name

    sample = encoded(backbone, [(45, 61)], rounds=2)
    batch = row(backbone, [sample.example])
    with torch.no_grad():
        logits = stock(**stock_inputs(backbone, sample)).logits[0, batch.target_positions]
        states, head = model._target_states(batch)
    torch.testing.assert_close(states @ head.T, logits, rtol=1e-5, atol=1e-6)


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
def test_names_on_disk_are_the_published_ones(
    make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName, tower_names: list[str]
) -> None:
    """The names of the released checkpoints, which vLLM and older transformers read; nothing of ours."""
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
def test_a_written_model_is_loaded_again(make_backbone: MakeBackbone, tmp_path: Path, tied: bool) -> None:
    """Into a fresh model (load_weights) and by itself (read_hf): every tensor equal, the same loss."""
    backbone = make_backbone(tied=tied)
    model = _write(backbone, tmp_path / "export", seed=1)
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        assert ("language_model.lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    fresh = _model(make_backbone(tied=tied), seed=2)
    assert "model from" in load_weights(fresh, backbone, tmp_path / "export")
    found, read = read_hf(tmp_path / "export", backbone.config)
    assert found.config == backbone.config
    assert (found.tile, found.patches_per_side) == (backbone.tile, backbone.patches_per_side)
    batch = row(backbone, [encoded(backbone, [(45, 61), (28, 90)]).example])
    read.num_sources = model.num_sources
    with torch.no_grad():
        expected = model(batch)[0]
        for other in (fresh, read):
            ours, theirs = _state(model), _state(other)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            torch.testing.assert_close(other(batch)[0], expected)
    again = _processor(found)
    messages = [Message("user", "<image>\nWhat?"), Message("assistant", "That.")]
    assert again.fingerprint == _processor(backbone).fingerprint
    np.testing.assert_array_equal(
        again.layout(messages, [(45, 61)]).ids, _processor(backbone).layout(messages, [(45, 61)]).ids
    )


def test_shards_are_indexed_and_read_back(
    make_backbone: MakeBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than one file: several, an index of every tensor, and stock transformers reads them."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    backbone = make_backbone()
    model = _write(backbone, tmp_path / "export", seed=1)
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in _state(model).values())
    stock, found = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not found["missing_keys"]
    assert torch.equal(stock.model.image_newline, model.hf.model.image_newline)
    fresh = _model(make_backbone(), seed=2)
    load_weights(fresh, backbone, tmp_path / "export")
    assert torch.equal(fresh.hf.lm_head.weight, model.hf.lm_head.weight)


def test_a_directory_is_replaced_whole(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Writing over an older export leaves none of its files; a rank without a target writes nothing."""
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


def test_connector_round_trip(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Projector and newline come back bit for bit, nothing else changes; the contract tells what was trained."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    set_trained_parts(model, ["projector"])
    write_connector(model, backbone, tmp_path / "connector")
    fresh = _model(make_backbone(), seed=2)
    before, said = _state(fresh), load_weights(fresh, backbone, tmp_path / "connector")
    assert said.endswith("(image_newline not trained)")
    source, after = _state(model), _state(fresh)
    connector = [name for name in after if "multi_modal_projector" in name or "image_newline" in name]
    assert len(connector) == 5
    for name in after:
        assert torch.equal(after[name], source[name] if name in connector else before[name]), name
    set_trained_parts(model, ["projector", "image_newline"])
    write_connector(model, backbone, tmp_path / "connector")
    assert load_weights(fresh, backbone, tmp_path / "connector").endswith("(image_newline trained)")


def test_a_connector_serves_another_precision(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Written in bf16, loaded into fp32: the same values."""
    backbone = make_backbone()
    model = _model(backbone, seed=1, dtype=torch.bfloat16)
    write_connector(model, backbone, tmp_path / "connector")
    fresh = _model(make_backbone(), seed=2)
    load_weights(fresh, backbone, tmp_path / "connector")
    assert torch.equal(fresh.hf.model.image_newline, model.hf.model.image_newline.float())


def test_a_damaged_connector_is_told_by_the_tensors_name(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """One flipped bit, one missing tensor, one extra: refused by name."""
    backbone = make_backbone()
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    file = tmp_path / "connector" / "connector.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fresh = _model(make_backbone())
    with pytest.raises(ModelError, match=r"the bytes of \S+ are not the ones in contract.json.*damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.write_bytes(good)
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "image_newline"}, file)
    with pytest.raises(ModelError, match=r"lacks 1 tensor.*image_newline"):
        load_weights(fresh, backbone, tmp_path / "connector")
    save_file({**tensors, "resampler": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"1 tensor\(s\) that this model lacks.*resampler"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(ModelError, match="damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.unlink()
    with pytest.raises(ModelError, match="missing"):
        load_weights(fresh, backbone, tmp_path / "connector")
    (tmp_path / "connector" / "contract.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")


def test_a_connector_of_another_tower_is_refused(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The contract's key, both values and the way out; nothing is copied."""
    backbone = make_backbone("clip")
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    other = make_backbone("siglip")
    fresh = _model(other, seed=9)
    before = _state(fresh)
    with pytest.raises(ModelError, match=r"vision_tower=tiny_clip, this model has tiny_siglip.*init_from=null"):
        load_weights(fresh, other, tmp_path / "connector")
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(fresh).items())


def test_a_model_of_another_shape_is_refused(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A whole model with another tower, or fewer layers: refused by a tensor's name."""
    _write(make_backbone("clip"), tmp_path / "export")
    other = make_backbone("dinov2")
    with pytest.raises(ModelError, match=r"lacks \d+ tensor\(s\).*vision_tower"):
        load_weights(_model(other), other, tmp_path / "export")


def test_nothing_to_load_is_told_with_the_way_out(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An empty folder is neither a connector nor a model; read_hf says what it is not either."""
    backbone = make_backbone()
    with pytest.raises(ModelError, match=r"neither a connector .* nor a model .*stage=align"):
        load_weights(_model(backbone), backbone, tmp_path)
    with pytest.raises(ModelError, match="no model that transformers reads"):
        read_hf(tmp_path, backbone.config)


def test_a_gutted_export_is_refused(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """read_hf does not let transformers make up a tensor that is not there."""
    backbone = make_backbone()
    _write(backbone, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "image_newline"}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*image_newline"):
        read_hf(tmp_path / "export", backbone.config)


def test_writing_leaves_the_live_model_as_it_was(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An export in mid-run changes neither weights nor the attention: the next loss is the same."""
    backbone = make_backbone()
    model = _model(backbone)
    batch = row(backbone, [encoded(backbone, [(45, 61)]).example])
    before = float(model(batch)[0].detach())
    write_hf(model, backbone, _processor(backbone), tmp_path / "export")
    write_connector(model, backbone, tmp_path / "connector")
    assert float(model(batch)[0].detach()) == before
    assert stock_twin(model, backbone).config.vision_feature_layer == -2
