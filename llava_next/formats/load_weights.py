"""Loads the weights that `stage.init_from` names into a newly built model.

The source is a connector (this project's or the authors') or a complete model, in the Hugging Face layout
(`llava_next` or `llava`) or the authors' (LLaVA-1.5, LLaVA-NeXT). Names and shapes of all tensors are compared before
the first one is read; a parameter that keeps its initial values is reported.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LlavaConfig, LlavaOnevisionConfig

from llava_next.config import ModelError, ProjectorKind
from llava_next.file_access import permission_problem
from llava_next.formats.connector import CONTRACT, MM_PROJECTOR, read_connector, read_mm_projector
from llava_next.formats.hugging_face import check_identity
from llava_next.formats.tensor_names import (
    EMBEDDING,
    HEAD,
    NEWLINE,
    SECOND_LAYER,
    original_to_published_name,
    published_name,
    to_published_name,
)
from llava_next.formats.tensors import LazyTensor, check_shape, check_tensor_names, copy_tensor, read_folder
from llava_next.inputs.anyres import grids_from_pinpoints
from llava_next.model.build import Backbone, extend_vocab
from llava_next.model.checkpoint_config import (
    ARCHITECTURES,
    HF_MODEL_TYPES,
    is_original,
    original_projector_kind,
    projector_kind,
    read_json,
)
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters


def load_weights(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    """Copies the tensors of `read_weights` into a newly built model. Parameters on the meta device are only compared.

    Returns:
        A description for the log.

    Raises:
        ModelError: as `read_weights` does.
    """
    tensors, description = read_weights(model, backbone, source)
    parameters = dict(live_parameters(model))
    with _read_errors_as_model_errors(source):
        for name, tensor in tensors.items():
            if not parameters[name].is_meta:
                copy_tensor(parameters[name], tensor.value(), name, source)
    return description


def read_weights(model: LlavaNext, backbone: Backbone, source: Path) -> tuple[dict[str, LazyTensor], str]:
    """The tensors of a connector or of a complete model, checked against the model. A model's tensors are not read yet.

    Args:
        model: gives names and shapes of the parameters, which may be on the meta device.
        backbone: its configuration.
        source: a directory, or the file `mm_projector.bin`.

    Returns:
        The tensors by parameter name, in the dtypes of the files, and a description for the log, which lists the
        parameters that keep their initial values.

    Raises:
        ModelError: `source` contains neither a connector nor a model, a file is damaged, or a tensor or a setting does
            not agree with the model.
    """
    with _read_errors_as_model_errors(source):
        if source.is_file():
            return read_mm_projector(model, backbone, source)
        if (source / CONTRACT).is_file():
            return read_connector(model, backbone, source)
        if (source / MM_PROJECTOR).is_file():
            _check_no_model_beside_connector(source)
            return read_mm_projector(model, backbone, source / MM_PROJECTOR)
        if (source / "config.json").is_file():
            return _read_model(model, backbone, source)
    inside = [name for name in ("connector", "export") if (source / name).is_dir()]
    fix = f"name {source / inside[0]}" if inside else "run stage=align first"
    raise ModelError(
        f"stage.init_from={source} contains neither a connector ({CONTRACT} or {MM_PROJECTOR}) nor a model "
        f"(config.json); {fix}, or initialize the parts with stage.init_from=null"
    )


@contextmanager
def _read_errors_as_model_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        denied = permission_problem(source)
        raise ModelError(
            f"stage.init_from: {denied}"
            if denied
            else f"stage.init_from={source} cannot be read, a file in it is damaged or missing: {error}"
        ) from error


def _check_no_model_beside_connector(source: Path) -> None:
    weights = [*source.glob("model*.safetensors"), *source.glob("pytorch_model*.bin")]
    if weights:
        raise ModelError(
            f"stage.init_from={source} contains a connector ({MM_PROJECTOR}) and a model ({weights[0].name}); give the "
            "path of the file to load the connector, or remove it to load the model"
        )


def _read_model(model: LlavaNext, backbone: Backbone, source: Path) -> tuple[dict[str, LazyTensor], str]:
    config = read_json(source / "config.json")
    if is_original(config):
        kind, title = original_projector_kind(config, source), f"model from {source} in the authors' layout"
        tensors = {original_to_published_name(name, kind): tensor for name, tensor in read_folder(source).items()}
    elif config.get("model_type") in HF_MODEL_TYPES:
        kind, title = projector_kind(config, source), f"model from {source}"
        tower_type = backbone.hf_config.vision_config.model_type
        tensors = {to_published_name(name, tower_type): tensor for name, tensor in read_folder(source).items()}
    else:
        raise ModelError(
            f"{source} has model_type {config.get('model_type')} ({', '.join(config.get('architectures') or [])}), "
            f"which is not a LLaVA: supported are {', '.join(HF_MODEL_TYPES)}, and the authors' "
            f"{', '.join(ARCHITECTURES.values())}; set model.language_model.path for a language model without a tower"
        )
    _check_config(config, kind, backbone, source)
    tower_type = backbone.hf_config.vision_config.model_type
    parameter_names = {published_name(name, tower_type): name for name, _ in live_parameters(model)}
    parameters = {published_name(name, tower_type): parameter for name, parameter in live_parameters(model)}
    notes: list[str] = []
    if kind == "linear" and not is_original(config):
        for name in SECOND_LAYER:
            if name in tensors:
                check_identity(tensors.pop(name).value(), name, source)
    _drop_tied_head(parameters, tensors, source)
    if is_original(config):
        notes += _keep_tower(parameters, tensors, backbone, source)
        notes += _extend_vocabulary(parameters, tensors)
    if NEWLINE not in tensors and _is_single_view(config):
        del parameters[NEWLINE]
        notes.append("a LLaVA has no image_newline, which is newly initialized")
    check_tensor_names(parameters, set(tensors), source)
    for name, parameter in parameters.items():  # all shapes are checked before a weight is read
        check_shape(parameter, tensors[name], name, source)
        if not tensors[name].dtype.is_floating_point:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ModelError(f"{source}: {name} has dtype {dtype}; use a directory that is not quantized")
    weights = {parameter_names[name]: tensors[name].renamed(parameter_names[name]) for name in parameters}
    return weights, title + (f" ({'; '.join(notes)})" if notes else "")


def _is_single_view(config: dict[str, Any]) -> bool:
    if is_original(config):
        return "unpad" not in config.get("mm_patch_merge_type", "flat")
    return bool(config["model_type"] == LlavaConfig.model_type)


def _check_config(config: dict[str, Any], kind: ProjectorKind, backbone: Backbone, source: Path) -> None:
    """Checks the settings that shapes do not show: kind of projector, feature layer, grids, image token."""
    if kind != backbone.config.projector:
        raise ModelError(
            f"the model in {source} has a projector of kind {kind}, this model's is {backbone.config.projector}; set "
            f"model.projector={kind}"
        )
    default = -1 if config["model_type"] == LlavaOnevisionConfig.model_type else -2
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", default))
    depth = backbone.hf_config.vision_config.num_hidden_layers
    own_depth = config.get("vision_config", {}).get("num_hidden_layers", depth)
    configured = backbone.config.vision_tower.feature_layer
    if not isinstance(layer, int) or layer % (own_depth + 1) != configured % (depth + 1):
        raise ModelError(
            f"the model in {source} was trained on the tower's layer {layer}, but model.vision_tower.feature_layer is "
            f"{configured}; set model.vision_tower.feature_layer={layer}"
        )
    strategy = backbone.hf_config.vision_feature_select_strategy
    if config.get("vision_feature_select_strategy", strategy) != strategy or (
        config.get("mm_vision_select_feature") == "cls_patch" and strategy == "default"
    ):
        raise ModelError(
            f"the model in {source} uses other tokens of its tower than the patches (this model's strategy is "
            f"{strategy}): class tokens as image tokens are not supported"
        )
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, list) and pinpoints:
        tile = config.get("vision_config", {}).get("image_size", backbone.tile)
        try:
            grids_from_pinpoints(pinpoints, tile)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
    token, expected = (
        config.get("image_token_index", config.get("image_token_id")),
        backbone.hf_config.image_token_index,
    )
    if not is_original(config) and token is not None and token != expected:
        raise ModelError(
            f"the model in {source} has image token {token}, but this tokenizer's is {expected}; set "
            f"model.language_model.tokenizer={source}"
        )


def _drop_tied_head(parameters: dict[str, nn.Parameter], tensors: dict[str, LazyTensor], source: Path) -> None:
    """Removes the head from `tensors` if the file contains a tied head in addition to the embedding."""
    if HEAD in tensors and HEAD not in parameters and EMBEDDING in tensors:
        if not torch.equal(tensors[HEAD].value(), tensors[EMBEDDING].value()):
            raise ModelError(
                f"{source} has a head ({HEAD}) that differs from its embedding, but this model ties the two; set "
                "+model.language_model.overrides.tie_word_embeddings=false"
            )
        del tensors[HEAD]


def _keep_tower(
    parameters: dict[str, nn.Parameter], tensors: dict[str, LazyTensor], backbone: Backbone, source: Path
) -> list[str]:
    """Keeps the model's tower if the directory has none: LLaVA-1.5 froze its tower and does not contain it."""
    if any(name.startswith("vision_tower.") for name in tensors):
        return []
    tower = backbone.config.vision_tower
    if tower.weights != "pretrained":
        published = read_json(source / "config.json").get("mm_vision_tower")
        raise ModelError(
            f"{source} does not contain a vision tower and model.vision_tower.weights={tower.weights} loads none; use "
            f"the pretrained tower that it was trained with ({published})"
        )
    for name in [name for name in parameters if name.startswith("vision_tower.")]:
        del parameters[name]
    return [f"it contains no vision tower, {tower.path} is used"]


def _extend_vocabulary(parameters: dict[str, nn.Parameter], tensors: dict[str, LazyTensor]) -> list[str]:
    """Extends the authors' tables, which end with their tokenizer's vocabulary, as `build.py` does."""
    notes = []
    for name in (EMBEDDING, HEAD):
        if name not in parameters or name not in tensors or len(tensors[name].shape) != 2:
            continue
        old, new = tensors[name].shape[0], parameters[name].shape[0]
        if old < new and tensors[name].shape[1:] == parameters[name].shape[1:]:
            extend = _vocabulary_extension(new)
            tensors[name] = tensors[name].mapped(extend, tuple(parameters[name].shape), tensors[name].dtype)
            notes = [f"rows {old} to {new - 1} of the vocabulary are initialized with the mean of the others"]
    return notes


def _vocabulary_extension(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda table: extend_vocab(table.float(), size).to(table.dtype)  # a sum of fp16 rows can overflow
