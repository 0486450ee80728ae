"""What a directory of a whole model says of itself: its layout, its language model, and how it cuts pictures.

Reads config.json and the image processor's file alone, without torch, so that a configuration can be made of them in a
fraction of a second. Weights are `load.py`'s; the authors' layout is written by `original.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_next.config import Grid, ModelConfig, ModelError, ProjectorKind, VisionTowerConfig
from llava_next.inputs.anyres import grids_of_pinpoints

ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
"""By the language model's type: what the authors' code and SGLang have a class for."""

PROJECTOR_ACTS: dict[ProjectorKind, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""`projector_hidden_act` of transformers' config, which always has two linear layers around it: a linear projector is
written as its layer, the identity for an activation, and the identity for a second layer (see `hugging_face.py`). vLLM
knows no activation of that name, so such an export is for transformers."""

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


def settings_from_checkpoint(model: ModelConfig, directory: Path) -> ModelConfig:
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
    statistics = image_statistics(directory)
    if statistics is not None:
        tower = replace(tower, image_mean=statistics[0], image_std=statistics[1])
    elif not is_original(config):  # that layout names its tower, whose own values are taken
        raise ModelError(
            f"{directory}: neither {' nor '.join(_IMAGE_FILES)} has image_mean and image_std, so how images are "
            "normalized for the tower is not known; add the file that the model was published with"
        )
    grids = described.grids or model.grids
    return replace(model, vision_tower=tower, grids=grids, projector=described.projector)


_IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where transformers 5 and older versions describe the image processor of a directory."""

Colour = tuple[float, float, float]


def image_statistics(directory: Path) -> tuple[Colour, Colour] | None:
    """Mean and standard deviation of the images that a directory's model was trained on, for pixels in [0, 1]; None
    where no file has them.

    Raises:
        ModelError: two files disagree; other than three values each; pixels that are scaled in another way.
    """
    found: dict[str, tuple[Colour, Colour]] = {}
    for name in _IMAGE_FILES:
        values = read_json(directory / name)
        values = values.get("image_processor", values)
        if "image_mean" in values and "image_std" in values:
            found[name] = _statistics(values, directory / name)
    if len(set(found.values())) > 1:
        differing = ", ".join(f"{name} has {list(mean)} and {list(std)}" for name, (mean, std) in found.items())
        raise ModelError(f"{directory}: image_mean and image_std are not the same in both files: {differing}; fix one")
    return next(iter(found.values()), None)


def _statistics(values: Mapping[str, Any], place: Path) -> tuple[Colour, Colour]:
    colours = []
    for key in ("image_mean", "image_std"):
        value = values[key]
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)):
            raise ModelError(f"{place}: {key} must be three numbers, got {value!r}")
        red, green, blue = map(float, value)
        colours.append((red, green, blue))
    scale = values.get("rescale_factor", 1 / 255)
    if not values.get("do_normalize", True) or not values.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-3:
        raise ModelError(
            f"{place}: pixels are not scaled to [0, 1] and normalized (do_rescale={values.get('do_rescale', True)}, "
            f"rescale_factor={scale}, do_normalize={values.get('do_normalize', True)}), which the tower of this model "
            "needs; only such towers are supported"
        )
    return colours[0], colours[1]


def check_image_statistics(tower: VisionTowerConfig) -> None:
    """Raises ModelError where a tower's configuration says other image statistics than the tower's own directory."""
    published = image_statistics(Path(tower.path))
    configured = (tower.image_mean, tower.image_std)
    if published is None or np.allclose(configured, published, rtol=0, atol=1e-6):
        return
    keys = ("image_mean", "image_std")
    overrides = [f"'model.vision_tower.{key}={list(values)}'" for key, values in zip(keys, published, strict=True)]
    raise ModelError(
        f"model.vision_tower has image_mean={list(configured[0])} and image_std={list(configured[1])}, and the image "
        f"processor in {tower.path}, by which the tower was trained, has others; set {' '.join(overrides)}"
    )


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
