"""The tiny model of this project: directories that `read_backbone` reads, and `LlavaNext` with the same weights."""

import json
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_next.config import ANYRES, LanguageModelConfig, ModelConfig, ViewsConfig, VisionTowerConfig
from llava_next.formats.tensor_names import published_name
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from tests.oracles import tiny_model

VIEWS = {"anyres": ANYRES, "square": ViewsConfig("crop", "crop")}
"""Our views for the authors' `image_aspect_ratio`."""


def write_directories(folder: Path) -> ModelConfig:
    """Configs and tokenizer, without weights; `folder` is made."""
    language_model, tower = folder / "language_model", folder / "tower"
    CLIPVisionConfig(**tiny_model.TOWER).save_pretrained(tower)
    LlamaConfig(**tiny_model.LANGUAGE_MODEL).save_pretrained(language_model)
    specials = [
        {"id": row, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for row, text in enumerate(tiny_model.SPECIALS)
    ]
    pieces = [*tiny_model.SPECIALS, *tiny_model.CHARACTERS]
    table = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": False,
        "vocab": {piece: row for row, piece in enumerate(pieces)},
        "merges": [],
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    whole = {"version": "1.0", "added_tokens": specials, "model": table}
    (language_model / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (language_model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return ModelConfig(
        LanguageModelConfig("oracle", str(language_model), "vicuna_v1", weights="random"),
        VisionTowerConfig("oracle", str(tower), weights="random", feature_layer=tiny_model.FEATURE_LAYER),
    )


def build(config: ModelConfig) -> tuple[Backbone, LlavaNext]:
    """The model of `write_directories`, fp32, with the weights of the authors' side."""
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    with torch.no_grad():
        for live, parameter in live_parameters(model):
            name = _name(live)
            parameter.copy_(torch.from_numpy(tiny_model.weight(name, parameter.shape)))
    return backbone, model


def _name(live: str) -> str:
    return published_name(live, "clip_vision_model")
