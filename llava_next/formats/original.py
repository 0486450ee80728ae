"""Directories in the authors' own layout, for SGLang and the authors' code: their tensor names, their config.json.

The language model's keys stand at the top of the config, the rest is `mm_*`; pinpoints are (width, height), where
Hugging Face's are (height, width). Names are `tensor_names.py`'s; weights from such a directory `load.py`'s.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil, GenerationConfig, PreTrainedTokenizerFast, SiglipImageProcessorPil

from llava_next.config import ImageMode, ModelError, ProjectorKind
from llava_next.formats.hugging_face import generation_config, serving_tokenizer, write_tokenizer_settings
from llava_next.formats.tensor_names import original_name
from llava_next.formats.tensors import LazyTensor, write_shards
from llava_next.inputs.chat_template import chat_template, word_separator
from llava_next.inputs.processor import Processor
from llava_next.model.architecture import VOCABULARY_MULTIPLE
from llava_next.model.build import Backbone
from llava_next.model.released import ARCHITECTURES

_OF_HF = ("architectures", "model_type", "dtype", "torch_dtype", "rope_parameters", "transformers_version")


@dataclass(frozen=True)
class OriginalModel:
    """What a directory in the authors' layout is written from.

    Attributes:
        config: `to_dict()` of the stock LLaVA-NeXT's (or LLaVA's) config.
        kind: of the projector.
        image_mode: what its pictures were shown as.
        tokenizer: with the chat template in it.
        generation: where a generation stops.
        vision_tower: the tower's directory, or its name on the hub: where the authors' code and SGLang take the tower's
            config from (its weights are in this directory).
        image_mean, image_std: of the tower.
        rates: the learning rate of each trained part, as the authors note two of them.
    """

    config: dict[str, Any]
    kind: ProjectorKind
    image_mode: ImageMode
    tokenizer: PreTrainedTokenizerFast
    generation: GenerationConfig
    vision_tower: str
    image_mean: Sequence[float]
    image_std: Sequence[float]
    rates: Mapping[str, float] = field(default_factory=dict)


def of_backbone(
    backbone: Backbone, processor: Processor, vision_tower: str | None = None, rates: Mapping[str, float] | None = None
) -> OriginalModel:
    """What a run's model is written from; `vision_tower` None names the directory that the run has it from."""
    tower = backbone.config.vision_tower
    # As the authors' releases: the tokenizer adds the token, which their code and SGLang rely on.
    tokenizer = serving_tokenizer(backbone, processor.template, opens_text=True)
    tokenizer.chat_template = chat_template(processor.template, prints_bos=False, separator=word_separator(tokenizer))
    return OriginalModel(
        backbone.hf_config.to_dict(),
        backbone.config.projector,
        processor.config.image_mode,
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
    """Fills a folder, which is there, with the directory.

    Args:
        tensors: in published names, without the identity that stands for a linear projector's second layer.

    Raises:
        ModelError: a language model that the authors' layout has no class for.
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
    if model.image_mode == "squash":
        SiglipImageProcessorPil(size=square, **colours).save_pretrained(folder)
    else:
        CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square, **colours).save_pretrained(folder)


def original_tensors(tensors: Sequence[LazyTensor], model: OriginalModel) -> list[LazyTensor]:
    """The same tensors in the authors' names, the tables without the rows of our image token and padding."""
    rows = num_rows(model)
    named = []
    for tensor in tensors:
        name = original_name(tensor.name, model.kind)
        if name in ("model.embed_tokens.weight", "lm_head.weight") and rows < tensor.shape[0]:
            tensor = tensor.rows(rows)
        named.append(tensor.renamed(name))
    return named


def num_rows(model: OriginalModel) -> int:
    """Rows of the vocabulary that the authors' layout has: their tokenizers know no image token, so where ours comes
    last, with nothing but padding behind it, the tables end before it."""
    size, token = _vocab_size(model), int(model.config["image_token_index"])
    is_last = token == len(model.tokenizer) - 1
    return token if is_last and size - token <= VOCABULARY_MULTIPLE else size


def _vocab_size(model: OriginalModel) -> int:
    return int(model.config["text_config"]["vocab_size"])


def original_config(model: OriginalModel, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json, with the keys of the released v1.6 checkpoints.

    What SGLang reads of it (python/sglang/srt/models/llava.py and multimodal/processors/llava.py): architectures,
    model_type `llava` (which its transformers knows, with a vision_config and a text_config by default), hidden_size
    and the other keys of the language model, mm_hidden_size, mm_vision_tower (with `clip` or `siglip` in it),
    mm_vision_select_layer, mm_vision_select_feature, mm_patch_merge_type, image_aspect_ratio, image_grid_pinpoints,
    image_token_index.

    image_aspect_ratio `square` says that the image processor alone makes the view. SGLang takes that of the directory,
    which crops the centre (CLIP's, image mode square) or resizes the whole image to a square (SigLIP's, squash). The
    authors' code takes the one of its tower: CLIP's crops, SigLIP's (LLaVA-VL/LLaVA-NeXT) resizes, and neither can do
    what the other does.
    """
    text, vision = model.config["text_config"], model.config["vision_config"]
    if text["model_type"] not in ARCHITECTURES:
        raise ModelError(
            f"the authors' layout has no class for a {text['model_type']}; it has {', '.join(ARCHITECTURES.values())}; "
            "export with --format hf"
        )
    tile = int(vision["image_size"])
    anyres = model.image_mode == "anyres"
    config = {key: value for key, value in text.items() if key not in _OF_HF}
    config |= _rope(text) | {
        "architectures": [ARCHITECTURES[text["model_type"]]],
        "model_type": "llava",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": num_rows(model),
        "tie_word_embeddings": bool(model.config["tie_word_embeddings"]),
        "pad_token_id": model.config.get("pad_token_id"),
        "bos_token_id": model.generation.bos_token_id,
        "eos_token_id": model.generation.eos_token_id,
        "image_token_index": model.config["image_token_index"],
        "image_aspect_ratio": "square" if model.image_mode == "squash" else model.image_mode,
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
        "unfreeze_mm_vision_tower": True,  # to their code: the tower's weights are in here
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    if anyres:
        config["image_grid_pinpoints"] = [[width, height] for height, width in model.config["image_grid_pinpoints"]]
        config["image_crop_resolution"] = config["image_split_resolution"] = tile  # of their config, read by nobody
    return config


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings as transformers 4 has them."""
    found = dict(text.get("rope_parameters") or {})
    theta, kind = found.pop("rope_theta", 10000.0), found.pop("rope_type", "default")
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **found},
    }
