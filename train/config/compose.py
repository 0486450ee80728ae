"""Command line and YAML → a checked `RunConfig`, and back to the YAML of a run's folder.

Hydra composes, pydantic checks types, `rules.py` checks values. Settings of a whole model in stage.init_from are read
from its directory.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pydantic
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_recipes.schema.config_dir import CONFIG_DIR, describe_replaced
from data_recipes.schema.console import describe_os_error
from llava_next.cache_root import cache_root
from llava_next.config import ModelError
from llava_next.model.checkpoint_config import settings_from_checkpoint
from llava_next.model_directory import find_model_directory
from train.config.error_messages import explain_composition, explain_invalid
from train.config.exit_codes import describe_denied
from train.config.removed_keys import upgraded, with_views, with_views_overrides
from train.config.rules import check_folders, check_installed, check_values
from train.config.schema import ConfigError, RunConfig

# `${llava_next.cache_root:}` in the YAML files of models that the quickstart fetches.
OmegaConf.register_new_resolver("llava_next.cache_root", lambda: str(cache_root()), replace=True)

_PATH_KEYS = {
    "root": False,
    "data.store_root": False,
    "data.local_dir": True,
    "stage.init_from": True,
    "model.language_model.path": False,
    "model.language_model.tokenizer": True,
    "model.vision_tower.path": False,
}
"""Keys whose values are paths, and whether null is allowed."""


def load(overrides: Sequence[str] = (), config_dir: str | None = None, *, folders: bool = True) -> RunConfig:
    """Composes and checks a configuration as the command line does.

    Args:
        overrides: as on the command line, for example ["experiment=quickstart", "stage=align"].
        config_dir: a folder of further YAML files, which take precedence over the shipped ones.
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
    drop_empty_variables()
    overrides = with_views_overrides(overrides)
    try:
        if config_dir is None:
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                return compose("train", overrides=[*overrides])
        first = check_config_dir(config_dir)
        announce_replaced(first)
        # Hydra searches its main folder first, and only there for the primary file, so that folder has no other file.
        with TemporaryDirectory() as main:
            shutil.copyfile(next(filter(Path.is_file, (first / _PRIMARY, CONFIG_DIR / _PRIMARY))), Path(main, _PRIMARY))
            with initialize_config_dir(main, version_base="1.3"):
                return compose("train", overrides=[*overrides, _searchpath(first, CONFIG_DIR)])
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"a YAML file cannot be read: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(str(error), overrides)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(explain(str(error), overrides)) from error


def drop_empty_variables() -> None:
    """Unsets LLAVA_NEXT_ variables that are empty: the defaults hold, as in a shell's ${NAME:-DEFAULT}."""
    for name in ("LLAVA_NEXT_STORES", "LLAVA_NEXT_MODELS", "LLAVA_NEXT_CACHE"):
        if not os.environ.get(name, "set").strip():
            del os.environ[name]


def check_config_dir(config_dir: str) -> Path:
    """Returns the absolute path of a user's folder of YAML files; raises ConfigError if there is no such folder."""
    path = Path(config_dir).resolve()
    if not config_dir or not path.is_dir():
        named = path if config_dir else "''"
        raise ConfigError(f"--config-dir: there is no folder {named}; name the folder that has your YAML files")
    return path


_PRIMARY = "train.yaml"


def _searchpath(*folders: Path) -> str:
    """The override that adds folders after the main one, quoted for Hydra's grammar."""
    escaped = (str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in folders)
    paths = ",".join(f"'file://{path}'" for path in escaped)
    return f"hydra.searchpath=[{paths}]"


@cache
def announce_replaced(config_dir: Path) -> None:
    """Prints, once in a process, which shipped YAML files a user's folder replaces."""
    replaced = describe_replaced(config_dir)
    if replaced:
        print(replaced, file=sys.stderr, flush=True)


def load_yaml(path: Path) -> RunConfig:
    """The configuration that a run wrote into its folder, also one of an earlier version (`removed_keys.py`).

    Raises:
        ConfigError: there is no such file, or a key or value is not valid.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a run folder: it has no {path.name}; name the folder of a stage")
    try:
        values = read_written(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return check(OmegaConf.create(values), folders=False)


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
    if isinstance(plain.get("stage"), dict):
        plain["stage"] = with_views(plain["stage"])
    _check_origin(plain)
    _expand_paths(plain)
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(plain)
    except pydantic.ValidationError as error:
        raise ConfigError(explain_invalid(error, RunConfig)) from error
    try:
        config = _with_checkpoint_settings(_with_found_directories(config))
        check_values(config)
        if folders:
            check_folders(config)
            check_installed(config)
    except PermissionError as error:
        raise ConfigError(describe_denied(error)) from error
    except OSError as error:  # for example a name that is too long
        raise ConfigError(f"{describe_os_error(error)}; correct the path") from error
    return config


def _expand_paths(plain: dict[Any, Any]) -> None:
    """Replaces ~ in paths, which a shell does not expand behind KEY=.

    Raises:
        ConfigError: a path is empty.
    """
    for key, optional in _PATH_KEYS.items():
        *groups, last = key.split(".")
        section: Any = plain
        for group in groups:
            section = section.get(group) if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(section.get(last), str):
            continue
        if not section[last].strip():
            raise ConfigError(f"{key} is empty; name a folder" + (", or set it to null" if optional else ""))
        if section[last].startswith("~"):
            try:
                section[last] = str(Path(section[last]).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{key}={section[last]}: there is no home folder of that user") from error


def _check_origin(plain: dict[Any, Any]) -> None:
    """Checked before types: without stage.init_from, the paths of a model that is read from there are null."""
    parts = [part for part in (plain.get("model") or {}).values() if isinstance(part, dict)]
    if any(part.get("weights") == "init_from" for part in parts) and not (plain.get("stage") or {}).get("init_from"):
        raise ConfigError(
            "stage.init_from has no value, and the model is read from there; name the directory of a whole model, in "
            "Hugging Face's layout or the authors'"
        )


def _with_found_directories(config: RunConfig) -> RunConfig:
    """Replaces ids of models on the hub by their directories on this machine; an id that is not found stays."""
    language_model, tower, start = config.model.language_model, config.model.vision_tower, config.stage.init_from
    tokenizer = language_model.tokenizer
    language_model = replace(
        language_model,
        path=find_model_directory(language_model.path),
        tokenizer=None if tokenizer is None else find_model_directory(tokenizer),
    )
    tower = replace(tower, path=find_model_directory(tower.path))
    return replace(
        config,
        model=replace(config.model, language_model=language_model, vision_tower=tower),
        stage=replace(config.stage, init_from=None if start is None else find_model_directory(start)),
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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration as a run records it: programs that read it may start in another working directory.

    `root` is left as it is, since a run is read from the folder in which its config.yaml is.
    """
    language_model, tower = config.model.language_model, config.model.vision_tower
    return replace(
        config,
        model=replace(
            config.model,
            language_model=replace(
                language_model,
                path=str(Path(language_model.path).absolute()),
                tokenizer=_absolute(language_model.tokenizer),
            ),
            vision_tower=replace(tower, path=str(Path(tower.path).absolute())),
        ),
        stage=replace(config.stage, init_from=_absolute(config.stage.init_from)),
        data=replace(
            config.data,
            store_root=str(Path(config.data.store_root).absolute()),
            local_dir=_absolute(config.data.local_dir),
        ),
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def explain(text: str, overrides: Sequence[str] = ()) -> str:
    """Hydra's or OmegaConf's message as one sentence with the key and the fix.

    Args:
        text: the message.
        overrides: of the command line, to name the one that cannot be parsed.
    """
    return explain_composition(text, RunConfig, overrides)
