"""Command line and YAML → a checked `RunConfig`, and back into the YAML of a run's folder.

Owns composing (Hydra), types (pydantic), and what is taken over from a model in stage.init_from. The rules are in
rules.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava_next.config import ModelError
from llava_next.model.released import settings_from_checkpoint
from train.config.error_messages import explain_composition, explain_invalid
from train.config.rules import check_folders, check_installed, check_values
from train.config.schema import CONFIG_DIR, ConfigError, RunConfig


def load(overrides: Sequence[str] = (), config_dir: str | None = None, *, folders: bool = True) -> RunConfig:
    """Composes and checks a configuration as the command line does.

    Args:
        overrides: as on the command line, for example ["experiment=quickstart", "stage=align"].
        config_dir: a folder of further YAML files.
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: with one sentence.
    """
    return check(composed_from(overrides, config_dir), folders=folders)


def composed_from(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """What `load` checks, as Hydra composes it.

    Raises:
        ConfigError: with one sentence.
    """
    GlobalHydra.instance().clear()
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("train", overrides=[*overrides, *searchpath])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(str(error))) from error


def load_yaml(path: Path) -> RunConfig:
    """The configuration that a run wrote into its folder.

    Raises:
        ConfigError: there is no such file, or it was written by an incompatible version.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is no run folder: it holds no {path.name}; name the folder of a stage")
    composed = OmegaConf.load(path)
    assert isinstance(composed, DictConfig)
    return check(composed, folders=False)


def check(composed: DictConfig, *, folders: bool = True) -> RunConfig:
    """The frozen configuration, or the first of its mistakes.

    Args:
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: with the key, the rule, the value and the way out.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(str(error))) from error
    assert isinstance(plain, dict)
    for choice in ("hydra", "experiment"):
        plain.pop(choice, None)
    if isinstance(plain.get("mixture"), dict):  # as data_recipes.prepare reads the same file
        mixture = plain["mixture"]
        mixture.setdefault("seed", 0)
        if isinstance(mixture.get("sources"), dict):
            mixture["sources"] = {name: share or {} for name, share in mixture["sources"].items()}
    _check_origin(plain)
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(plain)
    except pydantic.ValidationError as error:
        raise ConfigError(explain_invalid(error, RunConfig)) from error
    config = _adopted(config)
    check_values(config)
    if folders:
        check_folders(config)
        check_installed(config)
    return config


def _check_origin(plain: dict[Any, Any]) -> None:
    """Before the types are checked: the paths of a model that lies in stage.init_from are null where that is."""
    parts = [part for part in (plain.get("model") or {}).values() if isinstance(part, dict)]
    if any(part.get("weights") == "init_from" for part in parts) and not (plain.get("stage") or {}).get("init_from"):
        raise ConfigError(
            "stage.init_from has no value, and the model is to be the one that lies there; name the directory of a "
            "whole model, in Hugging Face's layout or the authors'"
        )


def _adopted(config: RunConfig) -> RunConfig:
    """Where the weights are those of a whole model in stage.init_from, grids and the like are its own, too."""
    model, start = config.model, config.stage.init_from
    if "init_from" not in (model.language_model.weights, model.vision_tower.weights):
        return config
    if (
        start is None or not Path(start).is_dir()
    ):  # told by `_check_folders`; a run's own config.yaml has what was there
        return config
    try:
        return replace(config, model=settings_from_checkpoint(model, Path(start)))
    except ModelError as error:
        raise ConfigError(f"stage.init_from: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, readable by `load_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(pydantic.TypeAdapter(RunConfig).dump_python(config, mode="json")))


def explain(text: str) -> str:
    """Hydra's and OmegaConf's messages as one sentence with the key and the way out."""
    return explain_composition(text, RunConfig)
