"""`--config-dir` of the preparation adds a folder to the shipped YAML files, from any current folder."""

from pathlib import Path

import pytest
import yaml

from data_recipes.prepare.__main__ import main
from data_recipes.store.reader import Store
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import write_file


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Raw files, and a user's folder with a mixture, a new source, and one of a shipped name. The current folder is no
    checkout."""
    raw_folders.write_llava(tmp_path / "raw" / "llava")
    for name in ("mine_only", "ai2d"):
        options = {"annotations": "mix.json", "image_root": "images"}
        source = {"reader": "llava_json", "root": "llava", "options": options, "max_reject_share": 1.0}
        write_file(tmp_path / "mine" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    mixture = {"name": "both", "sources": {"mine_only": {"count": 2}, "ai2d": {"count": 2}}}
    write_file(tmp_path / "mine" / "mixture" / "both.yaml", yaml.safe_dump(mixture))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    """Runs the program on the workspace."""
    return main([*arguments, "--raw", "raw", "--stores", "stores", "--workers", "1"])


def test_own_files_are_added_and_take_precedence(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's `ai2d` is read instead of the shipped one, and one line says so."""
    assert run("--mixture", "both", "--config-dir", "mine") == 0
    output = capsys.readouterr().out
    assert "source/ai2d.yaml" in output.splitlines()[0]
    assert "mine_only" not in output.splitlines()[0]
    for name in ("ai2d", "mine_only"):
        assert len(Store.open(workspace / "stores" / name)) > 0


def test_shipped_files_are_found_without_a_checkout(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without a folder of the user's own, a shipped source is known: here only its raw files are missing."""
    for options in ([], ["--config-dir", "mine"]):
        assert run("--source", "chartqa", *options) == 2
        assert "chartqa" in capsys.readouterr().err
        assert run("--source", "no_such_source", *options) == 2
        message = capsys.readouterr().err
        assert "docvqa" in message
        assert ("mine_only" in message) == bool(options)


def test_configs_replace_the_shipped_files(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--configs` has its own files only; with `--config-dir` too, that folder takes precedence."""
    assert run("--source", "chartqa", "--configs", "mine") == 2
    assert "there is no source 'chartqa'" in capsys.readouterr().err
    write_file(workspace / "more" / "source" / "mine_only.yaml", "reader: llava_json\nroot: nowhere\n")
    assert run("--source", "mine_only", "--configs", "mine", "--config-dir", "more") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--configs", "--config-dir"])
def test_missing_folder_is_an_error(workspace: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """The message names the option and the folder."""
    assert run("--source", "mine_only", option, str(workspace / "nowhere")) == 2
    assert f"{option}: there is no folder {workspace / 'nowhere'}" in capsys.readouterr().err
