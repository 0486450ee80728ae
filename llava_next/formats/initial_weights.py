"""The weights that a stage starts with, one tensor at a time: what `build_model` and `load_weights` give a model, where
it lies on disk.

Owns where each part's weights are, and which of them no file holds as the model needs them: such a part is built, and
held. How vocabularies and positions grow is `build.py`'s, names `tensor_names.py`'s.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from llava_next.config import PARTS, LanguageModelConfig, ModelError, VisionTowerConfig
from llava_next.formats.hugging_face import live_tensor
from llava_next.formats.load import EMBEDDING, HEAD, read_weights
from llava_next.formats.tensor_names import as_published, published_name
from llava_next.formats.tensors import LazyTensor, read_folder
from llava_next.model.build import Backbone, build_model, extend_vocab, resampled_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters, part_of

_PREFIXES = {"vision_tower": "vision_tower.", "language_model": "language_model."}
"""What a published name has before the name in the part's own directory."""


def first_weights(
    model: LlavaNext, backbone: Backbone, *, parts: Collection[str], seed: int, init_from: Path | None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The first weights of these parts, by live names, in the model's type.

    Args:
        model: names, shapes and type of its parameters, which may be on the meta device; it is left as it is. Without
            adapters.
        parts: whose weights are wanted; others may be among them.
        seed: as `build_model` was given it.
        init_from: as `load_weights` was given it; None where it was not called.

    Returns:
        The tensors, and a sentence on each tower or language model that had to be built, and is held whole.

    Raises:
        ModelError: as `build_model` and `load_weights` do.
    """
    live = dict(live_parameters(model))
    dtype = next(iter(live.values())).dtype
    found: dict[str, LazyTensor] = {}
    if init_from is not None:
        tensors, _ = read_weights(model, backbone, init_from)
        found = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    stacks = _stacks(backbone)
    for part, config in stacks.items():
        lacking = {name: live[name] for name in live if part_of(name) == part and name not in found}
        if part in parts and lacking and config.weights == "pretrained":
            found |= _in_directory(part, Path(config.path), lacking, backbone.hf_config.vision_config.model_type)
    missing = {part_of(name) for name in live.keys() - found.keys()} & set(parts)
    if missing:
        found = _built(missing, backbone, dtype, seed) | found
    return found, [
        f"the {part} is held whole: "
        + (
            f"{config.path} names its tensors otherwise"
            if config.weights == "pretrained"
            else "no file has its weights"
        )
        for part, config in stacks.items()
        if part in missing
    ]


def _stacks(backbone: Backbone) -> dict[str, LanguageModelConfig | VisionTowerConfig]:
    return {"vision_tower": backbone.config.vision_tower, "language_model": backbone.config.language_model}


def _built(parts: set[str], backbone: Backbone, dtype: torch.dtype, seed: int) -> dict[str, LazyTensor]:
    """These parts as `build_model` makes them, by live names."""
    wanted = set(parts)
    if parts & {"projector", "image_newline"}:
        wanted |= {"projector", "image_newline"}  # drawn one after the other
    if any(part in parts and config.weights == "random" for part, config in _stacks(backbone).items()):
        wanted = set(PARTS)  # drawn after one another, too
    model = build_model(backbone, dtype=dtype, seed=seed, parts=wanted)
    return {name: live_tensor(name, parameter) for name, parameter in live_parameters(model) if part_of(name) in parts}


def _in_directory(
    part: str, directory: Path, live: Mapping[str, nn.Parameter], tower_type: str
) -> dict[str, LazyTensor]:
    """All of these parameters, which are one part's, or nothing: where transformers has to make something else of a
    directory's tensors, it is asked to."""
    try:
        theirs = {
            as_published(_PREFIXES[part] + name, tower_type): tensor for name, tensor in read_folder(directory).items()
        }
    except (ModelError, SafetensorError, OSError):
        return {}  # whatever is wrong with it, building the part tells
    found = {}
    for name, parameter in live.items():
        published = published_name(name, tower_type)
        fitted = _fitted(theirs[published], published, parameter) if published in theirs else None
        if fitted is None:
            return {}
        found[name] = fitted.renamed(name)
    return found


def _fitted(tensor: LazyTensor, name: str, parameter: nn.Parameter) -> LazyTensor | None:
    """The tensor as `build_model` makes it fit, or None where it does not."""
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
        return tensor.mapped(partial(resampled_positions, shape=shape), shape, parameter.dtype)
    return None
