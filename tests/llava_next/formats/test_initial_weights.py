"""Initial weights that are read one at a time are bitwise those of `build_model` and `load_weights`, and only parts
without usable files are built."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Qwen2Config, Qwen2ForCausalLM

from llava_next.config import PARTS, ModelConfig, ViewsConfig
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import published_tensors, write_hf
from llava_next.formats.initial_weights import read_initial_weights
from llava_next.formats.load_weights import load_weights
from llava_next.formats.original import original_model, write_original_folder
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.parts import live_parameters
from tests.llava_next.models import pretrained
from tests.tiny import TowerName, tiny_model

STACKS = ("vision_tower", "language_model")


class RecordedBuilds:
    """Wraps `build_model` and records the requested parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[set[str]] = []
        monkeypatch.setattr("llava_next.formats.initial_weights.build_model", self)

    def __call__(self, backbone: Backbone, *, parts: Collection[str], **options: Any) -> Any:
        self.parts.append(set(parts))
        return build_model(backbone, parts=parts, **options)


def _compare(
    config: ModelConfig, dtype: torch.dtype, init_from: Path | None = None, parts: Collection[str] = PARTS
) -> list[str]:
    """Compares the initial weights, in value and dtype, with those of a run; returns the messages."""
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=dtype, seed=5)
    if init_from is not None:
        load_weights(model, backbone, init_from)
    shapes = build_model(backbone, dtype=dtype, seed=5, parts=())
    actual, message = read_initial_weights(shapes, backbone, parts=parts, seed=5, init_from=init_from)
    for name, parameter in live_parameters(model):
        if parts == PARTS:
            assert name in actual
        if name in actual:
            tensor = actual[name].value()
            assert (actual[name].name, actual[name].shape, actual[name].dtype) == (name, tensor.shape, dtype)
            assert torch.equal(tensor, parameter.detach()), name
    assert all(parameter.is_meta for _, parameter in live_parameters(shapes))
    return message


@pytest.mark.parametrize(
    ("tower", "tied", "dtype"),
    [
        ("clip", True, torch.float32),
        ("clip", False, torch.bfloat16),
        ("siglip", False, torch.float32),
        ("dinov2", True, torch.bfloat16),
        ("dinov2_with_registers", False, torch.float32),
        ("dinov3", False, torch.float32),
        ("aimv2", False, torch.float32),
        ("ijepa", False, torch.float32),
    ],
)
def test_published_directories_are_read_without_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: TowerName, tied: bool, dtype: torch.dtype
) -> None:
    """Towers and language models, tied and untied heads, extended vocabularies and resampled positions are read from
    files; only the connector, which is random, is built."""
    config = pretrained(tmp_path, tower, tied=tied)
    built = RecordedBuilds(monkeypatch)
    assert _compare(config, dtype) == []
    resized = replace(config, vision_tower=replace(config.vision_tower, tile=42))
    assert _compare(resized, dtype) == []
    assert _compare(config, dtype, parts=STACKS) == []
    assert built.parts == [{"projector", "image_newline"}] * 2


def test_names_of_other_layouts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete CLIP under its published names in a `.bin` file, and a Qwen2 with biases in shards."""
    config = pretrained(tmp_path)
    vision = read_backbone(config).hf_config.vision_config
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config={"hidden_size": 8, "num_hidden_layers": 1,
                     "intermediate_size": 8, "num_attention_heads": 1}))  # fmt: skip
    folder = Path(config.vision_tower.path)
    clip.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "vision_model.pre_layrnorm.weight" in tensors
    torch.save(tensors, folder / "pytorch_model.bin")
    text = read_backbone(config).hf_config.text_config
    sizes = {key: getattr(text, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    language = Path(config.language_model.path)
    (language / "model.safetensors").unlink()
    Qwen2ForCausalLM(Qwen2Config(vocab_size=520, **sizes)).save_pretrained(language, max_shard_size="20KB")
    assert len(list(language.glob("*.safetensors"))) > 2
    built = RecordedBuilds(monkeypatch)
    assert _compare(config, torch.bfloat16, parts=STACKS) == []
    assert built.parts == []


def test_part_that_transformers_converts_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower with a classifier's prefix is built by transformers, with a message; no other part is built."""
    config = pretrained(tmp_path, "dinov2")
    file = Path(config.vision_tower.path) / "model.safetensors"
    save_file({f"dinov2.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    built = RecordedBuilds(monkeypatch)
    (message,) = _compare(config, torch.float32, parts=STACKS)
    assert built.parts == [{"vision_tower"}]
    assert message == f"the vision_tower is built in memory: {file.parent} stores its tensors in another form"


def test_random_parts_are_drawn_in_order(tmp_path: Path) -> None:
    """A random tower's weights depend on the numbers drawn before for the language model."""
    config = tiny_model(tmp_path)
    message = [f"the {part} is built in memory: no file contains its weights" for part in STACKS]
    assert _compare(config, torch.float32) == message
    assert _compare(config, torch.float32, parts=["vision_tower"]) == message[:1]
    assert _compare(config, torch.float32, parts=["projector"]) == []


@pytest.mark.parametrize("layout", ["hf", "original", "without_tower", "single_view", "connector"])
def test_init_from_is_read_without_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Complete models in both layouts, without a tower, without a newline, and a connector; missing parts come from
    their directories or are random."""
    token = read_backbone(tiny_model(tmp_path / "tokenizer")).hf_config.image_token_index
    config = pretrained(tmp_path / "parts", vocab_size=token)
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.bfloat16, seed=9)
    with torch.no_grad():
        for _, parameter in live_parameters(model):
            parameter.add_(0.25)
    mode: Any = "crop" if layout == "single_view" else "anyres"
    processor = backbone.processor(template=None, views=ViewsConfig(mode, mode), max_length=512)
    folder = tmp_path / layout
    if layout in ("hf", "single_view"):
        write_hf(model, backbone, processor, folder)
    elif layout == "connector":
        write_connector(model, backbone, folder)
    else:
        folder.mkdir()
        tensors = published_tensors(model, backbone, ViewsConfig(mode, mode))
        if layout == "without_tower":
            tensors = [tensor for tensor in tensors if not tensor.name.startswith("vision_tower.")]
        write_original_folder(tensors, original_model(backbone, processor), folder)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        assert size < backbone.hf_config.text_config.vocab_size
    built = RecordedBuilds(monkeypatch)
    assert _compare(config, torch.float32, init_from=folder) == []
    assert built.parts == ([{"projector", "image_newline"}] if layout == "single_view" else [])
