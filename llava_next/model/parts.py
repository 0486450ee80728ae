"""The parts of a model: which parameter belongs to which, which ones train, which ones are recomputed."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from llava_next.config import PARTS, ModelError
from llava_next.model.llava_next import LlavaNext

BASE = ".base_layer."
"""What stands in a live name between a layer with an adapter and its own tensors; published names know of no adapter
(`merge_adapters.py` merges them)."""


def is_adapter(live: str) -> bool:
    """Whether a parameter of `LlavaNext` is an adapter's, by its name."""
    return ".lora_A." in live or ".lora_B." in live


def without_adapters(live: str) -> str:
    """The name of a parameter that is no adapter's in the model before adapters were put into it."""
    return live.replace(BASE, ".")


def part_of(name: str) -> str:
    """The part that a parameter of `LlavaNext` belongs to, by its name.

    Raises:
        ModelError: a name that no part owns.
    """
    for prefix, part in _PART_PREFIXES:
        if name.startswith(prefix):
            return part
    raise ModelError(f"parameter {name} belongs to no part of {', '.join(PARTS)}")


_PART_PREFIXES = (
    ("hf.model.vision_tower.", "vision_tower"),
    ("hf.model.multi_modal_projector.", "projector"),
    ("hf.model.image_newline", "image_newline"),
    ("hf.model.language_model.", "language_model"),
    ("hf.lm_head.", "language_model"),
)


def set_trained_parts(model: LlavaNext, parts: Collection[str]) -> None:
    """Lets exactly these parts train; everything else, and what no forward pass reads, is frozen. Of a part with
    adapters (`lora.py`) these alone train.

    Raises:
        ModelError: an unknown part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ModelError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    unread = set(_unread_tower_parameters(model))
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        learns = is_adapter(name) if part_of(name) in adapted else name not in unread
        parameter.requires_grad_(part_of(name) in parts and learns)


def set_recompute(model: LlavaNext, parts: Collection[str]) -> None:
    """Lets the blocks of these parts keep their inputs alone and run again in the backward pass.

    Nothing learned depends on it: memory is traded for a second forward pass of those blocks.

    Raises:
        ModelError: a part that is no stack of blocks.
    """
    stacks = {"vision_tower": model.hf.model.vision_tower, "language_model": model.hf.model.language_model}
    for part in parts:
        if part not in stacks:
            raise ModelError(f"recompute: {part!r} is no stack of blocks; choose among {', '.join(stacks)}")
        # transformers runs blocks again only in training mode, in which nothing else differs (no dropout, see above).
        stacks[part].train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _unread_tower_parameters(model: LlavaNext) -> Iterator[str]:
    """Tower tensors that the chosen features do not depend on: final norms, pooling heads, mask tokens.

    Trained, they would get no gradient and still decay. Parameters come in the order in which a tower's modules are
    made: embeddings, layers, and then what reads the last layer.
    """
    seen_layers = False
    for name, _ in model.named_parameters():
        if part_of(name) != "vision_tower":
            continue
        in_layers = name.startswith(model.tower_layers_name + ".")
        seen_layers = seen_layers or in_layers
        if (seen_layers and not in_layers) or name.endswith("mask_token"):
            yield name


def live_parameters(model: LlavaNext) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its live name, the tower's upper layers included (they are kept aside, see `llava_next.py`).

    A head that shares the embedding's tensor is left out, as published checkpoints leave it out.
    """
    tied = model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (tied and name.startswith("hf.lm_head.")):
            yield name, parameter
    for index, layer in enumerate(model.upper_tower_layers, start=model.num_tower_layers):
        for name, parameter in layer.named_parameters():
            yield f"{model.tower_layers_name}.{index}.{name}", parameter


def num_parameters(model: LlavaNext, part: str | None = None, *, trained: bool = False) -> int:
    """Parameters of a part, or of the model; shared ones once. Partitioned (ZeRO-3) ones count whole."""
    return sum(
        _full_numel(parameter)
        for name, parameter in model.named_parameters()
        if (part is None or part_of(name) == part) and (parameter.requires_grad or not trained)
    )


def _full_numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
