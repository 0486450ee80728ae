"""Directories of whole models in the Hugging Face layout: written for transformers and vLLM, loaded, read back.

Writing streams tensor by tensor; where parameters are partitioned every rank walks the same list and the caller's
`gather` makes them whole. Everything is safetensors. What stands between the stages is `connector.py`'s.

A model that saw AnyRes tiles is written as a LLaVA-NeXT. One that saw single views is written as a LLaVA (1.5), whose
stock processor makes the same view: as a LLaVA-NeXT it would be served tiles that it never saw.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import processors
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
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_next.anyres import grids_of_pinpoints
from llava_next.build import PROJECTOR_ACTS, Backbone, read_tokenizer, refuse_made_up
from llava_next.chat_template import chat_template
from llava_next.config import Grid, ImageMode, ModelConfig, ModelError, ProjectorKind
from llava_next.connector import CONTRACT, MM_PROJECTOR, load_connector, load_mm_projector
from llava_next.conversation import Template
from llava_next.disk import Gather, check_names, complete_or_absent, copy_tensor, whole
from llava_next.model import LlavaNext, live_parameters
from llava_next.names import published_name
from llava_next.processor import Processor

SHARD_BYTES = 4 * 10**9

_SECOND_LAYER = ("multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias")
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
    model: LlavaNext, backbone: Backbone, processor: Processor, target: Path | None, gather: Gather = whole
) -> None:
    """Writes the model as a directory that stock transformers loads.

    Args:
        model: the live model; its weights are written in their own dtype.
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        target: the directory, or None on ranks that only help to gather.
        gather: makes parameters whole while inside it.
    """
    with complete_or_absent(target) as folder:
        _write_shards(_published_tensors(model, backbone, processor.config.image_mode), folder, gather)
        if folder is None:
            return
        config = _stock_config(backbone, processor.config.image_mode)
        config.dtype = model.hf.model.image_newline.dtype
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=backbone.tokenizer.bos_token_id,
            eos_token_id=_stop_ids(backbone, processor.template),
            pad_token_id=backbone.tokenizer.pad_token_id,
        ).save_pretrained(folder)
        _stock_processor(backbone, processor).save_pretrained(folder)


def load_weights(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    """Loads a connector (ours, or the authors' `mm_projector.bin`, as a file or in its folder), or a whole model in the
    Hugging Face layout, into a freshly built model.

    Returns:
        A sentence on what was loaded.

    Raises:
        ModelError: nothing that can be loaded lies there, or it does not fit: the tensor, both shapes, the way out.
    """
    if source.is_file():
        return load_mm_projector(model, backbone, source)
    try:
        if (source / CONTRACT).is_file():
            return load_connector(model, backbone, source)
        if (source / MM_PROJECTOR).is_file():
            _refuse_whole_model_beside(source)
            return load_mm_projector(model, backbone, source / MM_PROJECTOR)
        if (source / "config.json").is_file():
            return _load_hf(model, backbone, source)
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        raise ModelError(
            f"stage.init_from={source} cannot be read, a file in it is damaged or missing: {error}"
        ) from error
    raise ModelError(
        f"stage.init_from={source} holds neither a connector ({CONTRACT} or {MM_PROJECTOR}) nor a model (config.json); "
        "run stage=align first, or start from fresh parts with stage.init_from=null"
    )


def _refuse_whole_model_beside(source: Path) -> None:
    beside = [*source.glob("model*.safetensors"), *source.glob("pytorch_model*.bin")]
    if beside:
        raise ModelError(
            f"stage.init_from={source} holds a connector ({MM_PROJECTOR}) and a whole model ({beside[0].name}); name "
            "the file to start from the connector alone, or take it away to start from the model"
        )


def _load_hf(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    kind, ours = _projector_kind(config, source), backbone.config.projector
    if kind != ours:
        raise ModelError(
            f"the model in {source} has a projector of kind {kind}, this one's is {ours}; choose model.projector={kind}"
        )
    tower_type = backbone.hf_config.vision_config.model_type
    found = {published_name(name, tower_type): parameter for name, parameter in live_parameters(model)}
    said = f"model from {source}"
    if config["model_type"] == LlavaConfig.model_type:
        del found["image_newline"]
        said += " (a LLaVA has no image_newline, which starts fresh)"
    second_layer = _SECOND_LAYER if kind == "linear" else ()
    files = sorted(source.glob("*.safetensors"))
    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    check_names(found | dict.fromkeys(second_layer), names, source)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if name in second_layer:
                    _check_identity(tensor, name, source)
                else:
                    copy_tensor(found[name], tensor, name, source)
    return said


def _projector_kind(config: dict[str, Any], source: Path) -> ProjectorKind:
    act = config.get("projector_hidden_act", "gelu")
    for kind, its_act in PROJECTOR_ACTS.items():
        if act == its_act:
            return kind
    raise ModelError(
        f"{source}: projector_hidden_act={act} is no projector of ours; there are "
        + ", ".join(f"{kind} ({its_act})" for kind, its_act in PROJECTOR_ACTS.items())
    )


def _check_identity(tensor: torch.Tensor, name: str, source: Path) -> None:
    """Raises ModelError unless the second layer of a linear projector does nothing."""
    nothing = torch.eye(len(tensor), dtype=tensor.dtype) if tensor.ndim == 2 else torch.zeros_like(tensor)
    if not torch.equal(tensor, nothing):
        raise ModelError(
            f"{source}: {name} is not the identity, so its projector is two linear layers without an activation, which "
            "is none of ours; multiply them into one"
        )


def _published_tensors(model: LlavaNext, backbone: Backbone, image_mode: ImageMode) -> list[tuple[str, nn.Parameter]]:
    tower_type = backbone.hf_config.vision_config.model_type
    named = [(published_name(name, tower_type), parameter) for name, parameter in live_parameters(model)]
    if backbone.config.projector == "linear":
        newline = model.hf.model.image_newline
        width = backbone.hf_config.text_config.hidden_size
        identity = (torch.eye(width, dtype=newline.dtype), torch.zeros(width, dtype=newline.dtype))
        named += zip(_SECOND_LAYER, map(nn.Parameter, identity), strict=True)
    return [(name, tensor) for name, tensor in named if image_mode == "anyres" or name != "image_newline"]


def _stock_config(backbone: Backbone, image_mode: ImageMode) -> LlavaNextConfig | LlavaConfig:
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


def _write_shards(named: list[tuple[str, nn.Parameter]], folder: Path | None, gather: Gather) -> None:
    shards = list(_shards(named))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, parameter in shard:
            with gather([parameter]):
                if folder is not None:
                    tensors[name] = parameter.detach().cpu().clone().contiguous()
            weight_map[name] = file_name
            total += _num_bytes(parameter)
        if folder is not None:
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    shard: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        if shard and size + _num_bytes(parameter) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, parameter))
        size += _num_bytes(parameter)
    yield shard


def _num_bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _stop_ids(backbone: Backbone, template: Template) -> int | list[int] | None:
    eos = backbone.tokenizer.eos_token_id
    if not template.end:
        return eos
    end = backbone.tokenizer.convert_tokens_to_ids(template.end)
    return end if eos is None or end == eos else [end, eos]


def _stock_processor(backbone: Backbone, processor: Processor) -> LlavaNextProcessor | LlavaProcessor:
    tower, image_mode = backbone.config.vision_tower, processor.config.image_mode
    pixels: dict[str, Any] = {
        "size": {"shortest_edge": backbone.tile},
        "crop_size": {"height": backbone.tile, "width": backbone.tile},
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
    }
    strategy = backbone.hf_config.vision_feature_select_strategy
    words: dict[str, Any] = {
        "tokenizer": _serving_tokenizer(backbone, processor.template),
        "patch_size": backbone.hf_config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
        "chat_template": chat_template(processor.template),
    }
    if image_mode != "anyres":
        return LlavaProcessor(LlavaImageProcessorPil(do_pad=image_mode == "pad", **pixels), **words)
    grids = backbone.hf_config.image_grid_pinpoints
    return LlavaNextProcessor(LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **pixels), **words)


def _serving_tokenizer(backbone: Backbone, template: Template) -> Any:
    """The tokenizer, made to add no token of its own where the template opens without one."""
    if template.bos:
        return backbone.tokenizer
    tokenizer = copy.deepcopy(backbone.tokenizer)
    nothing = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = nothing
    return tokenizer


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
    refuse_made_up(found, str(source))
    if isinstance(stock, LlavaForConditionalGeneration):
        hf, grids = _with_newline(stock, config.grids), config.grids
    elif isinstance(stock, LlavaNextForConditionalGeneration):
        hf = stock
        try:
            grids = grids_of_pinpoints(hf.config.image_grid_pinpoints, hf.config.vision_config.image_size)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
    else:
        raise ModelError(f"{source} is a {type(stock).__name__}, no LLaVA and no LLaVA-NeXT")
    kind = _projector_kind(hf.config.to_dict(), source)
    if kind == "linear":
        for tensor, name in zip(hf.model.multi_modal_projector.linear_2.parameters(), _SECOND_LAYER, strict=True):
            _check_identity(tensor.detach(), name, source)
        hf.model.multi_modal_projector = hf.model.multi_modal_projector.linear_1
    tower = replace(config.vision_tower, feature_layer=hf.config.vision_feature_layer)
    config = replace(config, grids=grids, vision_tower=tower, projector=kind)
    backbone = Backbone(config, hf.config, read_tokenizer(str(source)))
    return backbone, LlavaNext(hf, image_mean=tower.image_mean, image_std=tower.image_std)


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
