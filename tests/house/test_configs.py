"""Tests that every file in configs/ can be parsed and every choice composes and validates.

The meaning of the values is tested with the code that reads them.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.config.compose import load
from train.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# Groups that a run selects with `group=choice`. recipe/ follows from model and stage; hardware/ is used by the planner.
GROUPS = ("model/language_model", "model/vision_tower", "stage", "mixture", "engine")


def choices(group: str) -> list[str]:
    """Return the names of the YAML files of a config group. Files in its folders are variants, see test_recipes.py."""
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml") if p.stem != "released")  # tests/train/test_tune.py


def yaml_files() -> list[str]:
    """Return every YAML file of configs/, as relative paths."""
    return sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.y*ml"))


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in a parsed YAML value, with its full key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from strings(inner, f"{key}[{index}]")
    elif isinstance(value, str):
        yield key, value


def is_number(text: str) -> bool:
    """Return whether a string could be a number that YAML did not recognize (`1e-3`)."""
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in {"nan", "inf", "infinity"}


def compose(*overrides: str) -> RunConfig:
    """Compose and validate a configuration, without checking that its folders exist."""
    return load(["name=test", *overrides], folders=False)


@pytest.mark.parametrize("path", yaml_files())
def test_yaml_parses_and_numbers_are_numbers(path: str) -> None:
    """PyYAML parses the file, and no number is a string: write 1.0e-3, not 1e-3."""
    value = yaml.safe_load((CONFIGS / path).read_text())
    assert [f"{key}: {text}" for key, text in strings(value) if is_number(text)] == []


@pytest.mark.parametrize("stage", choices("stage"))
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiment_composes_in_every_stage(experiment: str, stage: str) -> None:
    """Every experiment supports both stages."""
    required: tuple[str, ...] = ()  # by this experiment
    if experiment in ("tune", "tune_lora"):
        required = ("stage.init_from=DIR", "mixture=quickstart_finetune")
    elif experiment.startswith(("interleave_", "onevision_")):  # the mixture depends on the stage
        required = ("mixture=quickstart_finetune",)
    if experiment == "tune_lora" and stage == "align":
        required += ("lora=null",)  # adapters are merged into an export, and a connector has no place for them
    config = compose(f"experiment={experiment}", f"stage={stage}", *required)
    assert config.stage.name == stage


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)])
def test_choice_composes(group: str, choice: str) -> None:
    """Every choice of every group composes with the defaults of the other groups."""
    mixture = () if group == "mixture" else ("mixture=quickstart_finetune",)
    compose(f"{group}={choice}", *mixture)


@pytest.mark.parametrize("stage", choices("stage"))
@pytest.mark.parametrize(
    ("language_model", "tower"),
    [
        pytest.param(*pair, marks=() if pair[0] == "vicuna_7b" or pair[1] == "clip_vit_l_336" else pytest.mark.full)
        for pair in product(choices("model/language_model"), choices("model/vision_tower"))
    ],
)
def test_backbones_swap(language_model: str, tower: str, stage: str) -> None:
    """Every pair of language model and tower can be selected on the command line, in either stage."""
    parts = (f"model/language_model={language_model}", f"model/vision_tower={tower}")
    compose(*parts, f"stage={stage}", "mixture=quickstart_finetune")


@pytest.mark.parametrize("mixture", choices("mixture"))
def test_mixture_names_known_sources(mixture: str) -> None:
    """Every source of a mixture has a file."""
    sources = yaml.safe_load((CONFIGS / "mixture" / f"{mixture}.yaml").read_text())["sources"]
    assert sources
    assert sorted(set(sources) - set(choices("source"))) == []


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_recipe_belongs_to_a_model_and_a_stage(recipe: str) -> None:
    """A recipe has a name <language_model>_<stage>, by which runs find it."""
    known = {f"{model}_{stage}" for model in choices("model/language_model") for stage in choices("stage")}
    assert recipe in known
