"""What a directory of a whole model says of itself: its layout, its language model, and how it cuts pictures.

Reads config.json and preprocessor_config.json alone, without torch, so that a configuration can be made of them in a
fraction of a second. Weights are `load.py`'s; the authors' layout is written by `original.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_next.anyres import grids_of_pinpoints
from llava_next.config import Grid, ModelConfig, ModelError, ProjectorKind

ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
"""By the language model's type: what the authors' code and SGLang have a class for."""

PROJECTOR_ACTS: dict[ProjectorKind, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""`projector_hidden_act` of transformers' config, which always has two linear layers around it: a linear projector is
written as its layer, the identity for an activation, and the identity for a second layer (see `hf.py`). vLLM knows no
activation of that name, so such an export is for transformers."""

_HF_TYPES = ("llava_next", "llava")


@dataclass(frozen=True)
class _Described:
    grids: tuple[Grid, ...] | None
    projector: ProjectorKind
    feature_layer: object


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
    tower = model.vision_tower
    if isinstance(described.feature_layer, int):  # else load.py says what it is
        tower = replace(tower, feature_layer=described.feature_layer)
    images = read_json(directory / "preprocessor_config.json")
    if "image_mean" in images and "image_std" in images:
        mean, std = (tuple(float(value) for value in images[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ModelError(f"{directory}/preprocessor_config.json: image_mean and image_std have three values each")
        tower = replace(tower, image_mean=mean, image_std=std)
    grids = described.grids or model.grids
    return replace(model, vision_tower=tower, grids=grids, projector=described.projector)


def projector_kind(config: Mapping[str, Any], source: Path) -> ProjectorKind:
    """The kind of projector that a Hugging Face config describes; ModelError where it is none of ours."""
    act = config.get("projector_hidden_act", "gelu")
    for kind, its_act in PROJECTOR_ACTS.items():
        if act == its_act:
            return kind
    raise ModelError(
        f"{source}: projector_hidden_act={act} is no projector of ours; there are "
        + ", ".join(f"{kind} ({its_act})" for kind, its_act in PROJECTOR_ACTS.items())
    )


def original_kind(config: Mapping[str, Any], source: Path) -> ProjectorKind:
    """The kind of projector that the authors' config names; ModelError where it is none of ours."""
    name = config.get("mm_projector_type", "linear")
    for kind in PROJECTOR_ACTS:
        if name == kind:
            return kind
    raise ModelError(
        f"{source}: mm_projector_type={name} is no projector of ours; there are {', '.join(PROJECTOR_ACTS)}"
    )


def _hugging_face(config: Mapping[str, Any], directory: Path) -> _Described:
    if config.get("model_type") not in _HF_TYPES:
        raise ModelError(
            f"{directory} is of model_type {config.get('model_type')}, which is no LLaVA; a language model alone is "
            "model.language_model.path"
        )
    tile = config.get("vision_config", {}).get("image_size", 336)
    pinpoints = config.get("image_grid_pinpoints") if config["model_type"] == "llava_next" else None
    return _Described(
        grids_of_pinpoints(pinpoints, tile) if isinstance(pinpoints, list) and pinpoints else None,
        projector_kind(config, directory),
        config.get("vision_feature_layer"),
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
    grids = None
    if tile and isinstance(pinpoints, list) and pinpoints:
        grids = grids_of_pinpoints([pinpoint[::-1] for pinpoint in pinpoints], tile)  # theirs are (width, height)
    return _Described(grids, original_kind(config, directory), config.get("mm_vision_select_layer"))
