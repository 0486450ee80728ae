"""Directories on disk: a whole model in the Hugging Face layout, and the connector between the stages.

Writing streams tensor by tensor; where parameters are partitioned every rank walks the same list and the caller's
`gather` makes them whole. Everything is safetensors. A directory is complete or absent.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import processors
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_next.build import Backbone, read_tokenizer, refuse_made_up
from llava_next.config import ModelConfig, ModelError
from llava_next.conversation import Template
from llava_next.model import LlavaNext
from llava_next.names import published_name
from llava_next.processor import Processor

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]

SHARD_BYTES = 4 * 10**9
_CONTRACT = "contract.json"
_CONNECTOR_PREFIXES = ("hf.model.multi_modal_projector.", "hf.model.image_newline")


def _whole(_: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


def write_hf(
    model: LlavaNext, backbone: Backbone, processor: Processor, target: Path | None, gather: Gather = _whole
) -> None:
    """Writes the model as a directory that stock transformers loads.

    Args:
        model: the live model; its weights are written in their own dtype.
        backbone: config and tokenizer.
        processor: its template becomes the chat template.
        target: the directory, or None on ranks that only help to gather.
        gather: makes parameters whole while inside it.
    """
    partial = _start(target)
    tower_type = backbone.hf_config.vision_config.model_type
    named = [(published_name(name, tower_type), parameter) for name, parameter in live_parameters(model)]
    _write_shards(named, partial, gather)
    if partial is None or target is None:
        return
    config = backbone.hf_config
    config.architectures = ["LlavaNextForConditionalGeneration"]
    config.dtype = model.hf.model.image_newline.dtype
    config.save_pretrained(partial)
    GenerationConfig(
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=_stop_ids(backbone, processor.template),
        pad_token_id=backbone.tokenizer.pad_token_id,
    ).save_pretrained(partial)
    _stock_processor(backbone, processor).save_pretrained(partial)
    _finish(partial, target)


def write_connector(model: LlavaNext, backbone: Backbone, target: Path | None, gather: Gather = _whole) -> None:
    """Writes the projector and the newline vector with the contract that the next stage checks.

    Args are those of `write_hf`.
    """
    partial = _start(target)
    named = [
        (name.removeprefix("hf.model."), parameter)
        for name, parameter in live_parameters(model)
        if name.startswith(_CONNECTOR_PREFIXES)
    ]
    tensors = {}
    for name, parameter in named:
        with gather([parameter]):
            if partial is not None:
                tensors[name] = parameter.detach().cpu().clone().contiguous()
    if partial is None or target is None:
        return
    save_file(tensors, partial / "connector.safetensors", metadata={"format": "pt"})
    contract = {
        **_identity(backbone),
        "image_newline_trained": bool(model.hf.model.image_newline.requires_grad),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": _sha256(tensor),
            }
            for name, tensor in tensors.items()
        },
    }
    (partial / _CONTRACT).write_text(json.dumps(contract, indent=1) + "\n")
    _finish(partial, target)


def load_weights(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    """Loads a connector, or a whole model in the Hugging Face layout, into a freshly built model.

    Returns:
        A sentence on what was loaded.

    Raises:
        ModelError: nothing that can be loaded lies there, or it does not fit: the tensor, both shapes, the way out.
    """
    try:
        if (source / _CONTRACT).is_file():
            return _load_connector(model, backbone, source)
        if (source / "config.json").is_file():
            return _load_hf(model, backbone, source)
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        raise ModelError(
            f"stage.init_from={source} cannot be read, a file in it is damaged or missing: {error}"
        ) from error
    raise ModelError(
        f"stage.init_from={source} holds neither a connector ({_CONTRACT}) nor a model (config.json); run stage=align "
        "first, or start from fresh parts with stage.init_from=null"
    )


def live_parameters(model: LlavaNext) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its live name, the tower's upper layers included (they are kept aside, see `model.py`).

    A head that shares the embedding's tensor is left out, as published checkpoints leave it out.
    """
    tied = model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (tied and name.startswith("hf.lm_head.")):
            yield name, parameter
    for index, layer in enumerate(model.upper_tower_layers, start=model.num_tower_layers):
        for name, parameter in layer.named_parameters():
            yield f"{model.tower_layers_name}.{index}.{name}", parameter


def _load_connector(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    contract = json.loads((source / _CONTRACT).read_text())
    for key, ours in _identity(backbone).items():
        if contract[key] != ours:
            raise ModelError(
                f"the connector in {source} was trained for {key}={contract[key]}, this model has {ours}; train one "
                "with stage=align, or start from fresh parts with stage.init_from=null"
            )
    found = {
        name.removeprefix("hf.model."): parameter
        for name, parameter in live_parameters(model)
        if name.startswith(_CONNECTOR_PREFIXES)
    }
    with safe_open(source / "connector.safetensors", framework="pt") as file:
        _check_names(found, set(file.keys()), source)
        for name, parameter in found.items():
            tensor = file.get_tensor(name)
            if _sha256(tensor) != contract["tensors"][name]["sha256"]:
                raise ModelError(f"{source}: the bytes of {name} are not the ones in {_CONTRACT}; the file is damaged")
            _copy(parameter, tensor, name, source)
    newline = "trained" if contract["image_newline_trained"] else "not trained"
    return f"connector from {source} (image_newline {newline})"


def _load_hf(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    tower_type = backbone.hf_config.vision_config.model_type
    found = {published_name(name, tower_type): parameter for name, parameter in live_parameters(model)}
    files = sorted(source.glob("*.safetensors"))
    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    _check_names(found, names, source)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                _copy(found[name], file.get_tensor(name), name, source)
    return f"model from {source}"


def _check_names(ours: dict[str, nn.Parameter], theirs: set[str], source: Path) -> None:
    missing, extra = sorted(set(ours) - theirs), sorted(theirs - set(ours))
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} tensor(s) that this model has, the first is {missing[0]}")
    if extra:
        raise ModelError(f"{source} has {len(extra)} tensor(s) that this model lacks, the first is {extra[0]}")


def _copy(parameter: nn.Parameter, tensor: torch.Tensor, name: str, source: Path) -> None:
    if parameter.shape != tensor.shape:
        raise ModelError(
            f"{source}: {name} has shape {list(tensor.shape)}, this model needs {list(parameter.shape)}; choose the "
            "language model and vision tower it was made with"
        )
    with torch.no_grad():
        parameter.copy_(tensor)


def _identity(backbone: Backbone) -> dict[str, Any]:
    """What a connector depends on: the tower's features and the language model's embedding space."""
    vision, text = backbone.hf_config.vision_config, backbone.hf_config.text_config
    return {
        "language_model": backbone.config.language_model.name,
        "vision_tower": backbone.config.vision_tower.name,
        "feature_layer": backbone.config.vision_tower.feature_layer,
        "vision_width": vision.hidden_size,
        "language_width": text.hidden_size,
        "projector": "mlp2x_gelu",
    }


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


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


def _stock_processor(backbone: Backbone, processor: Processor) -> LlavaNextProcessor:
    tower, vision = backbone.config.vision_tower, backbone.hf_config.vision_config
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": backbone.tile},
        crop_size={"height": backbone.tile, "width": backbone.tile},
        image_grid_pinpoints=backbone.hf_config.image_grid_pinpoints,
        image_mean=list(tower.image_mean),
        image_std=list(tower.image_std),
    )
    strategy = backbone.hf_config.vision_feature_select_strategy
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=_serving_tokenizer(backbone, processor.template),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if strategy == "default" else 0,
        chat_template=chat_template(processor.template),
    )


def _serving_tokenizer(backbone: Backbone, template: Template) -> Any:
    """The tokenizer, made to add no token of its own where the template opens without one."""
    if template.bos:
        return backbone.tokenizer
    tokenizer = copy.deepcopy(backbone.tokenizer)
    nothing = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = nothing
    return tokenizer


def chat_template(template: Template) -> str:
    """The template as Jinja, over messages whose content is a string or a list of text and image items.

    Pictures of a turn come first, as `place_image` puts them.
    """
    system, question = template.system_format.split("{text}"), template.question_format.split("{text}")
    answer = template.answer_format.split("{text}")
    literal = json.dumps
    default = "" if template.default_system is None else template.system_format.format(text=template.default_system)
    return "".join(
        [
            # Whoever tokenizes the rendered text adds the token itself only where it is not there yet, or never.
            "{{ bos_token }}" if template.bos else "",
            "{%- macro text_of(content) -%}{%- if content is string -%}{{ content }}{%- else -%}",
            "{%- for item in content if item.type == 'image' -%}{{ '<image>' }}{{ '\\n' }}{%- endfor -%}",
            "{%- for item in content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}{%- endif -%}",
            "{%- endmacro -%}",
            "{%- if messages and messages[0].role != 'system' -%}{{ ", literal(default), " }}{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- if message.role == 'system' -%}{{ ", literal(system[0]), " + text_of(message.content) + ",
            literal(system[-1]), " }}",
            "{%- elif message.role == 'user' -%}{{ ", literal(question[0]), " + text_of(message.content) + ",
            literal(question[-1]), " }}",
            "{%- else -%}{{ ", literal(template.header + answer[0]), " + text_of(message.content) + ",
            literal(answer[-1] + template.end + template.between), " }}{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{ ", literal(template.header), " }}{%- endif -%}",
        ]
    )  # fmt: skip


def read_hf(source: Path, config: ModelConfig) -> tuple[Backbone, LlavaNext]:
    """A directory that `write_hf` made, loaded by stock transformers and wrapped for packed rows.

    Args:
        source: the directory; its own config, tokenizer and grids are used.
        config: names the parts and gives the tower's image mean and standard deviation.

    Raises:
        ModelError: transformers does not read it, or would make up a tensor.
    """
    try:
        hf, found = LlavaNextForConditionalGeneration.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source} is no model that transformers reads: {error}") from error
    refuse_made_up(found, str(source))
    tile = hf.config.vision_config.image_size
    grids = tuple((height // tile, width // tile) for height, width in hf.config.image_grid_pinpoints)
    tower = replace(config.vision_tower, feature_layer=hf.config.vision_feature_layer)
    backbone = Backbone(replace(config, grids=grids, vision_tower=tower), hf.config, read_tokenizer(str(source)))
    return backbone, LlavaNext(hf, image_mean=tower.image_mean, image_std=tower.image_std)


def _start(target: Path | None) -> Path | None:
    if target is None:
        return None
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
