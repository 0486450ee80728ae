"""Reads and writes complete models in the Hugging Face layout, for transformers and vLLM.

Weights are written one tensor at a time, from a model in memory or from files. A model is written as the stock class
whose processor makes the views of its training: LLaVA-NeXT, LLaVA (1.5) or LLaVA-OneVision (`stock_class`).
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
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_next.config import ANYRES, Grid, ImageMode, ModelConfig, ModelError, ViewsConfig, stock_class
from llava_next.file_access import permission_problem
from llava_next.formats.atomic import atomic_directory
from llava_next.formats.merge_adapters import merge_adapters
from llava_next.formats.onevision import ImagesOnlyProcessor, onevision_processor, save_onevision_processor
from llava_next.formats.tensor_names import NEWLINE, SECOND_LAYER, published_name
from llava_next.formats.tensors import Gather, LazyTensor, from_tensor, no_gather, write_shards
from llava_next.inputs.anyres import grids_from_pinpoints
from llava_next.inputs.chat_template import chat_template, is_bos_added, set_post_processor, word_separator
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER, Template
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, read_tokenizer, require_all_weights_loaded
from llava_next.model.checkpoint_config import projector_kind
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from llava_next.model.towers import prepare_tower_config

_SHARED_KEYS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "tie_word_embeddings",
    "pad_token_id",
)
"""Keys that the configs of the three classes share, besides the configs of the two parts."""


def write_hf(
    model: LlavaNext,
    backbone: Backbone,
    processor: Processor,
    target: Path | None,
    gather: Gather = no_gather,
    *,
    attachments: Sequence[Path] = (),
) -> None:
    """Writes the model as a directory that stock transformers loads.

    Args:
        model: its weights are written in their dtype.
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        target: the directory; None on ranks that only take part in gathering.
        gather: completes partitioned parameters.
        attachments: files that are copied into the directory.

    Raises:
        ModelError: no stock class makes the processor's views.
    """
    keep = target is not None
    tensors = published_tensors(model, backbone, processor.config.views, gather, keep=keep)
    with atomic_directory(target, attachments) as folder:
        write_hf_folder(tensors, backbone, processor, folder)


def write_hf_folder(
    tensors: Sequence[LazyTensor],
    backbone: Backbone,
    processor: Processor,
    folder: Path | None,
    shard_bytes: int | None = None,
) -> None:
    """Writes a model into an existing directory: weights, configs, tokenizer and processor.

    Args:
        tensors: from `to_stock_tensors`, all of one dtype.
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        folder: an empty directory; None on ranks that only take part in gathering.
        shard_bytes: see `write_shards`.
    """
    write_shards(tensors, folder, shard_bytes)
    if folder is None:
        return
    config = stock_config(backbone, processor.config.views)
    for part_config in (config, config.text_config, config.vision_config):
        part_config.dtype = tensors[0].dtype
    config.save_pretrained(folder)
    generation_config(backbone, processor.template).save_pretrained(folder)
    save_processor(backbone, processor, folder)


def generation_config(backbone: Backbone, template: Template) -> GenerationConfig:
    """The generation config of an export: greedy decoding, with the template's end token as a stop token."""
    return GenerationConfig(
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=_stop_ids(backbone, template),
        pad_token_id=backbone.tokenizer.pad_token_id,
    )


def check_identity(tensor: torch.Tensor, name: str, source: Path) -> None:
    """Raises ModelError unless a tensor of a linear projector's second layer is the identity weight or zero bias."""
    identity = torch.eye(len(tensor), dtype=tensor.dtype) if tensor.ndim == 2 else torch.zeros_like(tensor)
    if not torch.equal(tensor, identity):
        raise ModelError(
            f"{source}: {name} is not the identity: the projector is two linear layers without an activation, which is "
            "not supported; multiply them into one layer"
        )


def published_tensors(
    model: LlavaNext, backbone: Backbone, views: ViewsConfig, gather: Gather = no_gather, *, keep: bool = True
) -> list[LazyTensor]:
    """The tensors of a model under their published names, as `to_stock_tensors` returns them.

    Args:
        model: the model in memory.
        backbone: its configuration.
        views: of the training; they determine the stock class.
        gather: completes partitioned parameters.
        keep: whether this rank keeps the tensors that it gathers.
    """
    tensors = [lazy_parameter(name, parameter, gather, keep=keep) for name, parameter in live_parameters(model)]
    return to_stock_tensors(tensors, model, backbone, views)


def to_stock_tensors(
    tensors: Iterable[LazyTensor], model: LlavaNext, backbone: Backbone, views: ViewsConfig
) -> list[LazyTensor]:
    """Converts the tensors of a model to those of the stock model of its views.

    Adapters are merged, a linear projector gets its identity second layer, and `image_newline` is omitted for a LLaVA.

    Args:
        tensors: all of `live_parameters(model)`, by parameter name.
        model: gives the adapters.
        backbone: its configuration.
        views: of the training; they determine the stock class.

    Returns:
        The tensors under their published names.
    """
    tower_type = backbone.hf_config.vision_config.model_type
    named = [tensor.renamed(published_name(tensor.name, tower_type)) for tensor in merge_adapters(model, tensors)]
    if backbone.config.projector == "linear":
        dtype = next(tensor.dtype for tensor in named if tensor.name == NEWLINE)
        width = backbone.hf_config.text_config.hidden_size
        identity = (torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype))
        named += [from_tensor(name, tensor) for name, tensor in zip(SECOND_LAYER, identity, strict=True)]
    return [tensor for tensor in named if stock_class(views) != "llava" or tensor.name != NEWLINE]


def lazy_parameter(name: str, parameter: nn.Parameter, gather: Gather = no_gather, *, keep: bool = True) -> LazyTensor:
    """A parameter as a `LazyTensor`. Where it is partitioned (ZeRO-3), `read` is collective.

    Args:
        name: of the tensor.
        parameter: of any device; it is copied to the host.
        gather: completes partitioned parameters.
        keep: whether `read` returns the tensor on this rank.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))

    def read() -> torch.Tensor | None:
        with gather([parameter]):
            return parameter.detach().cpu().clone() if keep else None

    return LazyTensor(name, shape, parameter.dtype, read)


def stock_config(backbone: Backbone, views: ViewsConfig) -> LlavaNextConfig | LlavaConfig | LlavaOnevisionConfig:
    """The config of the stock model whose processor makes the views."""
    config, kind = backbone.hf_config, stock_class(views)
    if kind == "llava_next":
        config.architectures = ["LlavaNextForConditionalGeneration"]
        return config
    config = copy.deepcopy(config)  # the others reset the attention implementation of the configs passed to them
    shared = {"vision_config": config.vision_config, "text_config": config.text_config}
    shared |= {key: getattr(config, key) for key in _SHARED_KEYS}
    stock: LlavaConfig | LlavaOnevisionConfig
    if kind == "llava":
        stock = LlavaConfig(image_seq_length=config.image_seq_length, **shared)
        stock.architectures = ["LlavaForConditionalGeneration"]
        return stock
    stock = LlavaOnevisionConfig(
        image_grid_pinpoints=config.image_grid_pinpoints,
        vision_aspect_ratio=views.single,
        video_token_index=_video_token_id(backbone),
        **shared,
    )
    stock.architectures = ["LlavaOnevisionForConditionalGeneration"]
    return stock


def _video_token_id(backbone: Backbone) -> int:
    """The tokenizer's id of the stock placeholder of a video; -1, which no text has, if it has none."""
    return int(backbone.tokenizer.get_vocab().get("<video>", -1))


def _stop_ids(backbone: Backbone, template: Template) -> int | list[int] | None:
    eos = backbone.tokenizer.eos_token_id
    if not template.end:
        return eos
    end = backbone.tokenizer.convert_tokens_to_ids(template.end)
    return end if eos is None or end == eos else [end, eos]


def stock_processor(
    backbone: Backbone, processor: Processor
) -> LlavaNextProcessor | LlavaProcessor | ImagesOnlyProcessor:
    """The stock processor that makes the same views and renders the same prompt."""
    tower, kind = backbone.config.vision_tower, stock_class(processor.config.views)
    square = {"height": backbone.tile, "width": backbone.tile}
    pixels: dict[str, Any] = {"image_mean": list(tower.image_mean), "image_std": list(tower.image_std)}
    grids = backbone.hf_config.image_grid_pinpoints
    strategy = backbone.hf_config.vision_feature_select_strategy
    tokenizer = serving_tokenizer(backbone, processor.template)
    text_options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vision_feature_select_strategy": strategy,
        "chat_template": chat_template(processor.template, separator=word_separator(tokenizer)),
    }
    num_prefix_tokens = 1 if strategy == "default" else 0
    if kind == "llava_onevision":
        return onevision_processor(
            {"size": square, "image_grid_pinpoints": grids, **pixels},
            num_image_tokens=processor.config.patches_per_side**2 + num_prefix_tokens,
            vision_aspect_ratio=processor.config.views.single,
            **text_options,
        )
    text_options |= {
        "patch_size": backbone.hf_config.vision_config.patch_size,
        "num_additional_image_tokens": num_prefix_tokens,
    }
    mode = processor.config.views.rules[0].mode
    if mode == "squash":  # resized without keeping the aspect ratio, as SigLIP's processor does
        pixels |= {"size": square, "crop_size": square, "do_center_crop": False}
    else:
        pixels |= {"size": {"shortest_edge": backbone.tile}, "crop_size": square}
    if kind == "llava":
        return LlavaProcessor(LlavaImageProcessorPil(do_pad=mode == "pad", **pixels), **text_options)
    return LlavaNextProcessor(LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **pixels), **text_options)


def stock_views(config: Any, images: Any, source: Path) -> ViewsConfig:
    """The views that a stock model's processor makes; the inverse of `stock_processor`.

    Args:
        config: of the model, a LLaVA-NeXT, a LLaVA or a LLaVA-OneVision.
        images: the image processor; for a LLaVA, one of LLaVA's, CLIP's or SigLIP's.
        source: the directory, for messages.

    Raises:
        ModelError: the view of a LLaVA is not square, or it is a crop of an image that was resized to a square.
    """
    if config.model_type == "llava_next":
        return ANYRES
    if config.model_type == "llava_onevision":
        return ViewsConfig(config.vision_aspect_ratio, "pad", closing_newline=True)
    mode = _single_view(images, source)
    return ViewsConfig(mode, mode)


def _single_view(images: Any, source: Path) -> ImageMode:
    if getattr(images, "do_pad", False):
        return "pad"
    height, width = images.size.get("height"), images.size.get("width")
    if height is None or width is None:  # the short side is resized, then the center is cropped
        return "crop"
    cropped = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    if height != width or (cropped["height"], cropped["width"]) != (height, width):
        raise ModelError(
            f"{source}: its image processor resizes to {height} x {width} and crops to {cropped['height']} x "
            f"{cropped['width']} (height x width), which is not an image mode; set size and crop_size to one square"
        )
    return "squash"


def save_processor(backbone: Backbone, processor: Processor, folder: Path) -> None:
    """Writes the stock processor in the format of `AutoProcessor`."""
    stock = stock_processor(backbone, processor)
    if isinstance(stock, ImagesOnlyProcessor):
        save_onevision_processor(stock, folder)
    else:
        stock.save_pretrained(folder)
    write_tokenizer_settings(folder, stock.tokenizer)


def serving_tokenizer(backbone: Backbone, template: Template, *, add_bos: bool = False) -> Any:
    """The tokenizer of an export.

    It pads on the left for batched generation. Its end-of-sequence token is the template's end token, as in published
    checkpoints, because some programs (such as lmms-eval) stop at that token only.

    Args:
        backbone: gives the tokenizer, which is copied.
        template: gives the end token and whether a sample begins with the beginning-of-sequence token.
        add_bos: add the beginning-of-sequence token of such a template. Otherwise the tokenizer adds no special token,
            and the chat template writes it (see `chat_template.py`).
    """
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.padding_side = "left"
    if template.end:
        tokenizer.eos_token = template.end
    set_post_processor(tokenizer, add_bos=add_bos and template.bos)
    return tokenizer


def write_tokenizer_settings(folder: Path, tokenizer: Any) -> None:
    """Adds settings to tokenizer_config.json that transformers 5 does not save.

    These are the padding side; `legacy`, which determines where the Llama tokenizer marks the beginning of words; and
    `add_bos_token`, without which the Llama tokenizer of older versions adds the token.

    Args:
        folder: to which `tokenizer` was saved.
        tokenizer: the saved tokenizer.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"padding_side": "left", "add_bos_token": is_bos_added(tokenizer), "add_eos_token": False}
    if hasattr(tokenizer, "legacy"):
        settings["legacy"] = bool(tokenizer.legacy)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_hf(source: Path, config: ModelConfig) -> tuple[Backbone, LlavaNext]:
    """Loads a directory written by `write_hf` with stock transformers and wraps the model for packed rows.

    Args:
        source: the directory, which gives config, tokenizer and grids.
        config: gives the parts' names and the tower's image mean and standard deviation.

    Raises:
        ModelError: transformers cannot load the directory, a tensor would be initialized at random, the grids are not
            multiples of the tile, or the tokenizer has another image token than config.json.
    """
    try:
        stock, loading_info = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(permission_problem(source) or f"transformers cannot load {source}: {error}") from error
    require_all_weights_loaded(loading_info, str(source))
    model = wrap_stock_model(stock, config, source)
    tower = replace(config.vision_tower, feature_layer=model.hf.config.vision_feature_layer)
    grids = config.grids
    if isinstance(stock, LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration):
        grids = grids_from_pinpoints(stock.config.image_grid_pinpoints, stock.config.vision_config.image_size)
    kind = projector_kind(model.hf.config.to_dict(), source)
    config = replace(config, grids=grids, vision_tower=tower, projector=kind)
    tokenizer = read_tokenizer(str(source))
    token = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if token != model.hf.config.image_token_index:
        raise ModelError(
            f"{source}: the tokenizer's id of {IMAGE_PLACEHOLDER} is {token}, but config.json has image_token_index="
            f"{model.hf.config.image_token_index}; add the tokenizer that the model was published with"
        )
    return Backbone(config, model.hf.config, tokenizer), model


def wrap_stock_model(stock: PreTrainedModel, config: ModelConfig, source: Path) -> LlavaNext:
    """Wraps a stock model for packed rows. `stock` is modified and must not be run afterwards.

    Args:
        stock: a LLaVA-NeXT, a LLaVA or a LLaVA-OneVision.
        config: gives the tower's image mean and standard deviation, and the grids of a LLaVA.
        source: for messages.

    Raises:
        ModelError: the model is none of them, the tower or the projector is not supported, or the grids are not
            multiples of the tile.
    """
    if not isinstance(stock, _SUPPORTED):
        raise ModelError(
            f"{source} is a {type(stock).__name__}; only LLaVA, LLaVA-NeXT and LLaVA-OneVision are supported"
        )
    prepare_tower_config(stock.config.vision_config)
    if not isinstance(stock, LlavaForConditionalGeneration):
        try:
            grids_from_pinpoints(stock.config.image_grid_pinpoints, stock.config.vision_config.image_size)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
    hf = stock if isinstance(stock, LlavaNextForConditionalGeneration) else _as_llava_next(stock, config.grids)
    if projector_kind(hf.config.to_dict(), source) == "linear":
        for tensor, name in zip(hf.model.multi_modal_projector.linear_2.parameters(), SECOND_LAYER, strict=True):
            check_identity(tensor.detach(), name, source)
        hf.model.multi_modal_projector = hf.model.multi_modal_projector.linear_1
    tower = config.vision_tower
    return LlavaNext(hf, image_mean=tower.image_mean, image_std=tower.image_std)


_SUPPORTED = (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)


def _as_llava_next(
    stock: LlavaForConditionalGeneration | LlavaOnevisionForConditionalGeneration, grids: tuple[Grid, ...]
) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with the parts of another class.

    Args:
        stock: a LLaVA gets a newline vector of zeros, which its single views do not use.
        grids: for a LLaVA.
    """
    old = stock.config
    tile = old.vision_config.image_size
    newline = getattr(stock.model, "image_newline", None)
    config = LlavaNextConfig(
        vision_config=old.vision_config,
        text_config=old.text_config,
        image_grid_pinpoints=getattr(old, "image_grid_pinpoints", None)
        or [[rows * tile, cols * tile] for rows, cols in grids],
        **{key: getattr(old, key) for key in _SHARED_KEYS},
    )
    if hasattr(old, "image_seq_length"):
        config.image_seq_length = old.image_seq_length
    with torch.device("meta"):
        hf = LlavaNextForConditionalGeneration(config)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(hf.model, part, getattr(stock.model, part))
    hf.lm_head = stock.lm_head
    if newline is None:
        newline = nn.Parameter(torch.zeros(config.text_config.hidden_size, dtype=stock.dtype))
    hf.model.image_newline = newline
    return hf
