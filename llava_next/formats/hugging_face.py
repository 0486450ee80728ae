"""Directories of whole models in the Hugging Face layout: written for transformers and vLLM, read back.

Writing streams tensor by tensor, from a live model or from files; where parameters are partitioned every rank walks the
same list and the caller's `gather` makes them whole. Everything is safetensors. What stands between the stages is
`connector.py`'s, the authors' layout `original.py`'s, and weights for a model that is there already `load.py`'s.

A model that saw AnyRes tiles is written as a LLaVA-NeXT. One that saw single views is written as a LLaVA (1.5), whose
stock processor makes the same view: as a LLaVA-NeXT it would be served tiles that it never saw.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_next.config import Grid, ImageMode, ModelConfig, ModelError
from llava_next.formats.atomic import Gather, complete_or_absent, no_gather
from llava_next.formats.merge_adapters import merged
from llava_next.formats.tensor_names import published_name
from llava_next.formats.tensors import LazyTensor, from_tensor, write_shards
from llava_next.inputs.anyres import grids_of_pinpoints
from llava_next.inputs.chat_template import adds_bos, chat_template, set_post_processor, word_separator
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER, Template
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, read_tokenizer, require_all_weights_loaded
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from llava_next.model.released import projector_kind
from llava_next.model.towers import tower_config

NEWLINE = "image_newline"
SECOND_LAYER = ("multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias")
"""What the published layout has and a linear projector has not: written as the identity."""

_KEYS_OF_BOTH = (
    "image_token_index",
    "image_seq_length",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "tie_word_embeddings",
    "pad_token_id",
)
"""Of LLaVA's config and LLaVA-NeXT's, besides the two configs inside."""


def write_hf(
    model: LlavaNext, backbone: Backbone, processor: Processor, target: Path | None, gather: Gather = no_gather
) -> None:
    """Writes the model as a directory that stock transformers loads.

    Args:
        model: the live model; its weights are written in their own dtype.
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        target: the directory, or None on ranks that only help to gather.
        gather: makes parameters whole while inside it.
    """
    keep = target is not None
    tensors = published_tensors(model, backbone, processor.config.image_mode, gather, keep=keep)
    with complete_or_absent(target) as folder:
        write_hf_folder(tensors, backbone, processor, folder)


def write_hf_folder(
    tensors: Sequence[LazyTensor],
    backbone: Backbone,
    processor: Processor,
    folder: Path | None,
    shard_bytes: int | None = None,
) -> None:
    """Fills a folder with a model's directory: weights, then all that says what they are.

    Args:
        tensors: as `as_stock` gives them, all of one dtype.
        folder: is there; None on ranks that only help to gather.
        shard_bytes: see `write_shards`.
    """
    write_shards(tensors, folder, shard_bytes)
    if folder is None:
        return
    config = stock_config(backbone, processor.config.image_mode)
    for described in (config, config.text_config, config.vision_config):
        described.dtype = tensors[0].dtype
    config.save_pretrained(folder)
    generation_config(backbone, processor.template).save_pretrained(folder)
    save_processor(backbone, processor, folder)


def generation_config(backbone: Backbone, template: Template) -> GenerationConfig:
    """Where a generation stops and what it is padded with; greedy, as nothing else was learned."""
    return GenerationConfig(
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=_stop_ids(backbone, template),
        pad_token_id=backbone.tokenizer.pad_token_id,
    )


def check_identity(tensor: torch.Tensor, name: str, source: Path) -> None:
    """Raises ModelError unless the second layer of a linear projector does nothing."""
    nothing = torch.eye(len(tensor), dtype=tensor.dtype) if tensor.ndim == 2 else torch.zeros_like(tensor)
    if not torch.equal(tensor, nothing):
        raise ModelError(
            f"{source}: {name} is not the identity, so its projector is two linear layers without an activation, which "
            "is none of ours; multiply them into one"
        )


def published_tensors(
    model: LlavaNext, backbone: Backbone, image_mode: ImageMode, gather: Gather = no_gather, *, keep: bool = True
) -> list[LazyTensor]:
    """The tensors of a live model as its directory has them, by their published names.

    Args:
        gather: makes parameters whole while inside it.
        keep: whether this rank wants what it has helped to gather.
    """
    live = [live_tensor(name, parameter, gather, keep=keep) for name, parameter in live_parameters(model)]
    return as_stock(live, model, backbone, image_mode)


def as_stock(
    tensors: Iterable[LazyTensor], model: LlavaNext, backbone: Backbone, image_mode: ImageMode
) -> list[LazyTensor]:
    """What the stock model of the image mode has, by its published names: adapters are merged, a linear projector's
    second layer is added, a newline that is never used left out.

    Args:
        tensors: of all of `live_parameters(model)`, by their live names.
    """
    tower_type = backbone.hf_config.vision_config.model_type
    named = [tensor.renamed(published_name(tensor.name, tower_type)) for tensor in merged(model, tensors)]
    if backbone.config.projector == "linear":
        dtype = next(tensor.dtype for tensor in named if tensor.name == NEWLINE)
        width = backbone.hf_config.text_config.hidden_size
        identity = (torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype))
        named += [from_tensor(name, tensor) for name, tensor in zip(SECOND_LAYER, identity, strict=True)]
    return [tensor for tensor in named if image_mode == "anyres" or tensor.name != NEWLINE]


def live_tensor(name: str, parameter: nn.Parameter, gather: Gather = no_gather, *, keep: bool = True) -> LazyTensor:
    """A parameter that may be partitioned (ZeRO-3), to be read by every rank at once."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))

    def read() -> torch.Tensor | None:
        with gather([parameter]):
            return parameter.detach().cpu().clone() if keep else None

    return LazyTensor(name, shape, parameter.dtype, read)


def stock_config(backbone: Backbone, image_mode: ImageMode) -> LlavaNextConfig | LlavaConfig:
    """The config of the stock model that sees what the image mode showed."""
    config = backbone.hf_config
    if image_mode == "anyres":
        config.architectures = ["LlavaNextForConditionalGeneration"]
        return config
    config = copy.deepcopy(config)  # what is given to a new config forgets how the live model attends
    single = LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        **{key: getattr(config, key) for key in _KEYS_OF_BOTH},
    )
    single.architectures = ["LlavaForConditionalGeneration"]
    return single


def _stop_ids(backbone: Backbone, template: Template) -> int | list[int] | None:
    eos = backbone.tokenizer.eos_token_id
    if not template.end:
        return eos
    end = backbone.tokenizer.convert_tokens_to_ids(template.end)
    return end if eos is None or end == eos else [end, eos]


def stock_processor(backbone: Backbone, processor: Processor) -> LlavaNextProcessor | LlavaProcessor:
    """The stock processor that cuts the same views and renders the same prompt."""
    tower, image_mode = backbone.config.vision_tower, processor.config.image_mode
    pixels: dict[str, Any] = {
        "size": {"shortest_edge": backbone.tile},
        "crop_size": {"height": backbone.tile, "width": backbone.tile},
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
    }
    strategy = backbone.hf_config.vision_feature_select_strategy
    tokenizer = serving_tokenizer(backbone, processor.template)
    words: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": backbone.hf_config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
        "chat_template": chat_template(processor.template, separator=word_separator(tokenizer)),
    }
    if image_mode == "squash":  # resized to height and width, whatever the aspect ratio, as SigLIP's own processor does
        pixels |= {"size": {"height": backbone.tile, "width": backbone.tile}, "do_center_crop": False}
    if image_mode != "anyres":
        return LlavaProcessor(LlavaImageProcessorPil(do_pad=image_mode == "pad", **pixels), **words)
    grids = backbone.hf_config.image_grid_pinpoints
    return LlavaNextProcessor(LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **pixels), **words)


def stock_image_mode(model_type: str, images: Any, source: Path) -> ImageMode:
    """The image mode whose views a stock model's image processor makes; `stock_processor` read backwards.

    Args:
        model_type: of the directory's config, llava_next or llava.
        images: the image processor; of a LLaVA one of LLaVA's, CLIP's or SigLIP's.
        source: the directory, for messages.

    Raises:
        ModelError: its view is not one of ours: not a square, or a crop of an image that was resized to a square.
    """
    if model_type == "llava_next":
        return "anyres"
    if getattr(images, "do_pad", False):
        return "pad"
    height, width = images.size.get("height"), images.size.get("width")
    if height is None or width is None:  # the short side is resized, then the centre is cropped
        return "square"
    cropped = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    if height != width or (cropped["height"], cropped["width"]) != (height, width):
        raise ModelError(
            f"{source}: its image processor resizes to {height} x {width} and crops to {cropped['height']} x "
            f"{cropped['width']} (height x width), which is no image mode; set its size and crop_size to one square"
        )
    return "squash"


def save_processor(backbone: Backbone, processor: Processor, folder: Path) -> None:
    """Writes the files from which `AutoProcessor` loads the stock processor."""
    stock = stock_processor(backbone, processor)
    stock.save_pretrained(folder)
    write_tokenizer_settings(folder, stock.tokenizer)


def serving_tokenizer(backbone: Backbone, template: Template, *, opens_text: bool = False) -> Any:
    """The tokenizer of an export: pads on the left, as generation in batches needs, and calls the template's end its
    end of sequence, as published checkpoints do (some programs, such as lmms-eval, stop at that token alone).

    Args:
        opens_text: add the beginning-of-sequence token of a template that opens with it. Otherwise the tokenizer adds
            no special token, and the chat template has to print it (see `chat_template.py`).
    """
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.padding_side = "left"
    if template.end:
        tokenizer.eos_token = template.end
    set_post_processor(tokenizer, adds_bos=opens_text and template.bos)
    return tokenizer


def write_tokenizer_settings(folder: Path, tokenizer: Any) -> None:
    """Completes the tokenizer_config.json of a saved tokenizer with what transformers 5 does not save: the padding side
    of one that was loaded without; `legacy`, by which its Llama tokenizer chooses where words begin when it is loaded
    again; and `add_bos_token`, without which the Llama tokenizer of older versions adds the token."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"padding_side": "left", "add_bos_token": adds_bos(tokenizer), "add_eos_token": False}
    if hasattr(tokenizer, "legacy"):
        settings["legacy"] = bool(tokenizer.legacy)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_hf(source: Path, config: ModelConfig) -> tuple[Backbone, LlavaNext]:
    """A directory that `write_hf` made, loaded by stock transformers and wrapped for packed rows.

    Args:
        source: the directory; its own config, tokenizer and grids are used.
        config: names the parts and gives the tower's image mean and standard deviation.

    Raises:
        ModelError: transformers does not read it, or would make up a tensor, or its grids are no multiples of its tile.
    """
    try:
        stock, found = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source} is no model that transformers reads: {error}") from error
    require_all_weights_loaded(found, str(source))
    model = wrapped(stock, config, source)
    tower = replace(config.vision_tower, feature_layer=model.hf.config.vision_feature_layer)
    grids = config.grids
    if isinstance(stock, LlavaNextForConditionalGeneration):
        grids = grids_of_pinpoints(stock.config.image_grid_pinpoints, stock.config.vision_config.image_size)
    kind = projector_kind(model.hf.config.to_dict(), source)
    config = replace(config, grids=grids, vision_tower=tower, projector=kind)
    tokenizer = read_tokenizer(str(source))
    token = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if token != model.hf.config.image_token_index:
        raise ModelError(
            f"{source}: its tokenizer has no {IMAGE_PLACEHOLDER} where its config.json says (image_token_index="
            f"{model.hf.config.image_token_index}, the tokenizer gives it {token}); give it the tokenizer that it was "
            "published with"
        )
    return Backbone(config, model.hf.config, tokenizer), model


def wrapped(stock: PreTrainedModel, config: ModelConfig, source: Path) -> LlavaNext:
    """A stock model for packed rows; the stock model itself does not run any more.

    Args:
        stock: a LLaVA-NeXT, or a LLaVA.
        config: gives the tower's image mean and standard deviation, and the grids of a LLaVA.
        source: for messages.

    Raises:
        ModelError: another model; a tower that is not supported; grids that are no multiples of its tile; a projector
            that is none of ours.
    """
    if isinstance(stock, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration):
        tower_config(stock.config.vision_config)
    if isinstance(stock, LlavaForConditionalGeneration):
        hf = _with_newline(stock, config.grids)
    elif isinstance(stock, LlavaNextForConditionalGeneration):
        hf = stock
        try:
            grids_of_pinpoints(hf.config.image_grid_pinpoints, hf.config.vision_config.image_size)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
    else:
        raise ModelError(f"{source} is a {type(stock).__name__}, no LLaVA and no LLaVA-NeXT")
    if projector_kind(hf.config.to_dict(), source) == "linear":
        for tensor, name in zip(hf.model.multi_modal_projector.linear_2.parameters(), SECOND_LAYER, strict=True):
            check_identity(tensor.detach(), name, source)
        hf.model.multi_modal_projector = hf.model.multi_modal_projector.linear_1
    tower = config.vision_tower
    return LlavaNext(hf, image_mean=tower.image_mean, image_std=tower.image_std)


def _with_newline(stock: LlavaForConditionalGeneration, grids: tuple[Grid, ...]) -> LlavaNextForConditionalGeneration:
    """A LLaVA's parts as those of a LLaVA-NeXT; single views never use its newline, which is zero."""
    old = stock.config
    tile = old.vision_config.image_size
    config = LlavaNextConfig(
        vision_config=old.vision_config,
        text_config=old.text_config,
        image_grid_pinpoints=[[rows * tile, cols * tile] for rows, cols in grids],
        **{key: getattr(old, key) for key in _KEYS_OF_BOTH},
    )
    with torch.device("meta"):
        hf = LlavaNextForConditionalGeneration(config)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(hf.model, part, getattr(stock.model, part))
    hf.lm_head = stock.lm_head
    hf.model.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size, dtype=stock.dtype))
    return hf
