"""Command line and YAML → a checked `RunConfig`, and back to the YAML of a run's folder.

Hydra composes, pydantic checks types, `rules.py` checks values. Settings of a whole model in stage.init_from are read
from its directory.
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

from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.config import ModelError
from llava_next.model.checkpoint_config import settings_from_checkpoint
from train.config.error_messages import explain_composition, explain_invalid
from train.config.removed_keys import upgraded
from train.config.rules import check_folders, check_installed, check_values
from train.config.schema import ConfigError, RunConfig


def load(overrides: Sequence[str] = (), config_dir: str | None = None, *, folders: bool = True) -> RunConfig:
    """Composes and checks a configuration as the command line does.

    Args:
        overrides: as on the command line, for example ["experiment=quickstart", "stage=align"].
        config_dir: a folder of further YAML files.
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: with one sentence.
    """
    return check(compose_overrides(overrides, config_dir), folders=folders)


def compose_overrides(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """The configuration as Hydra composes it, not checked.

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
    """The configuration that a run wrote into its folder, also one of an earlier version (`removed_keys.py`).

    Raises:
        ConfigError: there is no such file, or a key or value is not valid.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a run folder: it has no {path.name}; name the folder of a stage")
    return check(OmegaConf.create(read_written(path)), folders=False)


def read_written(path: Path) -> dict[str, Any]:
    """A config.yaml as plain values, with the keys of this version, not validated.

    Raises:
        ConfigError: the file is not a dictionary.
    """
    values = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not the configuration of a run: it holds no keys")
    return upgraded({str(key): value for key, value in values.items()})


def check(composed: DictConfig, *, folders: bool = True) -> RunConfig:
    """Checks a composed configuration and returns it frozen.

    Args:
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: the first mistake, with the key, the rule, the value and the fix.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(str(error))) from error
    assert isinstance(plain, dict)
    for choice in ("hydra", "experiment"):
        plain.pop(choice, None)
    if isinstance(plain.get("mixture"), dict):  # the defaults with which data_recipes.prepare reads the same file
        mixture = plain["mixture"]
        mixture.setdefault("seed", 0)
        if isinstance(mixture.get("sources"), dict):
            mixture["sources"] = {name: share or {} for name, share in mixture["sources"].items()}
    _check_origin(plain)
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(plain)
    except pydantic.ValidationError as error:
        raise ConfigError(explain_invalid(error, RunConfig)) from error
    config = _with_checkpoint_settings(config)
    check_values(config)
    if folders:
        check_folders(config)
        check_installed(config)
    return config


def _check_origin(plain: dict[Any, Any]) -> None:
    """Checked before types: without stage.init_from, the paths of a model that is read from there are null."""
    parts = [part for part in (plain.get("model") or {}).values() if isinstance(part, dict)]
    if any(part.get("weights") == "init_from" for part in parts) and not (plain.get("stage") or {}).get("init_from"):
        raise ConfigError(
            "stage.init_from has no value, and the model is read from there; name the directory of a whole model, in "
            "Hugging Face's layout or the authors'"
        )


def _with_checkpoint_settings(config: RunConfig) -> RunConfig:
    """Replaces grids and similar settings by those of a whole model in stage.init_from, if its weights are used."""
    model, start = config.model, config.stage.init_from
    if "init_from" not in (model.language_model.weights, model.vision_tower.weights):
        return config
    if start is None or not Path(start).is_dir():
        return config  # `check_folders` reports it; a run's own config.yaml has the settings already
    try:
        return replace(config, model=settings_from_checkpoint(model, Path(start)))
    except ModelError as error:
        raise ConfigError(f"stage.init_from: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, readable by `load_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(pydantic.TypeAdapter(RunConfig).dump_python(config, mode="json")))


def explain(text: str) -> str:
    """Hydra's or OmegaConf's message as one sentence with the key and the fix."""
    return explain_composition(text, RunConfig)
