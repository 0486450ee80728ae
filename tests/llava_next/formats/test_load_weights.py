"""Complete models in the Hugging Face layout as `stage.init_from`: names of all transformers versions, and errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_next.config import ANYRES, ModelError
from llava_next.formats.hugging_face import read_hf, write_hf
from llava_next.formats.load_weights import load_weights
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
    write_hf(model, backbone, backbone.processor(template=None, views=ANYRES, max_length=4096), folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_hugging_face_round_trip(make_backbone: MakeBackbone, tmp_path: Path, tower: TowerName) -> None:
    """Directories with the names of transformers 5 and with published names give the same model, and writing it gives
    equal bytes under equal names."""
    backbone = make_backbone(tower)
    model = _model(backbone, seed=1)
    published = _write(model, backbone, tmp_path / "published")
    stock_twin(model, backbone).save_pretrained(tmp_path / "stock")
    same_names = set(load_file(tmp_path / "stock" / "model.safetensors")) == set(published)
    assert same_names == (tower == "dinov2")
    for folder in ("published", "stock"):
        fresh = _model(make_backbone(tower), seed=2)
        load_weights(fresh, backbone, tmp_path / folder)
        again = _write(fresh, backbone, tmp_path / f"{folder}_again")
        assert set(again) == set(published)
        assert all(torch.equal(again[name], published[name]) for name in published)


def test_names_of_the_module_tree_are_read(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Some releases of transformers 4 wrote model.language_model., model.vision_tower. and lm_head."""
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
    actual, expected = _state(fresh), _state(model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_stock_llava_is_read(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A stock LlavaForConditionalGeneration gives all parts except the newline, which is reported."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    stock_square_twin(model, backbone).save_pretrained(tmp_path / "llava")
    fresh = _model(make_backbone(), seed=2)
    before = _state(fresh)
    assert "no image_newline, which is newly initialized" in load_weights(fresh, backbone, tmp_path / "llava")
    for name, tensor in _state(fresh).items():
        expected = before if name == "hf.model.image_newline" else _state(model)
        assert torch.equal(tensor, expected[name]), name


def test_duplicate_of_a_tied_head(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """An equal head is dropped. A different head is an error with the setting that unties it."""
    backbone = make_backbone(tied=True)
    model = _model(backbone, seed=1)
    tensors = _write(model, backbone, tmp_path / "tied")
    table = tensors["language_model.model.embed_tokens.weight"]
    for head, is_refused in ((table.clone(), False), (table + 1, True)):
        save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
        fresh = _model(make_backbone(tied=True), seed=2)
        if is_refused:
            with pytest.raises(ModelError, match=r"a head .* differs from its embedding.*tie_word_embeddings=false"):
                load_weights(fresh, backbone, tmp_path / "tied")
        else:
            load_weights(fresh, backbone, tmp_path / "tied")
            assert torch.equal(fresh.hf.lm_head.weight, table)


def test_meta_parameters_are_only_compared(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A model with one part in memory loads only that part; a shape mismatch in another part is an error."""
    backbone = make_backbone()
    model = _model(backbone, seed=1)
    tensors = _write(model, backbone, tmp_path / "export")
    partly = build_model(backbone, dtype=torch.float32, seed=2, parts={"vision_tower"})
    assert partly.hf.lm_head.weight.is_meta
    load_weights(partly, backbone, tmp_path / "export")
    expected = _state(model)
    real = {name: parameter for name, parameter in live_parameters(partly) if not parameter.is_meta}
    assert {name.split(".")[2] for name in real} == {"vision_tower"}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in real.items())
    tensors["language_model.model.norm.weight"] = torch.ones(33)
    save_file(tensors, tmp_path / "export" / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm.weight has shape \[33\], this model needs \[32\]"):
        load_weights(partly, backbone, tmp_path / "export")


def test_settings_that_contradict_the_run_are_errors(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Another image token, layer or strategy, wrong pinpoints, a missing shard and a duplicate name; messages have the
    values and the fix."""
    backbone = make_backbone()
    tensors = _write(_model(backbone, seed=1), backbone, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    config, token = json.loads(file.read_text()), backbone.hf_config.image_token_index
    fresh = _model(backbone, seed=2)
    for changes, message in (
        ({"image_token_index": 7}, rf"image token 7, but this tokenizer\'s is {token}.*language_model.tokenizer="),
        ({"vision_feature_layer": -1}, r"layer -1, .*feature_layer is -2; set model.vision_tower.feature_layer=-1"),
        ({"vision_feature_select_strategy": "full"}, r"other tokens of its tower .*is default\)"),
        ({"image_grid_pinpoints": [[28, 60]]}, r"image_grid_pinpoints contains \[28, 60\].*28 pixels"),
        ({"model_type": "qwen2_vl"}, r"model_type qwen2_vl .* is not a LLaVA"),
    ):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            load_weights(fresh, backbone, tmp_path / "export")
    file.write_text(json.dumps(config))
    index = tmp_path / "export" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"index\.json lists.*model-2\.safetensors"):
        load_weights(fresh, backbone, tmp_path / "export")
    index.unlink()
    save_file({"image_newline": tensors["image_newline"]}, tmp_path / "export" / "more.safetensors")
    with pytest.raises(ModelError, match="contains image_newline twice"):
        load_weights(fresh, backbone, tmp_path / "export")
    (tmp_path / "export" / "more.safetensors").unlink()
    (tmp_path / "export" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="but no weights"):
        load_weights(fresh, backbone, tmp_path / "export")


def test_other_image_token_in_config_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The tokenizer of a directory must have the image token of its config.json."""
    backbone = make_backbone()
    _write(_model(backbone, seed=1), backbone, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": 5}))
    with pytest.raises(ModelError, match="image_token_index=5"):
        read_hf(tmp_path / "export", backbone.config)
