"""Whole models in Hugging Face's layout as what a stage starts from: every version's names, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_next.config import ModelError
from llava_next.formats.hugging_face import read_hf, write_hf
from llava_next.formats.load import load_weights
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import stock_square_twin, stock_twin
from tests.tiny import TowerName


def _model(backbone: Backbone, seed: int) -> LlavaNext:
    return build_model(backbone, dtype=torch.float32, seed=seed)


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def _write(model: LlavaNext, backbone: Backbone, folder: Path) -> dict[str, torch.Tensor]:
    write_hf(model, backbone, backbone.processor(template=None, image_mode="anyres", max_length=4096), folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_hugging_face_to_ours_to_hugging_face(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """From what transformers 5 itself saves, whose tower has other names, and from the published names: the same model;
    written again, equal bytes under equal names."""
    backbone = make_backbone(tower)
    model = _model(backbone, seed=1)
    published = _write(model, backbone, tmp_path / "published")
    stock_twin(model, backbone).save_pretrained(tmp_path / "theirs")
    same_names = set(load_file(tmp_path / "theirs" / "model.safetensors")) == set(published)
    assert same_names == (tower == "dinov2")
    for folder in ("published", "theirs"):
        fresh = _model(make_backbone(tower), seed=2)
        load_weights(fresh, backbone, tmp_path / folder)
        again = _write(fresh, backbone, tmp_path / f"{folder}_again")
        assert set(again) == set(published)
        assert all(torch.equal(again[name], published[name]) for name in published)


def test_the_module_trees_names_are_read(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """As some releases of transformers 4 saved them: model.language_model., model.vision_tower., lm_head."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    tensors = _write(model, backbone, tmp_path / "tree")
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
        renamed[name if name.startswith("lm_head") else "model." + name] = tensor
    save_file(renamed, tmp_path / "tree" / "model.safetensors")
    fresh = _model(make_backbone(), seed=2)
    load_weights(fresh, backbone, tmp_path / "tree")
    ours, theirs = _state(fresh), _state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_llava_of_transformers_is_read(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A stock LlavaForConditionalGeneration: every part but the newline, which it has not, and that is said."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    stock_square_twin(model, backbone).save_pretrained(tmp_path / "llava")
    fresh = _model(make_backbone(), seed=2)
    before = _state(fresh)
    assert "no image_newline, which starts fresh" in load_weights(fresh, backbone, tmp_path / "llava")
    for name, tensor in _state(fresh).items():
        wanted = before if name == "hf.model.image_newline" else _state(model)
        assert torch.equal(tensor, wanted[name]), name


def test_a_tied_head_that_stands_twice_is_read_once(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The same bytes are dropped; a head of its own is refused, with the key that gives it room."""
    backbone = make_backbone(tied=True)
    model = _model(backbone, seed=1)
    tensors = _write(model, backbone, tmp_path / "tied")
    table = tensors["language_model.model.embed_tokens.weight"]
    for head, refused in ((table.clone(), False), (table + 1, True)):
        save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
        fresh = _model(make_backbone(tied=True), seed=2)
        if refused:
            with pytest.raises(ModelError, match=r"a head .* not its embedding.*tie_word_embeddings=false"):
                load_weights(fresh, backbone, tmp_path / "tied")
        else:
            load_weights(fresh, backbone, tmp_path / "tied")
            assert torch.equal(fresh.hf.lm_head.weight, table)


def test_parameters_without_memory_are_compared_and_left(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A model with one real part takes that part alone; a shape that does not fit is told for the others too."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    tensors = _write(model, backbone, tmp_path / "export")
    partly = build_model(backbone, dtype=torch.float32, seed=2, parts={"vision_tower"})
    assert partly.hf.lm_head.weight.is_meta
    load_weights(partly, backbone, tmp_path / "export")
    wanted = _state(model)
    real = {name: parameter for name, parameter in live_parameters(partly) if not parameter.is_meta}
    assert {name.split(".")[2] for name in real} == {"vision_tower"}
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in real.items())
    tensors["language_model.model.norm.weight"] = torch.ones(33)
    save_file(tensors, tmp_path / "export" / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm.weight has shape \[33\], this model needs \[32\]"):
        load_weights(partly, backbone, tmp_path / "export")


def test_what_contradicts_the_run_is_told(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Another image token (so another tokenizer), another layer, pinpoints that are no multiples of the tile, a missing
    shard, a name that stands twice: the values and the way out."""
    backbone = make_backbone()
    tensors = _write(_model(backbone, seed=1), backbone, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    config, token = json.loads(file.read_text()), backbone.hf_config.image_token_index
    fresh = _model(backbone, seed=2)
    for changes, message in (
        ({"image_token_index": 7}, rf"its image token at 7, this tokenizer at {token}.*language_model.tokenizer="),
        ({"vision_feature_layer": -1}, r"layer -1, .*feature_layer is -2; choose model.vision_tower.feature_layer=-1"),
        ({"vision_feature_select_strategy": "full"}, r"another choice of its tower's tokens .*\(default\)"),
        ({"image_grid_pinpoints": [[28, 60]]}, r"image_grid_pinpoints holds \[28, 60\].*28 pixels"),
        ({"model_type": "qwen2_vl"}, r"model_type qwen2_vl .* is no LLaVA"),
    ):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            load_weights(fresh, backbone, tmp_path / "export")
    file.write_text(json.dumps(config))
    index = tmp_path / "export" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks model-2.safetensors, which model.safetensors.index.json names"):
        load_weights(fresh, backbone, tmp_path / "export")
    index.unlink()
    save_file({"image_newline": tensors["image_newline"]}, tmp_path / "export" / "more.safetensors")
    with pytest.raises(ModelError, match=r"holds image_newline twice"):
        load_weights(fresh, backbone, tmp_path / "export")
    (tmp_path / "export" / "more.safetensors").unlink()
    (tmp_path / "export" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds a config.json and no weights"):
        load_weights(fresh, backbone, tmp_path / "export")


def test_a_tokenizer_without_the_image_token_is_told(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Loading a directory by itself: its tokenizer must have the token where its config says."""
    backbone = make_backbone()
    _write(_model(backbone, seed=1), backbone, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": 5}))
    with pytest.raises(ModelError, match=r"no <image> where its config.json says \(image_token_index=5"):
        read_hf(tmp_path / "export", backbone.config)
