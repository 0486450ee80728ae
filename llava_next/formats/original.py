"""Writes models in the authors' layout, for SGLang and the authors' code.

The config has the language model's keys at the top level and other keys as `mm_*`; pinpoints are (width, height), where
the Hugging Face layout has (height, width).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil, GenerationConfig, PreTrainedTokenizerFast, SiglipImageProcessorPil

from llava_next.config import ModelError, ProjectorKind, ViewsConfig, stock_class
from llava_next.formats.hugging_face import generation_config, serving_tokenizer, write_tokenizer_settings
from llava_next.formats.tensor_names import to_original_name
from llava_next.formats.tensors import LazyTensor, write_shards
from llava_next.inputs.chat_template import chat_template, word_separator
from llava_next.inputs.processor import Processor
from llava_next.model.architecture import VOCABULARY_MULTIPLE
from llava_next.model.build import Backbone
from llava_next.model.checkpoint_config import ARCHITECTURES

_HF_KEYS = ("architectures", "model_type", "dtype", "torch_dtype", "rope_parameters", "transformers_version")


@dataclass(frozen=True)
class OriginalModel:
    """The contents of a directory in the authors' layout, besides the weights.

    Attributes:
        config: `to_dict()` of the stock LLaVA-NeXT's (or LLaVA's) config.
        kind: of the projector.
        views: how images became views in training.
        tokenizer: with its chat template.
        generation: the generation config, which gives the stop tokens.
        vision_tower: the tower's directory or its name on the hub, from which the authors' code and SGLang read the
            tower's config (its weights are in the model's directory).
        image_mean, image_std: of the tower.
        rates: the learning rate of each trained part; the authors' config records two of them.
    """

    config: dict[str, Any]
    kind: ProjectorKind
    views: ViewsConfig
    tokenizer: PreTrainedTokenizerFast
    generation: GenerationConfig
    vision_tower: str
    image_mean: Sequence[float]
    image_std: Sequence[float]
    rates: Mapping[str, float] = field(default_factory=dict)


def original_model(
    backbone: Backbone, processor: Processor, vision_tower: str | None = None, rates: Mapping[str, float] | None = None
) -> OriginalModel:
    """The `OriginalModel` of a run.

    Args:
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        vision_tower: see `OriginalModel`; None means the tower's directory of the run.
        rates: see `OriginalModel`.
    """
    tower = backbone.config.vision_tower
    # The authors' code and SGLang rely on a tokenizer that adds the beginning-of-sequence token.
    tokenizer = serving_tokenizer(backbone, processor.template, add_bos=True)
    tokenizer.chat_template = chat_template(processor.template, include_bos=False, separator=word_separator(tokenizer))
    return OriginalModel(
        backbone.hf_config.to_dict(),
        backbone.config.projector,
        processor.config.views,
        tokenizer,
        generation_config(backbone, processor.template),
        vision_tower or str(Path(tower.path).absolute()),
        tower.image_mean,
        tower.image_std,
        rates or {},
    )


def write_original_folder(
    tensors: Sequence[LazyTensor], model: OriginalModel, folder: Path, shard_bytes: int | None = None
) -> None:
    """Writes a model in the authors' layout into an existing directory.

    Args:
        tensors: under published names, without the identity second layer of a linear projector.
        model: the other contents.
        folder: an empty directory.
        shard_bytes: see `write_shards`.

    Raises:
        ModelError: the authors' code has no class for the language model.
    """
    config = original_config(model, tensors[0].dtype)
    write_shards(original_tensors(tensors, model), folder, shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.generation.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    write_tokenizer_settings(folder, model.tokenizer)
    tile = model.config["vision_config"]["image_size"]
    square, colours = {"height": tile, "width": tile}, {"image_mean": model.image_mean, "image_std": model.image_std}
    colours = {key: list(values) for key, values in colours.items()}
    if model.views.single == "squash":
        SiglipImageProcessorPil(size=square, **colours).save_pretrained(folder)
    else:
        CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square, **colours).save_pretrained(folder)


def original_tensors(tensors: Sequence[LazyTensor], model: OriginalModel) -> list[LazyTensor]:
    """The tensors under original names, the vocabulary tables without rows of the image token and of padding."""
    rows = num_vocabulary_rows(model)
    named = []
    for tensor in tensors:
        name = to_original_name(tensor.name, model.kind)
        if name in ("model.embed_tokens.weight", "lm_head.weight") and rows < tensor.shape[0]:
            tensor = tensor.first_rows(rows)
        named.append(tensor.renamed(name))
    return named


def num_vocabulary_rows(model: OriginalModel) -> int:
    """Number of rows of the vocabulary tables in the authors' layout.

    The authors' tokenizers have no image token. If it is the last token, followed only by padding, its row is omitted.
    """
    size, token = _vocab_size(model), int(model.config["image_token_index"])
    is_last = token == len(model.tokenizer) - 1
    return token if is_last and size - token <= VOCABULARY_MULTIPLE else size


def _vocab_size(model: OriginalModel) -> int:
    return int(model.config["text_config"]["vocab_size"])


def original_config(model: OriginalModel, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json, with the keys of the released v1.6 checkpoints.

    SGLang (python/sglang/srt/models/llava.py and multimodal/processors/llava.py) reads architectures, model_type
    `llava`, hidden_size and the other keys of the language model, mm_hidden_size, mm_vision_tower (which must contain
    `clip` or `siglip`), mm_vision_select_layer, mm_vision_select_feature, mm_patch_merge_type, image_aspect_ratio,
    image_grid_pinpoints and image_token_index.

    image_aspect_ratio `square` means that the image processor makes the view. SGLang uses the processor of the
    directory, which crops the center (CLIP's, image mode crop) or resizes the entire image to a square (SigLIP's,
    squash). The authors' code uses the processor of its tower: CLIP's crops, SigLIP's (LLaVA-VL/LLaVA-NeXT) resizes.

    Args:
        model: the other contents of the directory.
        dtype: of the weights.

    Raises:
        ModelError: the authors' code has no class for the language model.
    """
    text, vision = model.config["text_config"], model.config["vision_config"]
    if text["model_type"] not in ARCHITECTURES:
        raise ModelError(
            f"the authors' layout has no class for a {text['model_type']}, only {', '.join(ARCHITECTURES.values())}; "
            "export with --format hf"
        )
    tile = int(vision["image_size"])
    anyres = stock_class(model.views) != "llava"
    config = {key: value for key, value in text.items() if key not in _HF_KEYS}
    config |= _rope(text) | {
        "architectures": [ARCHITECTURES[text["model_type"]]],
        "model_type": "llava",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": num_vocabulary_rows(model),
        "tie_word_embeddings": bool(model.config["tie_word_embeddings"]),
        "pad_token_id": model.config.get("pad_token_id"),
        "bos_token_id": model.generation.bos_token_id,
        "eos_token_id": model.generation.eos_token_id,
        "image_token_index": model.config["image_token_index"],
        "image_aspect_ratio": "square" if model.views.single in ("crop", "squash") else model.views.single,
        "mm_hidden_size": vision["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_projector_type": model.kind,
        "mm_projector_lr": model.rates.get("projector"),
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config["vision_feature_layer"],
        "mm_vision_tower": model.vision_tower,
        "mm_vision_tower_lr": model.rates.get("vision_tower"),
        "unfreeze_mm_vision_tower": True,  # the authors' code then loads the tower's weights from this directory
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    if anyres:
        config["image_grid_pinpoints"] = [[width, height] for height, width in model.config["image_grid_pinpoints"]]
        config["image_crop_resolution"] = config["image_split_resolution"] = tile  # in the released configs, not read
    return config


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys of rotary embeddings in transformers 4."""
    parameters = dict(text.get("rope_parameters") or {})
    theta, kind = parameters.pop("rope_theta", 10000.0), parameters.pop("rope_type", "default")
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **parameters},
    }
