"""The command `llava-next`: it runs the programs, starts ranks, and refuses in one sentence."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_next.__main__ import _PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> "subprocess.CompletedProcess[str]":
    """`python -m llava_next`, with this checkout on Python's path."""
    return subprocess.run(
        [sys.executable, "-m", "llava_next", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_the_commands() -> None:
    """Alone it prints the same to a user who made a mistake."""
    helped, alone = run("--help"), run()
    assert (helped.returncode, alone.returncode) == (0, 2)
    assert helped.stdout == alone.stdout
    assert all(
        f"  {verb} " in helped.stdout
        for verb in ("train", "plan", "fetch", "guess", "prepare", "export", "chat", "accept")
    )


def test_program_gets_its_arguments_and_returns_its_exit_code(tmp_path: Path) -> None:
    """A mistake in a key is the program's own sentence and exit code 2, from any folder."""
    ended = run("train", "max_stesp=3", cwd=tmp_path)
    assert ended.returncode == 2
    assert "max_stesp" in ended.stderr
    assert run("plan", "--help", cwd=tmp_path).returncode == 0
    (tmp_path / "1.jpg").touch()
    ended = run("guess", ".", cwd=tmp_path)
    assert (ended.returncode, "It has images and no texts" in ended.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train", "--nproc"], ["train", "--nproc", "two"], ["train", "--nproc=0"], ["plan", "--nproc", "2"]],
    ids=" ".join,
)
def test_mistake_is_one_line(arguments: list[str]) -> None:
    """With the word that is wrong, and exit code 2."""
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [verb for verb in _PROGRAMS if verb != "train"])
def test_mistake_in_an_option_is_one_sentence(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the usage; the sentence names the option, and where the usage is. (`train` has Hydra's command line.)"""
    module, _ = _PROGRAMS[verb]
    is_package = ROOT.joinpath(*module.split("."), "__main__.py").is_file()
    program = importlib.import_module(f"{module}.__main__" if is_package else module)
    with pytest.raises(SystemExit) as ended:
        program.main(["--no-such-option"])
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: .+; see `python -m {module} --help`\n", capsys.readouterr().err)


def test_foreign_module_is_named(tmp_path: Path) -> None:
    """A `train.py` in the user's folder hides the package `train`: one sentence with both places."""
    (tmp_path / "train.py").write_text("raise RuntimeError\n")
    ended = run("train", "name=x", cwd=tmp_path)
    assert ended.returncode == 2
    assert str(tmp_path / "train.py") in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_ranks_are_started(tmp_path: Path) -> None:
    """--nproc 2 runs the program in two processes, and a `train.py` in the user's folder does not get in their way."""
    (tmp_path / "train.py").write_text("raise RuntimeError\n")
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "llava_next", "accept", "--nproc", "2", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage: ") == 2


def test_fetch_is_one_command_for_data_and_models(tmp_path: Path) -> None:
    """With a mixture or a source it fetches data, otherwise models; each refuses what it does not know."""
    for arguments, part in (
        (["--mixture", "no_such", "--raw", str(tmp_path)], "there is no mixture 'no_such'"),
        ([f"--raw={tmp_path}", "--source", "no_such"], "there is no source 'no_such'"),
        (["no_such"], "there is no model 'no_such'"),
    ):
        ended = run("fetch", *arguments, cwd=tmp_path)
        assert ended.returncode == 2
        assert part in ended.stderr
