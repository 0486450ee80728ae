"""Reads the Hugging Face configs of a model's parts and joins them into the config of a LLaVA-NeXT.

The result is sufficient to build the model on the meta device; tokenizer, processor and weights are in `build.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, LlavaNextConfig, PretrainedConfig

from llava_next.config import ModelConfig, ModelError
from llava_next.file_access import permission_problem
from llava_next.model.checkpoint_config import PROJECTOR_ACTS, is_original, language_model_config_values, read_json
from llava_next.model.language_models import check_language_model_supported, check_rope, override_rope
from llava_next.model.towers import num_prefix_tokens, prepare_tower_config
from llava_next.model_directory import describe_missing

LANGUAGE_MODEL, VISION_TOWER = "model.language_model", "model.vision_tower"
"""Configuration keys of the two parts that have a config of their own."""

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, for efficient matrix products and for tensor parallelism."""


@dataclass(frozen=True)
class Architecture:
    """The joined configs of a model, sufficient to build it without weights.

    Attributes:
        config: the model's configuration.
        hf_config: the config of the stock LLaVA-NeXT.
    """

    config: ModelConfig
    hf_config: LlavaNextConfig

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return int(self.hf_config.vision_config.image_size)

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile // int(self.hf_config.vision_config.patch_size)

    @property
    def max_positions(self) -> int:
        """The language model's max_position_embeddings, in tokens."""
        return int(self.hf_config.text_config.max_position_embeddings)

    def check_length(self, max_length: int) -> None:
        """Raises ModelError if a maximum length in tokens exceeds the language model's positions."""
        if max_length > self.max_positions:
            raise ModelError(
                f"stage.max_length={max_length} exceeds the {self.max_positions} positions of "
                f"{self.config.language_model.name}; decrease it, or increase max_position_embeddings in "
                "model.language_model.overrides"
            )


def join_configs(
    config: ModelConfig,
    text: PretrainedConfig,
    vision: PretrainedConfig,
    *,
    num_tokens: int,
    image_token: int,
    pad_token: int | None,
) -> LlavaNextConfig:
    """Joins the configs of both parts and derives tile, vocabulary and pinpoints.

    Args:
        config: the model's configuration.
        text, vision: the parts' configs; the vocabulary and the tile are written to them.
        num_tokens: size of the tokenizer's vocabulary, including the image token.
        image_token, pad_token: ids of the two tokens.

    Raises:
        ModelError: the tower or the language model is not supported, or the tile is neither the tower's image size nor
            a multiple of its patch.
    """
    tower = config.vision_tower
    check_rope(text)
    check_language_model_supported(text)
    vision = prepare_tower_config(vision)
    if tower.tile is not None:
        # The tower's image size need not be a multiple of the patch (SigLIP: 27 patches of 14 pixels in 384).
        if tower.tile % vision.patch_size and tower.tile != vision.image_size:
            raise ModelError(
                f"model.vision_tower.tile={tower.tile} must be a multiple of the tower's patch of {vision.patch_size} "
                f"pixels, or null for the tower's image size of {vision.image_size}"
            )
        vision.image_size = tower.tile
    vocabulary = max(num_tokens, int(text.vocab_size))
    text.vocab_size = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    patches = vision.image_size // vision.patch_size
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy="default" if num_prefix_tokens(vision) else "full",
        # transformers reads pinpoints as (height, width) in pixels; the order of the grids is the authors'.
        image_grid_pinpoints=[[r * vision.image_size, c * vision.image_size] for r, c in config.grids],
        image_seq_length=patches * patches,
        projector_hidden_act=PROJECTOR_ACTS[config.projector],
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=pad_token,
    )


def read_config(path: str, overrides: dict[str, Any], key: str) -> PretrainedConfig:
    """Reads the config of a part from a Hugging Face directory and replaces keys.

    Args:
        path: the directory of the part, or of a complete model. For a language model, its config is extracted from the
            complete model's; `join_configs` does the same for a tower.
        overrides: keys to replace.
        key: LANGUAGE_MODEL or VISION_TOWER.

    Raises:
        ModelError: there is no readable config, transformers does not support its model_type, or it lacks a key of
            `overrides`.
    """
    check_directory(path, key + ".path")
    values = read_json(Path(path) / "config.json")
    kind = values.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and not is_original(values):
        raise ModelError(
            f"{key}.path: {path} has model_type {kind}, which transformers {transformers.__version__} does not "
            "support, and code from a model's directory is never executed; use a model that transformers supports"
        )
    try:
        if is_original(values):
            config = AutoConfig.for_model(**language_model_config_values(values, Path(path)))
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = permission_problem(Path(path)) or f"cannot read the config.json in {path}: {error}"
        raise ModelError(f"{key}.path: {reason}") from error
    if key == LANGUAGE_MODEL:
        config = getattr(config, "text_config", config)
    replace_keys(config, overrides, key)
    return config


def check_not_whole_model(path: str) -> None:
    """Raises ModelError if the directory of a language model is that of a complete model with a tower."""
    values = read_json(Path(path) / "config.json")
    if "text_config" in values or is_original(values):
        raise ModelError(
            f"model.language_model.path: {path} is a complete model (model_type {values.get('model_type')}), whose "
            "language model cannot be loaded separately; give the directory of a language model, or tune the complete "
            f"model with experiment=tune stage.init_from={path}"
        )


def replace_keys(config: PretrainedConfig, overrides: dict[str, Any], key: str) -> None:
    """Replaces keys of a part's config.

    Args:
        config: is modified.
        overrides: keys and their values.
        key: the configuration key of the part, for messages.

    Raises:
        ModelError: the config has no such key.
    """
    for name, value in overrides.items():
        if override_rope(config, name, value):
            continue
        if not hasattr(config, name):
            raise ModelError(f"{key}.overrides: {config.model_type} has no key {name!r}; remove it")
        setattr(config, name, value)


def check_directory(path: str, key: str) -> None:
    """Raises ModelError if `path` is not a directory; `key` is its configuration key."""
    if not Path(path).is_dir():
        raise ModelError(f"{key}: {describe_missing(path)}; give a Hugging Face directory on disk")
