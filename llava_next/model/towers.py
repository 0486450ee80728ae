"""Supported families of vision towers.

`TOWER_FAMILIES` maps transformers' model_type to every property that differs between families. A tower of another
family is an error, because its tokens and tensor names are not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from llava_next.config import ModelError


@dataclass(frozen=True)
class TowerFamily:
    """Properties of the towers of one model_type.

    Attributes:
        num_class_tokens: tokens before the patches, without register tokens.
        published_prefix: of the tower's tensors in a published LLaVA-NeXT checkpoint.
        published_names: pairs of a substring of a tensor name in the module tree and its published form.
        random_keys: config keys that shift positions at random in training mode; set to None, as in evaluation.
        has_layer_scale: whether each layer scales its two branches by learned vectors (DINO).
        is_mlp_gated: whether the MLP has three matrices instead of two; None means the config's `use_gated_mlp`.
        is_served: whether vLLM and SGLang run a LLaVA-NeXT with this tower.
        is_in_authors_code: whether the authors' code runs a LLaVA-NeXT with this tower.
    """

    num_class_tokens: int
    published_prefix: str = "vision_tower."
    published_names: tuple[tuple[str, str], ...] = ()
    random_keys: tuple[str, ...] = ()
    has_layer_scale: bool = False
    is_mlp_gated: bool | None = False
    is_served: bool = False
    is_in_authors_code: bool = False


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
    "clip_vision_model": TowerFamily(1, "vision_tower.vision_model.", is_served=True, is_in_authors_code=True),
    "siglip_vision_model": TowerFamily(0, "vision_tower.vision_model.", is_served=True),
    "dinov2": TowerFamily(1, published_names=_ATTENTION, has_layer_scale=True),
    "dinov2_with_registers": TowerFamily(1, published_names=_ATTENTION, has_layer_scale=True),
    "dinov3_vit": TowerFamily(
        1,
        published_names=(("vision_tower.model.layer.", "vision_tower.layer."),),
        random_keys=("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
        has_layer_scale=True,
        is_mlp_gated=None,
    ),
    "aimv2_vision_model": TowerFamily(0, is_mlp_gated=True),
    "ijepa": TowerFamily(0, published_names=_VIT),
}
"""Tower families by model_type. Fixed-size SigLIP 2 checkpoints have model_type siglip_vision_model."""


def prepare_tower_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns the tower's config with scalar sizes and without randomness in training mode.

    Randomness is disabled so that a training step is a function of its samples. The config is modified in place.

    Args:
        config: of a tower, or of a complete model (CLIP, SigLIP) that contains one.

    Raises:
        ModelError: the family is not supported, or the images or patches are not square.
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


_HINTS = {"siglip2_vision_model": " (this is the NaFlex variant, which has no fixed image size; fixed-size SigLIP 2 "
          "checkpoints have model_type siglip_vision_model)"}  # fmt: skip


def _side(vision: PretrainedConfig, key: str) -> int:
    value: Any = getattr(vision, key, None)
    sides = set(value) if isinstance(value, Sequence) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(
            f"model.vision_tower.path: {key}={value} in config.json must be one positive integer; set it in "
            "model.vision_tower.overrides if the tower supports a square"
        )
    return int(sides.pop())


def num_prefix_tokens(vision: PretrainedConfig) -> int:
    """Number of tokens before a tower's patches: class tokens and register tokens."""
    return TOWER_FAMILIES[vision.model_type].num_class_tokens + int(getattr(vision, "num_register_tokens", None) or 0)


def stock_unsupported_reason(vision: PretrainedConfig) -> str | None:
    """The reason why stock transformers cannot run a LLaVA-NeXT with this tower; None if it can.

    Stock transformers removes one token before the patches (vision_feature_select_strategy `default`) or none (`full`).
    """
    prefix = num_prefix_tokens(vision) if vision.model_type in TOWER_FAMILIES else 0
    if prefix <= 1:
        return None
    return (
        f"its LLaVA-NeXT removes at most one token before a tower's patches, but this {vision.model_type} has {prefix} "
        f"(a class token and {prefix - 1} register tokens)"
    )


def mlp_shape(vision: PretrainedConfig) -> tuple[int, int]:
    """Inner width of a tower's MLP and its number of matrices (3 if it is gated, else 2)."""
    width, family = int(vision.hidden_size), TOWER_FAMILIES[vision.model_type]
    inner = int(getattr(vision, "intermediate_size", None) or width * getattr(vision, "mlp_ratio", 4))
    if getattr(vision, "use_swiglu_ffn", False):  # DINOv2 giant: two thirds, rounded up to 8 (xFormers' SwiGLU)
        return (int(inner * 2 / 3) + 7) // 8 * 8, 3
    is_gated = getattr(vision, "use_gated_mlp", False) if family.is_mlp_gated is None else family.is_mlp_gated
    return inner, 3 if is_gated else 2
