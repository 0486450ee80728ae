"""The families of vision towers that LLaVA-NeXT is built with: one row for each, by transformers' model_type.

A row holds what differs between them: the tokens before the patches, the names that their tensors were published
under, what is random in training mode, and which programs run an export. A tower of another family is refused by name,
because its features would be read by guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from llava_next.config import ModelError


@dataclass(frozen=True)
class TowerFamily:
    """What is common to the towers of one model_type.

    Attributes:
        class_tokens: tokens before the patches, register tokens not counted.
        published_prefix: of the tower's tensors in a published LLaVA-NeXT checkpoint.
        published: pairs of a piece of a tensor's name in today's module tree and the piece that it was published with.
        random_keys: config keys that move positions at random in training mode; written as None, which is how the
            tower runs in evaluation.
        gated: its MLP has three matrices instead of two; None where the config's `use_gated_mlp` says so.
        served: vLLM and SGLang run their LLaVA-NeXT with this tower.
        authors: the authors' code does.
    """

    class_tokens: int
    published_prefix: str = "vision_tower."
    published: tuple[tuple[str, str], ...] = ()
    random_keys: tuple[str, ...] = ()
    gated: bool | None = False
    served: bool = False
    authors: bool = False


_ATTENTION = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)
_VIT = (
    ("vision_tower.layers.", "vision_tower.encoder.layer."),
    *_ATTENTION,
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)

TOWER_FAMILIES = {
    "clip_vision_model": TowerFamily(1, "vision_tower.vision_model.", served=True, authors=True),
    "siglip_vision_model": TowerFamily(0, "vision_tower.vision_model.", served=True),
    "dinov2": TowerFamily(1, published=_ATTENTION),
    "dinov2_with_registers": TowerFamily(1, published=_ATTENTION),
    "dinov3_vit": TowerFamily(
        1,
        published=(("vision_tower.model.layer.", "vision_tower.layer."),),
        random_keys=("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
        gated=None,
    ),
    "aimv2_vision_model": TowerFamily(0, gated=True),
    "ijepa": TowerFamily(0, published=_VIT),
}
"""Fixed-size SigLIP 2 checkpoints are of model_type siglip_vision_model."""


def tower_config(config: PretrainedConfig) -> PretrainedConfig:
    """A tower's own config, of the directory of a tower or of a whole model (CLIP, SigLIP), in the form that is used.

    The sides of its images and patches become one integer each, and what is random in training mode is switched off,
    so that a step stays a function of its samples. The config is changed in place.

    Raises:
        ModelError: a tower of no known family, or one whose images or patches are not square.
    """
    vision: PretrainedConfig = getattr(config, "vision_config", config)
    family = TOWER_FAMILIES.get(vision.model_type)
    if family is None:
        raise ModelError(
            f"model.vision_tower.path: a tower of model_type {vision.model_type} is not supported; choose one of "
            f"{', '.join(TOWER_FAMILIES)}{_HINTS.get(vision.model_type, '')}"
        )
    for key in ("image_size", "patch_size"):
        setattr(vision, key, _side(vision, key))
    for key in family.random_keys:
        setattr(vision, key, None)
    return vision


_HINTS = {"siglip2_vision_model": " (this is the NaFlex variant, whose images have no fixed size; fixed-size SigLIP 2 "
          "checkpoints are of model_type siglip_vision_model)"}  # fmt: skip


def _side(vision: PretrainedConfig, key: str) -> int:
    value: Any = getattr(vision, key, None)
    sides = set(value) if isinstance(value, Sequence) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(
            f"model.vision_tower.path: its config.json has {key}={value}, and a square of whole pixels is needed; set "
            f"{key} to one number in model.vision_tower.overrides if the tower can take it"
        )
    return int(sides.pop())


def num_prefix_tokens(vision: PretrainedConfig) -> int:
    """Tokens before a tower's patches: the class token and the register tokens."""
    return TOWER_FAMILIES[vision.model_type].class_tokens + int(getattr(vision, "num_register_tokens", None) or 0)


def unsupported_by_stock(vision: PretrainedConfig) -> str | None:
    """Why stock transformers cannot run a LLaVA-NeXT with this tower; None where no reason is known.

    It removes one token before the patches (vision_feature_select_strategy `default`) or none (`full`).
    """
    prefix = num_prefix_tokens(vision) if vision.model_type in TOWER_FAMILIES else 0
    if prefix <= 1:
        return None
    return (
        f"its LLaVA-NeXT removes at most one token before a tower's patches, and this {vision.model_type} has {prefix} "
        f"(a class token and {prefix - 1} register tokens)"
    )


def mlp_shape(vision: PretrainedConfig) -> tuple[int, int]:
    """The inner width of a tower's MLP, and the number of its matrices (3 where it is gated)."""
    width, family = int(vision.hidden_size), TOWER_FAMILIES[vision.model_type]
    inner = int(getattr(vision, "intermediate_size", None) or width * getattr(vision, "mlp_ratio", 4))
    if getattr(vision, "use_swiglu_ffn", False):  # DINOv2's giant: two thirds, in multiples of 8 (SwiGLU, xFormers)
        return (int(inner * 2 / 3) + 7) // 8 * 8, 3
    gated = getattr(vision, "use_gated_mlp", False) if family.gated is None else family.gated
    return inner, 3 if gated else 2
