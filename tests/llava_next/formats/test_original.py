"""The authors' layout: names, config and pinpoints are those of the released checkpoints, and round trips are
bitwise."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaConfig

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, ImageMode, ModelError, ViewsConfig
from llava_next.formats.hugging_face import published_tensors
from llava_next.formats.load_weights import load_weights
from llava_next.formats.original import num_vocabulary_rows, original_config, original_model, write_original_folder
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.llava_next.conftest import MakeBackbone
from tests.oracles import tiny_model
from tests.tiny import encode_noise_image

RATES = {"vision_tower": 2.0e-6, "projector": 2.0e-5}


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def _vicuna_like(make_backbone: MakeBackbone) -> Backbone:
    """A backbone whose vocabulary ends with its tokenizer's, so that the added image token is the last one."""
    token = make_backbone().hf_config.image_token_index
    backbone = make_backbone(vocab_size=token)
    assert token == backbone.hf_config.image_token_index < backbone.hf_config.text_config.vocab_size <= token + 64
    return backbone


def _write(backbone: Backbone, folder: Path, seed: int = 1, image_mode: ImageMode = "anyres") -> LlavaNext:
    """Writes a model with random weights in the authors' layout."""
    model = build_model(backbone, dtype=torch.float32, seed=seed)
    processor = backbone.processor(template=None, views=ViewsConfig(image_mode, image_mode), max_length=4096)
    tensors = published_tensors(model, backbone, processor.config.views)
    tensors = [tensor for tensor in tensors if backbone.config.projector != "linear" or "linear_2" not in tensor.name]
    folder.mkdir()
    write_original_folder(tensors, original_model(backbone, processor, "openai/clip-tiny", RATES), folder)
    return model


def test_names_and_config_are_those_of_the_releases(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """All keys that the released v1.6 config adds to its language model's; pinpoints are (width, height); names follow
    the independent list that was compared with the authors' model."""
    backbone = make_backbone()
    model = _write(backbone, tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    released = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "torch_dtype": "float32",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        "mm_hidden_size": 24,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_projector_lr": 2.0e-5,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-tiny",
        "mm_vision_tower_lr": 2.0e-6,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "unfreeze_mm_vision_tower": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    assert {key: config[key] for key in released} == released
    assert not {"text_config", "vision_config", "rope_parameters"} & set(config)
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    published = {tensor.name: tensor.value() for tensor in published_tensors(model, backbone, ANYRES)}
    assert {tiny_model.published_name(name) for name in tensors} == set(published)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, published[tiny_model.published_name(name)][: len(tensor)]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "original")
    assert tokenizer.chat_template
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>")
    assert (tmp_path / "original" / "preprocessor_config.json").is_file()


def test_config_has_the_keys_that_sglang_reads(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The fields of SGLang's loader (python/sglang/srt/models/llava.py and multimodal/processors/llava.py), read with
    the config class of `model_type`. AutoProcessor finds a processor with the tile and one image token per image."""
    _write(make_backbone(), tmp_path / "original")
    written = json.loads((tmp_path / "original" / "config.json").read_text())
    assert written["model_type"] == LlavaConfig.model_type
    config = LlavaConfig.from_pretrained(tmp_path / "original")
    config.vision_config.hidden_size = config.mm_hidden_size
    config.text_config.hidden_size = config.hidden_size
    assert config.projector_hidden_act == "gelu"
    assert config.architectures[0] in ("LlavaLlamaForCausalLM", "LlavaQwenForCausalLM", "LlavaMistralForCausalLM")
    assert "clip" in config.mm_vision_tower or "siglip" in config.mm_vision_tower
    assert config.mm_vision_select_feature in ("patch", "full", "cls_patch")
    assert isinstance(config.mm_vision_select_layer, int)
    assert "unpad" in config.mm_patch_merge_type
    assert config.image_aspect_ratio == "anyres"
    assert [28, 56] in config.image_grid_pinpoints
    assert config.image_token_index == written["image_token_index"]
    names = set(load_file(tmp_path / "original" / "model.safetensors"))
    for needed in ("model.mm_projector.0.weight", "model.mm_projector.2.bias", "model.image_newline", "lm_head.weight",
                   "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"):  # fmt: skip
        assert needed in names
    processor = AutoProcessor.from_pretrained(tmp_path / "original")
    assert processor.image_processor.crop_size["height"] == processor.image_processor.size["shortest_edge"] == 28
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert processor.tokenizer(text)["input_ids"].count(config.image_token_index) == 1


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded bin"])
def test_original_round_trip(make_backbone: MakeBackbone, tmp_path: Path, kind: str) -> None:
    """Equal bytes under equal names, from safetensors and from (sharded) pickles with the buffers of old versions."""
    backbone = _vicuna_like(make_backbone)
    _write(backbone, tmp_path / "first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    if kind != "safetensors":
        (tmp_path / "first" / "model.safetensors").unlink()
        everything = first | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        halves = [dict(list(everything.items())[0::2]), dict(list(everything.items())[1::2])]
        parts = {"bin": {"pytorch_model.bin": everything}}.get(
            kind, {f"pytorch_model-{n}-of-00002.bin": half for n, half in zip(("00001", "00002"), halves, strict=True)}
        )
        for name, tensors in parts.items():
            torch.save(tensors, tmp_path / "first" / name)
        index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
        if kind == "sharded bin":
            (tmp_path / "first" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    fresh = build_model(backbone, dtype=torch.float32, seed=2)
    description = load_weights(fresh, backbone, tmp_path / "first")
    assert "in the authors' layout" in description
    assert "with the mean of the others" in description
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    (tmp_path / "second").mkdir()
    original = original_model(backbone, processor, "openai/clip-tiny", RATES)
    write_original_folder(published_tensors(fresh, backbone, ANYRES), original, tmp_path / "second")
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()


def test_added_vocabulary_rows_are_omitted(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The tables end before the added image token, and loading initializes its row with the mean. Rows of the model's
    own vocabulary are kept."""
    backbone = _vicuna_like(make_backbone)
    token, size = backbone.hf_config.image_token_index, backbone.hf_config.text_config.vocab_size
    model = _write(backbone, tmp_path / "original")
    table = load_file(tmp_path / "original" / "model.safetensors")["lm_head.weight"]
    assert len(table) == token < size
    fresh = build_model(backbone, dtype=torch.float32, seed=2)
    load_weights(fresh, backbone, tmp_path / "original")
    assert torch.equal(fresh.hf.lm_head.weight[:token], model.hf.lm_head.weight[:token])
    torch.testing.assert_close(fresh.hf.lm_head.weight[token:], table.mean(0).expand(size - token, -1))
    wide = make_backbone(vocab_size=1000)
    processor = wide.processor(template=None, views=ANYRES, max_length=4096)
    assert num_vocabulary_rows(original_model(wide, processor)) == wide.hf_config.text_config.vocab_size == 1024


def test_llava_1_5_without_tower_and_newline(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Both keep their values, which is reported. A random tower is an error."""
    backbone = _vicuna_like(make_backbone)
    model = _write(backbone, tmp_path / "original", image_mode="pad")
    file = tmp_path / "original" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "vision_tower" not in name}
    file.unlink()
    torch.save(tensors, tmp_path / "original" / "pytorch_model.bin")
    assert json.loads((tmp_path / "original" / "config.json").read_text())["mm_patch_merge_type"] == "flat"
    fresh = build_model(backbone, dtype=torch.float32, seed=2)
    with pytest.raises(ModelError, match=r"not contain a vision tower .*weights=random loads none.*openai/clip-tiny"):
        load_weights(fresh, backbone, tmp_path / "original")
    tower = replace(backbone.config.vision_tower, weights="pretrained")
    pretrained = replace(backbone, config=replace(backbone.config, vision_tower=tower))
    before = _state(fresh)
    description = load_weights(fresh, pretrained, tmp_path / "original")
    assert "it contains no vision tower" in description
    assert "no image_newline, which is newly initialized" in description
    after, expected = _state(fresh), _state(model)
    for name, tensor in after.items():
        is_unchanged = name.startswith(("hf.model.vision_tower", "hf.model.image_newline"))
        rows = backbone.hf_config.image_token_index if "embed_tokens" in name or "lm_head" in name else len(tensor)
        assert torch.equal(tensor[:rows], (before if is_unchanged else expected)[name][:rows]), name


@pytest.mark.parametrize("size", [(33, 50), (50, 33), (1, 70)])
@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_image_processor_distinguishes_crop_and_squash(
    make_backbone: MakeBackbone, tmp_path: Path, mode: ImageMode, size: tuple[int, int]
) -> None:
    """image_aspect_ratio is `square` for both modes, and the directory's image processor, which SGLang calls, makes the
    pixels of training."""
    backbone = make_backbone("siglip")
    _write(backbone, tmp_path / "original", image_mode=mode)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("square", "flat")
    encoded = encode_noise_image(5, size)
    messages = [Message("user", "<image>\nWhat?"), Message("assistant", "A circle.")]
    processor = backbone.processor(template=None, views=ViewsConfig(mode, mode), max_length=4096)
    tiles = processor.encode(messages, [size], [encoded]).tiles
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "original")
    image = Image.open(io.BytesIO(encoded))
    pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tiles, np.asarray(pixels).transpose(0, 2, 3, 1))
    tower = backbone.config.vision_tower
    assert (tuple(image_processor.image_mean), tuple(image_processor.image_std)) == (tower.image_mean, tower.image_std)


def test_linear_projector_has_one_layer(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """mm_projector.weight and its bias. A model with two layers raises an error with the setting."""
    linear = make_backbone(projector="linear")
    model = _write(linear, tmp_path / "original")
    names = set(load_file(tmp_path / "original" / "model.safetensors"))
    assert {name for name in names if "projector" in name} == {"model.mm_projector.weight", "model.mm_projector.bias"}
    fresh = build_model(linear, dtype=torch.float32, seed=2)
    load_weights(fresh, linear, tmp_path / "original")
    projector = "hf.model.multi_modal_projector.weight"
    assert torch.equal(_state(fresh)[projector], _state(model)[projector])
    two = make_backbone()
    with pytest.raises(ModelError, match=r"of kind linear, this model's is mlp2x_gelu; set model.projector=linear"):
        load_weights(build_model(two, dtype=torch.float32, seed=0), two, tmp_path / "original")


def test_mismatches_are_errors(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Tensors, feature layer, grids and projector; messages have both values and the fix. No parameter is modified."""
    backbone = make_backbone()
    _write(backbone, tmp_path / "original")
    file, config_file = tmp_path / "original" / "model.safetensors", tmp_path / "original" / "config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    fresh = build_model(backbone, dtype=torch.float32, seed=2)
    before = _state(fresh)
    newline, head = "model.image_newline", "lm_head.weight"
    for changed, message in (
        ({name: t for name, t in tensors.items() if name != newline}, r"lacks 1 tensor.*image_newline of shape \[32\]"),
        (
            tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)},
            r"has 1 tensor.*layers\.9.*use the language",
        ),
        (tensors | {newline: torch.ones(33)}, r"image_newline has shape \[33\], this model needs \[32\]; use"),
        (
            tensors | {head: torch.ones(9999, 32)},
            r"lm_head.weight has shape \[9999, 32\], this model needs \[\d+, 32\]",
        ),
        (tensors | {newline: torch.ones(32, dtype=torch.int8)}, r"image_newline has dtype int8"),
    ):
        save_file(changed, file)
        with pytest.raises(ModelError, match=message):
            load_weights(fresh, backbone, tmp_path / "original")
    save_file(tensors, file)
    for changes, message in (
        ({"mm_projector_type": "mlp3x_gelu"}, r"mm_projector_type=mlp3x_gelu is not supported"),
        (
            {"mm_vision_select_layer": -1},
            r"layer -1, but model.vision_tower.feature_layer is -2; set .*feature_layer=-1",
        ),
        ({"image_grid_pinpoints": [[30, 56]]}, r"image_grid_pinpoints contains \[30, 56\].*28 pixels"),
    ):
        config_file.write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            load_weights(fresh, backbone, tmp_path / "original")
    config_file.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(
        ModelError, match=r"model_type llama \(LlamaForCausalLM\), which is not a LLaVA.*language_model.path"
    ):
        load_weights(fresh, backbone, tmp_path / "original")
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(fresh).items())
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    original = original_model(backbone, processor)
    original.config["text_config"]["model_type"] = "gemma"
    with pytest.raises(ModelError, match=r"no class for a gemma, only LlavaLlamaForCausalLM.*--format hf"):
        original_config(original, torch.float32)
