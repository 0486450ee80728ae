"""docs/configuration.md lists every key of a run's configuration, and no other."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from tests.house.pages import DOCS
from train.config.schema import RunConfig, StageConfig

DESCRIBED_ELSEWHERE = {"mixture", "engine", "model", "recipe", "stage.name"}
"""Groups that have pages of their own, what the program writes itself, and the name of a stage's file."""


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration's dataclass."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        name = prefix + field.name
        if name in DESCRIBED_ELSEWHERE:
            continue
        if is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{name}.")
        else:
            yield name


def test_every_key_is_described() -> None:
    """In the first column of a table, in backquotes."""
    rows = re.findall(r"^\| (`[^|]+) \|", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    described = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert StageConfig in get_type_hints(RunConfig).values()
    assert sorted(set(keys(RunConfig)) - described) == []
    groups = {
        "model/language_model",
        "model/vision_tower",
        "stage",
        "mixture",
        "recipe",
        "experiment",
        "hardware",
        "engine",
    }
    assert sorted(described - set(keys(RunConfig)) - groups - {"model.grids", "model.projector"}) == []
