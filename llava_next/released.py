"""What a directory of a whole model says of itself: its layout, its language model, and how it cuts pictures.

Reads config.json and preprocessor_config.json alone, with the standard library, so that a configuration can be made of
them in a fraction of a second. Weights are `load.py`'s; the authors' layout is written by `original.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_next.config import Grid, ModelConfig, ModelError, ProjectorKind

ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
"""By the language model's type: what the authors' code and SGLang have a class for."""

_HF_TYPES = ("llava_next", "llava")


@dataclass(frozen=True)
class _Described:
    grids: tuple[Grid, ...] | None
    projector: ProjectorKind
    feature_layer: int


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the authors' layout; their model_type may be `llava` too."""
    architectures = config.get("architectures") or []
    return "mm_vision_tower" in config or any(name in ARCHITECTURES.values() for name in architectures)


def read_json(place: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none.

    Raises:
        ModelError: the file is no JSON object.
    """
    try:
        found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{place} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{place} holds no JSON object")
    return found


def language_model_values(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The language model's own config in one of the authors' layout, `model_type` among its keys.

    Raises:
        ModelError: a class of theirs that is none of `ARCHITECTURES`.
    """
    named = config.get("architectures") or []
    kinds = [kind for kind, name in ARCHITECTURES.items() if name in named]
    if not kinds:
        raise ModelError(
            f"{place}: architectures={named} is none of the authors' classes that are read: "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    return {
        key: value
        for key, value in config.items()
        if not key.startswith(("mm_", "image_", "unfreeze_", "tune_", "freeze_", "tokenizer_", "use_mm_"))
        and key not in ("architectures", "model_type")
    } | {"model_type": kinds[0]}


def adopted(model: ModelConfig, directory: Path) -> ModelConfig:
    """The model with grids, projector, feature layer and colours of the directory that its weights come from.

    Raises:
        ModelError: there is no whole model in it, it contradicts itself, or its tower has to be named.
    """
    config = read_json(directory / "config.json")
    if not config:
        raise ModelError(
            f"{directory} holds no config.json, and the model is to be the one that lies there; name the directory of "
            "a whole model, in Hugging Face's layout or the authors'"
        )
    described = _original(config, directory, model) if is_original(config) else _hugging_face(config, directory)
    tower = replace(model.vision_tower, feature_layer=described.feature_layer)
    images = read_json(directory / "preprocessor_config.json")
    if "image_mean" in images and "image_std" in images:
        mean, std = (tuple(float(value) for value in images[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ModelError(f"{directory}/preprocessor_config.json: image_mean and image_std have three values each")
        tower = replace(tower, image_mean=mean, image_std=std)
    grids = described.grids or model.grids
    return replace(model, vision_tower=tower, grids=grids, projector=described.projector)


def _hugging_face(config: Mapping[str, Any], directory: Path) -> _Described:
    if config.get("model_type") not in _HF_TYPES:
        raise ModelError(
            f"{directory} is of model_type {config.get('model_type')}, which is no LLaVA; a language model alone is "
            "model.language_model.path"
        )
    tile = config.get("vision_config", {}).get("image_size", 336)
    pinpoints = config.get("image_grid_pinpoints") if config["model_type"] == "llava_next" else None
    linear = config.get("projector_hidden_act") == "linear"
    return _Described(
        _grids(pinpoints, tile, directory) if pinpoints else None,
        "linear" if linear else "mlp2x_gelu",
        int(config.get("vision_feature_layer", -2)),
    )


def _original(config: Mapping[str, Any], directory: Path, model: ModelConfig) -> _Described:
    tower = Path(model.vision_tower.path)
    if tower.resolve() == directory.resolve():
        raise ModelError(
            f"{directory} is in the authors' layout, which does not hold its tower's config (it names "
            f"{config.get('mm_vision_tower')}); choose it, for example model/vision_tower=clip_vit_l_336"
        )
    own = read_json(tower / "config.json")
    tile = model.vision_tower.tile or own.get("vision_config", own).get("image_size")
    pinpoints = config.get("image_grid_pinpoints")
    kind = config.get("mm_projector_type", "linear")
    if kind not in ("linear", "mlp2x_gelu"):
        raise ModelError(f"{directory}: mm_projector_type={kind} is no projector of ours; there are linear, mlp2x_gelu")
    # Their pinpoints are (width, height).
    swapped = [list(reversed(pinpoint)) for pinpoint in pinpoints] if isinstance(pinpoints, list) else None
    return _Described(
        _grids(swapped, tile, directory) if swapped and tile else None,
        kind,
        int(config.get("mm_vision_select_layer", -2)),
    )


def _grids(pinpoints_hw: list[list[int]], tile: int, directory: Path) -> tuple[Grid, ...]:
    for height, width in pinpoints_hw:
        if height % tile or width % tile:
            raise ModelError(
                f"{directory}: image_grid_pinpoints holds {[height, width]}, no multiple of the tower's tile of {tile} "
                "pixels: another tower than it was made for"
            )
    return tuple((height // tile, width // tile) for height, width in pinpoints_hw)
