"""A user's folder of YAML files, `--config-dir`: its files take precedence over shipped ones of the same name, in every
program, and one line says so."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_recipes.schema.config_dir import CONFIG_DIR
from train import __main__ as program
from train.config import compose
from train.config.schema import ConfigError
from train.plan import sample_lengths

LINE = ["experiment=quickstart", "stage=align", "name=x", "engine=zero2"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a file of a shipped name, and one of another name; its path has odd characters."""
    folder = tmp_path / "it's [my] folder, 1"
    for name, size in (("zero2", 1234567), ("other", 7654321)):
        path = folder / "engine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"zero_optimization: {{stage: 2, reduce_bucket_size: {size}}}\n")
    compose.announce_replaced.cache_clear()
    return folder


def bucket(config: Any) -> int:
    """The value by which the files differ."""
    size: int = config.engine["zero_optimization"]["reduce_bucket_size"]
    return size


def test_own_file_replaces_the_shipped_one(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the programs beside training; the shipped files of other names are still there."""
    for _ in range(2):
        assert bucket(compose.load(LINE, str(mine), folders=False)) == 1234567
    assert bucket(compose.load([*LINE, "engine=other"], str(mine), folders=False)) == 7654321
    assert compose.load([*LINE, "engine=zero3"], str(mine), folders=False).engine["zero_optimization"]["stage"] == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(mine) in lines[0]
    assert "engine/zero2.yaml" in lines[0]
    assert "other" not in lines[0].removeprefix(f"--config-dir {mine}")
    shipped = compose.load(LINE, folders=False)
    assert shipped.engine["zero_optimization"].get("reduce_bucket_size") != 1234567


@pytest.mark.parametrize("form", ["--config-dir VALUE", "--config-dir=VALUE", "-cd VALUE"])
@pytest.mark.parametrize("is_main", [True, False])
def test_training_does_the_same(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str, is_main: bool
) -> None:
    """Only the first rank prints the line, and the arguments of the process are unchanged."""
    words = [word.replace("VALUE", str(mine)) for word in form.split()]
    arguments = ["train", *LINE[:2], *words, *LINE[2:]]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(program, "check", partial(compose.check, folders=False))
    config = program.compose(is_main=is_main)
    assert config is not None
    assert bucket(config) == 1234567
    assert "recipe quickstart_align.yaml" in str(config.recipe)
    assert ("engine/zero2.yaml" in capsys.readouterr().err) == is_main
    assert sys.argv == arguments


@pytest.mark.parametrize("value", ["/no/such/folder", ""])
def test_missing_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """For training; the other programs take an empty value for none."""
    monkeypatch.setattr(sys, "argv", ["train", *LINE, f"--config-dir={value}"])
    with pytest.raises(ConfigError, match=r"--config-dir: there is no folder"):
        program.compose()


def test_sources_of_a_plan_are_the_users(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner reads the counts of sources from the user's folder first."""
    config: Any = SimpleNamespace(data=SimpleNamespace(store_root=str(mine)), mixture=SimpleNamespace(sources={"a": 0}))
    folders: list[Path] = []
    monkeypatch.setattr(sample_lengths, "draw_published", lambda *_: None)

    def count(_: object, given: list[Path]) -> int:
        folders.extend(given)
        return 1

    monkeypatch.setattr(sample_lengths, "count_samples", count)
    nothing: Any = None
    sample_lengths.load_population(config, nothing, config_dir=str(mine))
    assert folders == [mine, CONFIG_DIR]


def test_shipped_files_are_found_from_any_folder() -> None:
    """Beside the package, not in the current folder."""
    assert CONFIG_DIR.is_absolute()
    assert Path(__file__).resolve().parents[3] / "configs" == CONFIG_DIR
