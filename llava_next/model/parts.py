"""The parts of a model: assigns parameters to parts, and selects the parts that are trained or recomputed."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from llava_next.config import PARTS, ModelError
from llava_next.model.llava_next import LlavaNext

BASE = ".base_layer."
"""Infix that peft inserts into the parameter names of an adapted layer. Published names do not have it."""


def is_adapter(name: str) -> bool:
    """Whether a parameter name of `LlavaNext` is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapters(name: str) -> str:
    """The name that an adapted layer's own parameter has in the model without adapters."""
    return name.replace(BASE, ".")


def part_of(name: str) -> str:
    """The part of a parameter of `LlavaNext`.

    Args:
        name: of the parameter in the module tree.

    Raises:
        ModelError: the name belongs to no part.
    """
    for prefix, part in _PART_PREFIXES:
        if name.startswith(prefix):
            return part
    raise ModelError(f"parameter {name} belongs to none of the parts {', '.join(PARTS)}")


_PART_PREFIXES = (
    ("hf.model.vision_tower.", "vision_tower"),
    ("hf.model.multi_modal_projector.", "projector"),
    ("hf.model.image_newline", "image_newline"),
    ("hf.model.language_model.", "language_model"),
    ("hf.lm_head.", "language_model"),
)


def set_trained_parts(model: LlavaNext, parts: Collection[str]) -> None:
    """Sets `requires_grad` of all parameters so that exactly these parts are trained.

    In a part with adapters (`lora.py`) only these are trained. Parameters that the features do not depend on are
    frozen.

    Args:
        model: is modified.
        parts: names of parts.

    Raises:
        ModelError: a part is unknown.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ModelError(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    unused = set(_unused_tower_parameters(model))
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        is_trainable = is_adapter(name) if part_of(name) in adapted else name not in unused
        parameter.requires_grad_(part_of(name) in parts and is_trainable)


def set_recompute(model: LlavaNext, parts: Collection[str]) -> None:
    """Enables activation checkpointing in the blocks of these parts.

    Blocks then keep only their inputs and run again in the backward pass. Results do not change.

    Raises:
        ModelError: a part does not consist of blocks.
    """
    stacks = {"vision_tower": model.hf.model.vision_tower, "language_model": model.hf.model.language_model}
    for part in parts:
        if part not in stacks:
            raise ModelError(f"recompute: {part!r} does not consist of blocks; choose from {', '.join(stacks)}")
        # transformers recomputes in training mode only. Nothing else depends on the mode, since dropout is an error.
        stacks[part].train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _unused_tower_parameters(model: LlavaNext) -> Iterator[str]:
    """Tower parameters that the features do not depend on: final norms, pooling heads, mask tokens.

    As trained parameters they would get no gradient but decay. Modules of a tower are registered in this order:
    embeddings, layers, modules after the last layer.
    """
    has_reached_layers = False
    for name, _ in model.named_parameters():
        if part_of(name) != "vision_tower":
            continue
        in_layers = name.startswith(model.tower_layers_name + ".")
        has_reached_layers = has_reached_layers or in_layers
        if (has_reached_layers and not in_layers) or name.endswith("mask_token"):
            yield name


def live_parameters(model: LlavaNext) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by name, including those of the tower's removed upper layers (see `llava_next.py`).

    A head that is tied to the embedding is omitted, as in published checkpoints.
    """
    tied = model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (tied and name.startswith("hf.lm_head.")):
            yield name, parameter
    for index, layer in enumerate(model.upper_tower_layers, start=model.num_tower_layers):
        for name, parameter in layer.named_parameters():
            yield f"{model.tower_layers_name}.{index}.{name}", parameter


def num_parameters(model: LlavaNext, part: str | None = None, *, trained: bool = False) -> int:
    """Number of elements of a part's parameters. Shared parameters are counted once, partitioned ones (ZeRO-3) in full.

    Args:
        model: the model.
        part: name of the part; None means all parts.
        trained: count only parameters with `requires_grad`.
    """
    return sum(
        _full_numel(parameter)
        for name, parameter in model.named_parameters()
        if (part is None or part_of(name) == part) and (parameter.requires_grad or not trained)
    )


def _full_numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
