"""The shapes of a model: its parts' Hugging Face configs, read and brought into agreement with one another.

Owns what follows from them (tile, vocabulary, pinpoints). A model can be built from it on the meta device; tokenizer,
processor and weights are `build.py`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, LlavaNextConfig, PretrainedConfig

from llava_next.config import ModelConfig, ModelError
from llava_next.model.language_models import check_rope, refuse_unsupported, write_rope
from llava_next.model.released import PROJECTOR_ACTS, is_original, language_model_values, read_json
from llava_next.model.towers import num_prefix_tokens, tower_config

LANGUAGE_MODEL, VISION_TOWER = "model.language_model", "model.vision_tower"
"""The parts whose configs are read, as a configuration names them."""

VOCABULARY_MULTIPLE = 64
"""The embedding table is padded to a multiple of this (matrix products like it, and so does tensor parallelism)."""


@dataclass(frozen=True)
class Architecture:
    """The shapes of a model: its configs, in agreement with one another. Enough to build it without weights."""

    config: ModelConfig
    hf_config: LlavaNextConfig

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return int(self.hf_config.vision_config.image_size)

    @property
    def patches_per_side(self) -> int:
        return self.tile // int(self.hf_config.vision_config.patch_size)

    @property
    def max_positions(self) -> int:
        """The longest sequence that the language model was made for, in tokens."""
        return int(self.hf_config.text_config.max_position_embeddings)

    def check_length(self, max_length: int) -> None:
        """Raises ModelError where samples may be longer than the language model's positions."""
        if max_length > self.max_positions:
            raise ModelError(
                f"stage.max_length={max_length} is longer than the {self.max_positions} positions of "
                f"{self.config.language_model.name}; lower it, or raise max_position_embeddings in "
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
    """One config of both parts, with what follows from them: tile, vocabulary, pinpoints.

    Args:
        text, vision: the parts' own configs; the tile and the vocabulary are written into them.
        num_tokens: of the tokenizer, the image token among them.
        image_token, pad_token: their numbers.

    Raises:
        ModelError: a tower or a language model that is not supported, or a tile of another size than the tower's own
            that its patch does not divide.
    """
    tower = config.vision_tower
    check_rope(text)
    refuse_unsupported(text)
    vision = tower_config(vision)
    if tower.tile is not None:
        # A tower may leave a strip of its own size unseen (SigLIP's 27 patches of 14 in 384 pixels), not of another.
        if tower.tile % vision.patch_size and tower.tile != vision.image_size:
            raise ModelError(
                f"model.vision_tower.tile={tower.tile} is not a multiple of the tower's patch of {vision.patch_size} "
                f"pixels; use one, or null for the tower's own size of {vision.image_size}"
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
        # transformers reads pinpoints as (height, width): the authors' order of grids, in pixels.
        image_grid_pinpoints=[[r * vision.image_size, c * vision.image_size] for r, c in config.grids],
        image_seq_length=patches * patches,
        projector_hidden_act=PROJECTOR_ACTS[config.projector],
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=pad_token,
    )


def read_config(path: str, overrides: dict[str, Any], key: str) -> PretrainedConfig:
    """The config of a part in a Hugging Face directory, with keys replaced; `key` names the part, also in messages.

    The directory may be a part's own, or a whole model's, of which a language model's config is taken out (a tower's:
    `join_configs`).

    Raises:
        ModelError: no config lies there, or one of another program's model_type, or it has no such key.
    """
    check_directory(path, key + ".path")
    own = read_json(Path(path) / "config.json")
    kind = own.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and not is_original(own):
        raise ModelError(
            f"{key}.path: {path} is of model_type {kind}, which transformers {transformers.__version__} does not have, "
            "and code from a model's folder is never run; give a model of transformers' own"
        )
    try:
        if is_original(own):
            config = AutoConfig.for_model(**language_model_values(own, Path(path)))
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}.path: no config.json could be read in {path}: {error}") from error
    if key == LANGUAGE_MODEL:
        config = getattr(config, "text_config", config)
    replace_keys(config, overrides, key)
    return config


def refuse_whole_model(path: str) -> None:
    """Raises ModelError where a language model's weights would be read from the folder of a model with a tower."""
    own = read_json(Path(path) / "config.json")
    if "text_config" in own or is_original(own):
        raise ModelError(
            f"model.language_model.path: {path} is a whole model (model_type {own.get('model_type')}), from which no "
            "language model is taken alone; give the folder of the language model, or tune a whole LLaVA with "
            f"experiment=tune stage.init_from={path}"
        )


def replace_keys(config: PretrainedConfig, overrides: dict[str, Any], key: str) -> None:
    """Writes the overrides of a part into its config. Raises ModelError where it has no such key."""
    for name, value in overrides.items():
        if write_rope(config, name, value):
            continue
        if not hasattr(config, name):
            raise ModelError(f"{key}.overrides: {config.model_type} has no key {name!r}")
        setattr(config, name, value)


def check_directory(path: str, key: str) -> None:
    """Raises ModelError where there is no such folder; `key` names it."""
    if not Path(path).is_dir():
        raise ModelError(f"{key}: there is no folder {path}; name a Hugging Face directory on disk")
