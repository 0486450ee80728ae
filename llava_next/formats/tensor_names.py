"""Tensor names: the live model's, the published Hugging Face layout's, the authors'.

Only this file, `hugging_face.py`, `original.py` and `connector.py` know how tensors are called on disk. The published
names are those of the released Hugging Face checkpoints, which transformers, vLLM and TGI all read; what transformers 5
itself writes is not, and is read by `as_published`. The authors' names are those of their own releases, which their
code and SGLang read.
"""

import re

from llava_next.config import ProjectorKind
from llava_next.model.towers import TOWER_FAMILIES

_LINEAR = ("hf.model.multi_modal_projector.weight", "hf.model.multi_modal_projector.bias")
"""A linear projector is one layer: in the published layout the first of two (see `hugging_face.py`)."""

AUTHORS_PROJECTORS: dict[ProjectorKind, set[str]] = {
    "mlp2x_gelu": {f"mm_projector.{layer}.{tensor}" for layer in (0, 2) for tensor in ("weight", "bias")},
    "linear": {"mm_projector.weight", "mm_projector.bias"},
}
"""The tensors of the authors' projectors, without the prefix that their files vary."""


def published_name(live: str, tower_type: str) -> str:
    """The name in the published Hugging Face layout of a parameter of `LlavaNext` (`hf.model...`)."""
    tower = TOWER_FAMILIES[tower_type].published_prefix
    if live in _LINEAR:
        return live.removeprefix("hf.model.").replace("projector.", "projector.linear_1.")
    for prefix, published in (
        ("hf.model.vision_tower.vision_model.", tower),
        ("hf.model.vision_tower.", tower),
        ("hf.model.language_model.", "language_model.model."),
        ("hf.lm_head.", "language_model.lm_head."),
        ("hf.model.", ""),
    ):
        if live.startswith(prefix):
            return _own_tower_name(published + live.removeprefix(prefix), tower_type)
    raise KeyError(live)


def _own_tower_name(name: str, tower_type: str) -> str:
    """The name that a tower's tensor was published under, which every version of transformers reads."""
    if name.startswith("vision_tower."):
        for today, published in TOWER_FAMILIES[tower_type].published:
            name = name.replace(today, published)
    return name


def authors_name(connector: str) -> str:
    """The authors' name of a connector's tensor (`multi_modal_projector...`, `image_newline`), without prefix."""
    for ours, authors in (
        ("multi_modal_projector.linear_1.", "mm_projector.0."),
        ("multi_modal_projector.linear_2.", "mm_projector.2."),
        ("multi_modal_projector.", "mm_projector."),
    ):
        if connector.startswith(ours):
            return authors + connector.removeprefix(ours)
    return connector


_ORIGINAL: dict[ProjectorKind, tuple[tuple[str, str], ...]] = {
    "mlp2x_gelu": (
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
    "linear": (("multi_modal_projector.linear_1.", "model.mm_projector."),),
}
_ORIGINAL_OF_ALL = (
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("image_newline", "model.image_newline"),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
)
"""Published prefixes and the authors'; from their side the longest comes first, since all begin with `model.`"""


def original_name(published: str, kind: ProjectorKind) -> str:
    """The authors' name of a tensor with a published one."""
    for prefix, original in (*_ORIGINAL[kind], *_ORIGINAL_OF_ALL):
        if published.startswith(prefix):
            return original + published.removeprefix(prefix)
    raise KeyError(published)


def from_original(name: str, kind: ProjectorKind) -> str:
    """The published name of a tensor with the authors' one; what is none of theirs stays as it is."""
    for prefix, original in (*_ORIGINAL[kind], *_ORIGINAL_OF_ALL):
        if name.startswith(original):
            return prefix + name.removeprefix(original)
    return name


_INSIDE = re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$|language_model\.)")
_DECODER = re.compile(r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)")


def as_published(name: str, tower_type: str) -> str:
    """The published name of a tensor in a Hugging Face directory of any version: transformers 5 leaves out
    `vision_model.`, its module tree says `model.language_model.` and `lm_head.`"""
    name = _INSIDE.sub("", name)
    name = _DECODER.sub("language_model.model.", name)
    if name.startswith("lm_head."):
        return "language_model." + name
    prefix = TOWER_FAMILIES[tower_type].published_prefix
    if name.startswith("vision_tower.") and not name.startswith(prefix):
        return prefix + name.removeprefix("vision_tower.")
    return _own_tower_name(name, tower_type)
