"""Reads the settings of a complete model from its directory: layout, language model, grids and image statistics.

Only config.json and the image processor's file are read, and torch is not imported, so that a run's configuration can
be completed quickly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llava_next.config import (
    IMAGE_PROCESSOR_FILES,
    Grid,
    ModelConfig,
    ModelError,
    ProjectorKind,
    StockClass,
    VisionTowerConfig,
)
from llava_next.file_access import permission_problem
from llava_next.inputs.anyres import grids_from_pinpoints

ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
"""Classes of the authors' code and SGLang, by the language model's model_type."""

PROJECTOR_ACTS: dict[ProjectorKind, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""`projector_hidden_act` of each kind of projector.

transformers' projector always has two linear layers. A linear projector is stored with a linear activation and the
identity as second layer (see `hugging_face.py`). vLLM does not support this activation.
"""

HF_MODEL_TYPES = get_args(StockClass)
"""model_type of the supported models in the Hugging Face layout."""


@dataclass(frozen=True)
class _CheckpointSettings:
    """Settings of a complete model; None if the directory does not contain them."""

    grids: tuple[Grid, ...] | None
    projector: ProjectorKind
    feature_layer: object


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the authors' layout, whose model_type can also be `llava`."""
    architectures = config.get("architectures") or []
    return "mm_vision_tower" in config or any(name in ARCHITECTURES.values() for name in architectures)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns an empty dictionary if the file does not exist.

    Raises:
        ModelError: the file cannot be read or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(permission_problem(path) or f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not contain a JSON object")
    return content


def language_model_config_values(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Extracts the language model's config, with its `model_type`, from a config.json in the authors' layout.

    Args:
        config: the contents of config.json.
        source: for the message.

    Raises:
        ModelError: the class is not one of `ARCHITECTURES`.
    """
    names = config.get("architectures") or []
    kinds = [kind for kind, name in ARCHITECTURES.items() if name in names]
    if not kinds:
        raise ModelError(
            f"{source}: architectures={names} is not supported; supported classes of the authors are "
            f"{', '.join(ARCHITECTURES.values())}"
        )
    return {
        key: value
        for key, value in config.items()
        if not key.startswith(("mm_", "image_", "unfreeze_", "tune_", "freeze_", "tokenizer_", "use_mm_"))
        and key not in ("architectures", "model_type")
    } | {"model_type": kinds[0]}


def settings_from_checkpoint(model: ModelConfig, directory: Path) -> ModelConfig:
    """Replaces grids, projector, feature layer and image statistics of `model` by those of a complete model.

    Args:
        model: the configuration, which names the parts.
        directory: of the complete model that the weights come from.

    Raises:
        ModelError: the directory does not contain a supported model, its files disagree, or its tower is not
            configured.
    """
    config = read_json(directory / "config.json")
    if not config:
        raise ModelError(
            f"{directory} has no config.json; give the directory of a complete model in the Hugging Face layout or the "
            "authors'"
        )
    settings = _original_settings(config, directory, model) if is_original(config) else _hf_settings(config, directory)
    tower = model.vision_tower
    if isinstance(settings.feature_layer, int):  # other values are an error in load_weights.py
        tower = replace(tower, feature_layer=settings.feature_layer)
    statistics = read_image_statistics(directory)
    if statistics is not None:
        tower = replace(tower, image_mean=statistics[0], image_std=statistics[1])
    elif not is_original(config):  # in the authors' layout the configured tower's statistics are used
        raise ModelError(
            f"{directory}: neither {' nor '.join(IMAGE_PROCESSOR_FILES)} has image_mean and image_std, by which images "
            "are normalized for the tower; add the file that the model was published with"
        )
    grids = settings.grids or model.grids
    return replace(model, vision_tower=tower, grids=grids, projector=settings.projector)


Color = tuple[float, float, float]
"""Values of red, green and blue."""


def read_image_statistics(directory: Path) -> tuple[Color, Color] | None:
    """Mean and standard deviation by which a model normalizes pixels in [0, 1]; None if no file contains them.

    Args:
        directory: of a model or a tower.

    Raises:
        ModelError: two files disagree, a value is not three numbers, or pixels are scaled in another way.
    """
    statistics: dict[str, tuple[Color, Color]] = {}
    for name in IMAGE_PROCESSOR_FILES:
        values = read_json(directory / name)
        values = values.get("image_processor", values)
        if "image_mean" in values and "image_std" in values:
            statistics[name] = _parse_statistics(values, directory / name)
    if len(set(statistics.values())) > 1:
        differing = ", ".join(f"{name} has {list(mean)} and {list(std)}" for name, (mean, std) in statistics.items())
        raise ModelError(
            f"{directory}: image_mean and image_std differ between files: {differing}; correct one of them"
        )
    return next(iter(statistics.values()), None)


def _parse_statistics(values: Mapping[str, Any], path: Path) -> tuple[Color, Color]:
    colors = []
    for key in ("image_mean", "image_std"):
        value = values[key]
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)):
            raise ModelError(f"{path}: {key} must be three numbers, got {value!r}")
        red, green, blue = map(float, value)
        colors.append((red, green, blue))
    scale = values.get("rescale_factor", 1 / 255)
    if not values.get("do_normalize", True) or not values.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-3:
        raise ModelError(
            f"{path}: do_rescale={values.get('do_rescale', True)}, rescale_factor={scale}, do_normalize="
            f"{values.get('do_normalize', True)} are not supported; use a tower whose pixels are scaled to [0, 1] and "
            "normalized"
        )
    return colors[0], colors[1]


def check_image_statistics(tower: VisionTowerConfig) -> None:
    """Raises ModelError if a tower's configured image statistics differ from those in its directory."""
    published = read_image_statistics(Path(tower.path))
    configured = (tower.image_mean, tower.image_std)
    if published is None or np.allclose(configured, published, rtol=0, atol=1e-6):
        return
    keys = ("image_mean", "image_std")
    overrides = [f"'model.vision_tower.{key}={list(values)}'" for key, values in zip(keys, published, strict=True)]
    raise ModelError(
        f"model.vision_tower has image_mean={list(configured[0])} and image_std={list(configured[1])}, but the image "
        f"processor in {tower.path} has other values; set {' '.join(overrides)}"
    )


def projector_kind(config: Mapping[str, Any], source: Path) -> ProjectorKind:
    """The kind of projector in a Hugging Face config; raises ModelError if it is not supported."""
    act = config.get("projector_hidden_act", "gelu")
    for kind, kind_act in PROJECTOR_ACTS.items():
        if act == kind_act:
            return kind
    raise ModelError(
        f"{source}: projector_hidden_act={act} is not supported; supported are "
        + ", ".join(f"{kind_act} ({kind})" for kind, kind_act in PROJECTOR_ACTS.items())
    )


def original_projector_kind(config: Mapping[str, Any], source: Path) -> ProjectorKind:
    """The kind of projector in an authors' config; raises ModelError if it is not supported."""
    name = config.get("mm_projector_type", "linear")
    for kind in PROJECTOR_ACTS:
        if name == kind:
            return kind
    raise ModelError(f"{source}: mm_projector_type={name} is not supported; supported are {', '.join(PROJECTOR_ACTS)}")


def _hf_settings(config: Mapping[str, Any], directory: Path) -> _CheckpointSettings:
    if config.get("model_type") not in HF_MODEL_TYPES:
        raise ModelError(
            f"{directory} has model_type {config.get('model_type')}, which is not a LLaVA; set "
            "model.language_model.path for a language model without a tower"
        )
    tile = config.get("vision_config", {}).get("image_size", 336)
    pinpoints = config.get("image_grid_pinpoints") if config["model_type"] != "llava" else None
    return _CheckpointSettings(
        grids_from_pinpoints(pinpoints, tile) if isinstance(pinpoints, list) and pinpoints else None,
        projector_kind(config, directory),
        config.get("vision_feature_layer"),
    )


def _original_settings(config: Mapping[str, Any], directory: Path, model: ModelConfig) -> _CheckpointSettings:
    tower = Path(model.vision_tower.path)
    if tower.resolve() == directory.resolve():
        raise ModelError(
            f"{directory} is in the authors' layout, which does not contain the config of the tower "
            f"{config.get('mm_vision_tower')}; choose the tower, for example model/vision_tower=clip_vit_l_336"
        )
    values = read_json(tower / "config.json")
    tile = model.vision_tower.tile or values.get("vision_config", values).get("image_size")
    pinpoints = config.get("image_grid_pinpoints")
    grids = None
    if tile and isinstance(pinpoints, list) and pinpoints:
        grids = grids_from_pinpoints([pinpoint[::-1] for pinpoint in pinpoints], tile)  # (width, height)
    return _CheckpointSettings(grids, original_projector_kind(config, directory), config.get("mm_vision_select_layer"))
