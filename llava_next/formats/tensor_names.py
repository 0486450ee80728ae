"""Maps tensor names between the modules of `LlavaNext`, the Hugging Face layout and the authors' layout.

Published names are those of the released Hugging Face checkpoints, which transformers, vLLM and TGI read. transformers
5 writes other names, which `to_published_name` maps. Original names are those of the authors' releases, which their
code and SGLang read.
"""

import re

from llava_next.config import ProjectorKind
from llava_next.model.towers import TOWER_FAMILIES

NEWLINE = "image_newline"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
SECOND_LAYER = ("multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias")
"""Published names. A linear projector has no second layer; it is written as the identity."""

_LINEAR = ("hf.model.multi_modal_projector.weight", "hf.model.multi_modal_projector.bias")
"""Parameters of a linear projector, which the published layout stores as the first of two layers."""

AUTHORS_PROJECTORS: dict[ProjectorKind, set[str]] = {
    "mlp2x_gelu": {f"mm_projector.{layer}.{tensor}" for layer in (0, 2) for tensor in ("weight", "bias")},
    "linear": {"mm_projector.weight", "mm_projector.bias"},
}
"""Tensor names of the authors' projectors, without the prefix, which differs between files."""


def published_name(name: str, tower_type: str) -> str:
    """The published name of a parameter of `LlavaNext`.

    Args:
        name: in the module tree (`hf.model...`), without adapters.
        tower_type: transformers' model_type of the tower.

    Raises:
        KeyError: `LlavaNext` has no such parameter.
    """
    tower = TOWER_FAMILIES[tower_type].published_prefix
    if name in _LINEAR:
        return name.removeprefix("hf.model.").replace("projector.", "projector.linear_1.")
    for prefix, published in (
        ("hf.model.vision_tower.vision_model.", tower),
        ("hf.model.vision_tower.", tower),
        ("hf.model.language_model.", "language_model.model."),
        ("hf.lm_head.", "language_model.lm_head."),
        ("hf.model.", ""),
    ):
        if name.startswith(prefix):
            return _published_tower_name(published + name.removeprefix(prefix), tower_type)
    raise KeyError(name)


def _published_tower_name(name: str, tower_type: str) -> str:
    """The published name of a tower's tensor, which every version of transformers reads."""
    if name.startswith("vision_tower."):
        for module_name, published in TOWER_FAMILIES[tower_type].published_names:
            name = name.replace(module_name, published)
    return name


def to_authors_name(connector: str) -> str:
    """The authors' name of a connector's tensor (`multi_modal_projector...`, `image_newline`), without prefix."""
    for published, authors in (
        ("multi_modal_projector.linear_1.", "mm_projector.0."),
        ("multi_modal_projector.linear_2.", "mm_projector.2."),
        ("multi_modal_projector.", "mm_projector."),
    ):
        if connector.startswith(published):
            return authors + connector.removeprefix(published)
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
"""Pairs of a published and an original prefix. Longer original prefixes come first, since all begin with `model.`"""


def to_original_name(published: str, kind: ProjectorKind) -> str:
    """The original name of a published tensor name; raises KeyError if there is none."""
    for prefix, original in (*_ORIGINAL[kind], *_ORIGINAL_OF_ALL):
        if published.startswith(prefix):
            return original + published.removeprefix(prefix)
    raise KeyError(published)


def original_to_published_name(name: str, kind: ProjectorKind) -> str:
    """The published name of an original tensor name; other names are returned unchanged."""
    for prefix, original in (*_ORIGINAL[kind], *_ORIGINAL_OF_ALL):
        if name.startswith(original):
            return prefix + name.removeprefix(original)
    return name


_MODEL_PREFIX = re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$|language_model\.)")
_DECODER = re.compile(r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)")


def to_published_name(name: str, tower_type: str) -> str:
    """The published name of a tensor in a Hugging Face directory of any transformers version.

    transformers 5 omits `vision_model.`, and its modules are named `model.language_model.` and `lm_head.`

    Args:
        name: in the directory.
        tower_type: transformers' model_type of the tower.
    """
    name = _MODEL_PREFIX.sub("", name)
    name = _DECODER.sub("language_model.model.", name)
    if name.startswith("lm_head."):
        return "language_model." + name
    prefix = TOWER_FAMILIES[tower_type].published_prefix
    if name.startswith("vision_tower.") and not name.startswith(prefix):
        return prefix + name.removeprefix("vision_tower.")
    return _published_tower_name(name, tower_type)
