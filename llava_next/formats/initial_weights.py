"""Reads the weights that a stage starts with one tensor at a time, without building the model.

A part is built in memory only if no file contains its weights in the required form.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from llava_next.config import PARTS, LanguageModelConfig, ModelError, VisionTowerConfig
from llava_next.formats.hugging_face import lazy_parameter
from llava_next.formats.load_weights import read_weights
from llava_next.formats.tensor_names import EMBEDDING, HEAD, published_name, to_published_name
from llava_next.formats.tensors import LazyTensor, read_folder
from llava_next.model.build import Backbone, build_model, extend_vocab, resample_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters, part_of

_PREFIXES = {"vision_tower": "vision_tower.", "language_model": "language_model."}
"""Prefix of a published name before the name in the part's directory."""


def read_initial_weights(
    model: LlavaNext, backbone: Backbone, *, parts: Collection[str], seed: int, init_from: Path | None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The initial weights of the given parts: those of `build_model`, followed by `load_weights`.

    Args:
        model: gives names, shapes and dtype of the parameters, which may be on the meta device; without adapters.
        backbone: its configuration.
        parts: whose weights are required; the result can contain tensors of other parts.
        seed: the seed of `build_model`.
        init_from: the source of `load_weights`; None if the run has none.

    Returns:
        The tensors by parameter name, in the model's dtype, and a message for each tower or language model that had to
        be built in memory.

    Raises:
        ModelError: as `build_model` and `load_weights` do.
    """
    parameters = dict(live_parameters(model))
    dtype = next(iter(parameters.values())).dtype
    weights: dict[str, LazyTensor] = {}
    if init_from is not None:
        tensors, _ = read_weights(model, backbone, init_from)
        weights = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    pretrained = _pretrained_parts(backbone)
    for part, config in pretrained.items():
        lacking = {name: parameters[name] for name in parameters if part_of(name) == part and name not in weights}
        if part in parts and lacking and config.weights == "pretrained":
            weights |= _read_part(part, Path(config.path), lacking, backbone.hf_config.vision_config.model_type)
    missing = {part_of(name) for name in parameters.keys() - weights.keys()} & set(parts)
    if missing:
        weights = _build_parts(missing, backbone, dtype, seed) | weights
    return weights, [
        f"the {part} is built in memory: "
        + (
            f"{config.path} stores its tensors in another form"
            if config.weights == "pretrained"
            else "no file contains its weights"
        )
        for part, config in pretrained.items()
        if part in missing
    ]


def _pretrained_parts(backbone: Backbone) -> dict[str, LanguageModelConfig | VisionTowerConfig]:
    """The configurations of the parts that can have a directory of their own."""
    return {"vision_tower": backbone.config.vision_tower, "language_model": backbone.config.language_model}


def _build_parts(parts: set[str], backbone: Backbone, dtype: torch.dtype, seed: int) -> dict[str, LazyTensor]:
    """The parts' weights from `build_model`, by parameter name."""
    built_parts = set(parts)
    if parts & {"projector", "image_newline"}:
        built_parts |= {"projector", "image_newline"}  # the newline is drawn after the projector
    if any(part in parts and config.weights == "random" for part, config in _pretrained_parts(backbone).items()):
        built_parts = set(PARTS)  # random parts are drawn one after another
    model = build_model(backbone, dtype=dtype, seed=seed, parts=built_parts)
    return {
        name: lazy_parameter(name, parameter) for name, parameter in live_parameters(model) if part_of(name) in parts
    }


def _read_part(
    part: str, directory: Path, parameters: Mapping[str, nn.Parameter], tower_type: str
) -> dict[str, LazyTensor]:
    """Reads all of these parameters, which belong to one part, from its directory.

    Returns an empty dictionary if any is missing, because transformers may then have to convert the tensors.
    """
    try:
        tensors = {
            to_published_name(_PREFIXES[part] + name, tower_type): tensor
            for name, tensor in read_folder(directory).items()
        }
    except (ModelError, SafetensorError, OSError):
        return {}  # the error is raised again when the part is built
    weights = {}
    for name, parameter in parameters.items():
        published = published_name(name, tower_type)
        converted = _convert(tensors[published], published, parameter) if published in tensors else None
        if converted is None:
            return {}
        weights[name] = converted.renamed(name)
    return weights


def _convert(tensor: LazyTensor, name: str, parameter: nn.Parameter) -> LazyTensor | None:
    """Converts a tensor to the parameter's dtype and shape as `build_model` does; None if that is not possible."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:  # quantised
        return None
    tensor, shape = tensor.cast(parameter.dtype), tuple(parameter.shape)
    if tensor.shape == shape:
        return tensor
    if len(tensor.shape) != len(shape) or tensor.shape[-1] != shape[-1]:
        return None
    if name in (EMBEDDING, HEAD) and tensor.shape[0] < shape[0]:
        return tensor.mapped(partial(extend_vocab, size=shape[0]), shape, parameter.dtype)
    if name.startswith("vision_tower.") and ".position_embedding" in name:
        return tensor.mapped(partial(resample_positions, shape=shape), shape, parameter.dtype)
    return None
