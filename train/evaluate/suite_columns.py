"""Reads the columns of a results table from `configs/suite/*.yaml`: tasks of lmms-eval and published values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import yaml

from data_recipes.schema.config_dir import CONFIG_DIR
from llava_next.model_directory import get_model_name
from train.config.compose import load_yaml
from train.config.schema import ConfigError

SUITE_DIR = CONFIG_DIR / "suite"


@dataclass(frozen=True)
class Column:
    """A column of the table. The YAML file explains its keys."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    title: str
    task: str
    metrics: tuple[str, ...]
    data: str
    split: str
    scale: float = 1.0
    token: bool = False
    needs: Literal["", "judge", "submission"] = ""
    judge_url: Literal["", "base", "endpoint"] = ""
    judge_failure: str = ""
    server: str = ""
    note: str = ""


@dataclass(frozen=True)
class PublishedModel:
    """The published values of a model, by column; `released` is the name of its converted weights on the hub."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    title: str
    released: str
    values: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Suite:
    """A results table.

    Attributes:
        name: of its file.
        title: what it is the table of.
        lmms_eval: the version that has these tasks.
        source: of the published values.
        published: models by the name of their language model in configs/model/language_model.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    title: str
    lmms_eval: str
    source: str
    columns: dict[str, Column]
    published: dict[str, PublishedModel] = field(default_factory=dict)


def read_suite(name: str) -> Suite:
    """Reads `configs/suite/NAME.yaml`.

    Raises:
        ConfigError: there is no such file, or a value is invalid; the message has the key, the rule and the value.
    """
    path = SUITE_DIR / f"{name}.yaml"
    available = ", ".join(sorted(each.stem for each in SUITE_DIR.glob("*.yaml")))
    if Path(name).name != name or not path.is_file():
        raise ConfigError(f"--suite {name}: there is no such table; available: {available}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = pydantic.TypeAdapter(Suite).validate_python({"name": name, **values})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {key}: {first['msg'].lower()}, got {first['input']!r}") from error
    for model, row in suite.published.items():
        for column, published in row.values.items():
            if column not in suite.columns:
                raise ConfigError(f"{path}: published.{model}.values.{column}: there is no such column")
            if len(published) != len(suite.columns[column].metrics):
                raise ConfigError(f"{path}: published.{model}.values.{column}: needs one value for each metric")
    return suite


def select_columns(suite: Suite, text: str | None) -> dict[str, Column]:
    """Returns the columns of `--columns`, in the order of the table; all without it.

    Raises:
        ConfigError: the table has no such column.
    """
    if text is None:
        return suite.columns
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in suite.columns]
    if unknown or not names:
        what = f"the table has no column {unknown[0]}" if unknown else "no column is named"
        raise ConfigError(f"--columns {text}: {what}; it has {', '.join(suite.columns)}")
    return {name: column for name, column in suite.columns.items() if name in names}


def select_published(suite: Suite, export: Path, chosen: str | None) -> str:
    """Returns the name of the published model that a model is compared with; empty if there is none.

    It is the chosen one, else the one that was released under the directory's name, else the one with the language
    model of the run whose export the directory is.

    Raises:
        ConfigError: the chosen one does not exist.
    """
    if chosen is not None:
        if chosen not in (*suite.published, "none"):
            known = ", ".join((*suite.published, "none"))
            raise ConfigError(f"--published {chosen}: the table has no such model; it has {known}")
        return "" if chosen == "none" else chosen
    released = {model.released: name for name, model in suite.published.items()}
    if get_model_name(export) in released:
        return released[get_model_name(export)]
    config = export.parent / "config.yaml"
    if export.name == "export" and config.is_file():
        name = load_yaml(config).model.language_model.name
        return name if name in suite.published else ""
    return ""


def describe_columns(suite: Suite) -> str:
    """Returns the columns and the published values as two tables in Markdown, which docs/evaluation.md has."""
    tasks = []
    for name, column in suite.columns.items():
        needs = ", ".join(filter(None, (column.needs, "token" if column.token else "")))
        metrics = ", ".join(f"`{metric}`" for metric in column.metrics)
        tasks.append((f"`{name}`", f"`{column.task}`", metrics, f"{column.data}, {column.split}", needs, column.note))
    published = [
        (f"{column.title}", *(_format_values(model.values.get(name, ())) for model in suite.published.values()))
        for name, column in suite.columns.items()
    ]
    head = ("column", "task of lmms-eval", "metric", "data, split", "needs", "differs from the published measurement")
    titles = ("published", *(model.title for model in suite.published.values()))
    return "\n\n".join(_format_table(*table) for table in ((head, tasks), (titles, published)))


def _format_values(values: Sequence[float]) -> str:
    return " / ".join(format(value, "g") for value in values)


def _format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]  # without the spaces that line columns up, which would be long lines
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
