"""Tests of README.md and docs/ that run none of their commands: commands name what exists, the programs' own parsers
accept their arguments, messages and links exist. `test_pages_run.py` runs the commands.
"""

import argparse
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from tests.house.pages import (
    DOCS,
    FENCE,
    PAGES,
    README,
    ROOT,
    Command,
    blocks,
    commands,
    commands_of,
    inline_commands,
    module_call,
    script_of,
    shown_programs,
    yaml_files,
)
from train.config.compose import load
from train.plan.__main__ import list_stages

OWN_PACKAGES = {"train", "llava_next", "data_recipes"}
NOT_HERE = {"vllm", "sglang", "hf"}  # vLLM's parser is tested in tests/scripts/test_vllm.py, the others' are not


# ------------------------------------------------------------------------------------ modules and scripts


def module_exists(name: str) -> bool:
    """Return whether a module exists in this repository or is installed."""
    path, package = ROOT.joinpath(*name.split(".")), name.split(".")[0]
    if package in OWN_PACKAGES:
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(package) is not None


def is_foreign(command: Command) -> bool:
    """Return whether a command starts a program that is not installed with this project, or that a page shows."""
    call = module_call(command.words)
    module = "" if call is None else call[0].split(".")[0]
    return command.words[0] in NOT_HERE or module in NOT_HERE or script_of(command.words) in shown_programs()


NAMED = [command for command in (*commands(), *inline_commands()) if not is_foreign(command)]


@pytest.mark.parametrize("command", NAMED, ids=lambda command: command.text)
def test_command_names_what_exists(command: Command) -> None:
    """The module or script exists, and a script that is run by its name is executable."""
    words = command.words
    call = module_call(words)
    if call is not None:
        assert module_exists(call[0]), f"python -m {call[0]}: no such module"
        return
    script = script_of(words)
    assert script is not None, f"neither a module nor a script in: {command.text}"
    assert (ROOT / script).is_file(), f"{script} does not exist"
    assert not script.startswith("./") or os.access(ROOT / script, os.X_OK), f"{script} is not executable"


def test_readme_shows_the_two_first_commands() -> None:
    """The quickstart and the tests are in README.md itself."""
    in_readme = {line for language, block in FENCE.findall(README.read_text()) for line in block.splitlines()}
    assert {"./scripts/quickstart.sh", "./scripts/test.sh"} <= in_readme


def test_readme_is_short() -> None:
    """README.md has at most 200 lines; the rest is in docs/."""
    assert len(README.read_text().splitlines()) <= 200


def test_every_page_is_in_the_navigation() -> None:
    """A page that the site's navigation lacks is neither found by a reader nor read by these tests."""
    assert {page for page in PAGES if page != README} == set(DOCS.glob("*.md"))


def test_commands_are_in_bash_blocks() -> None:
    """No line of a block in another language begins with a command."""
    languages = {language for page in PAGES for language, _ in FENCE.findall(page.read_text())}
    assert languages <= {"bash", "python", "yaml", ""}
    starts = ("python ", "./", "torchrun ", "deepspeed ", "sbatch ", "pip ", "vllm ")
    lines = [line for block in blocks("", "yaml") for line in block.splitlines()]
    assert [line for line in lines if line.strip().startswith(starts)] == []


def test_foreign_programs_are_marked() -> None:
    """Programs that are not installed with this project have a mark."""
    assert [command.text for command in commands() if is_foreign(command) and not command.needs] == []


def test_command_parser() -> None:
    """A mark extends to the next empty line, continued lines are joined, and words are split as by a shell."""
    block = "one a=1 # comment\n# needs a GPU\n# another comment\nX=1 two \\\n  'b c'\n\nthree\n"
    assert commands_of(block) == [Command("one a=1 # comment"), Command("X=1 two    'b c'", "a GPU"), Command("three")]
    assert [command.words for command in commands_of(block)] == [["one", "a=1"], ["two", "b c"], ["three"]]
    assert Command("job=$(sbatch a.sbatch)").words == ["sbatch", "a.sbatch"]


# ---------------------------------------------------------------------------------------------- arguments


class Parsed(Exception):
    """Raised when a program has parsed its arguments."""


def parse_only(words: list[str]) -> None:
    """Run a Python program in this process up to the end of its argument parsing; SystemExit if that fails."""

    def read(parser: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> NoReturn:
        _, unknown = parser.parse_known_args(arguments, namespace)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    call = module_call(words)
    name, arguments = call or (str(ROOT / words[1]), words[2:])
    path = [*sys.path] if call else [str(Path(name).parent), *sys.path]
    with (
        patch.object(argparse.ArgumentParser, "parse_args", read),
        patch.object(argparse.ArgumentParser, "parse_intermixed_args", read),
        patch.object(sys, "argv", [name, *arguments]),
        patch.object(sys, "path", path),
        warnings.catch_warnings(),
        suppress(Parsed),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may already be imported by another test
        runpy.run_module(name, run_name="__main__") if call else runpy.run_path(name, run_name="__main__")
        pytest.fail(f"{name} did not parse its arguments")


def check_launcher(words: list[str]) -> None:
    """Parse the arguments before our module with the parsers of torchrun and DeepSpeed."""
    words = ["0" if word == "K" else word for word in words]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script in ("train", "train.accept", "train.evaluate")
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args(words[1:]).user_script in ("train", "train.accept", "train.evaluate")


def check_arguments(words: list[str], configs: Path) -> None:
    """Parse the arguments with the program's parser; for a run, compose and validate its configuration."""
    name, arguments = module_call(words) or ("", [])
    check_launcher(words)
    if name == "train":
        load([word for word in arguments if "=" in word], str(configs), folders=False)
    elif name == "train.plan":
        assert list_stages([*arguments, "--config-dir", str(configs)])
    else:
        parse_only(words)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder with the YAML files that the pages show."""
    for path, text in yaml_files().items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "configs"


def is_python(command: Command) -> bool:
    """Return whether a command starts a Python program of this project, directly or by a launcher."""
    call = module_call(command.words)
    return not is_foreign(command) and (command.words[0] == "python" or call is not None)


@pytest.mark.parametrize("command", [c for c in commands() if is_python(c)], ids=lambda command: command.text)
def test_arguments_are_taken(command: Command, configs: Path) -> None:
    """The programs' parsers accept the arguments of all commands, marked or not."""
    check_arguments(command.words, configs)


MARKED_SCRIPTS = [c for c in commands() if c.needs and not is_python(c) and not is_foreign(c)]


@pytest.mark.parametrize("command", MARKED_SCRIPTS, ids=lambda command: command.text)
def test_marked_shell_scripts(command: Command) -> None:
    """The script has valid syntax and contains the options before any `--`, except for Slurm's."""
    script = script_of(command.words)
    assert script is not None
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    text = (ROOT / script).read_text()
    options = [word for word in command.words if word.startswith("--")]
    assert "slurm" in script or [option for option in options if option not in text] == []


def test_slurm_commands(configs: Path, tmp_path: Path) -> None:
    """The Slurm block runs with a fake `sbatch`: the jobs exist, their programs accept the arguments, and dependencies
    are set."""
    (block,) = (block for block in blocks("bash") if "sbatch" in block)
    submitted = tmp_path / "submitted"
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nprintf '%s\\037' \"$@\" >>{submitted}; echo >>{submitted}; echo 17\n")
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=ROOT, env={**os.environ, "PATH": path}, check=True)
    jobs = [line.split("\037")[:-1] for line in submitted.read_text().splitlines()]
    assert len(jobs) == 5
    for job in jobs:
        at = next(number for number, word in enumerate(job) if word.endswith(".sbatch"))
        assert (ROOT / job[at]).is_file()
        program = {"train.sbatch": "train", "prepare.sbatch": "data_recipes.prepare"}[Path(job[at]).name]
        check_arguments(["python", "-m", program, *job[at + 1 :]], configs)
    assert "--dependency=afterok:17" in jobs[2]
    assert "--dependency=afterok:17" in jobs[4]


# ------------------------------------------------------------------------------------------------ symptoms

FOREIGN = {"No space left on device", "BeginTime"}  # messages of the operating system and of Slurm


def test_troubleshooting_quotes_messages_of_the_programs() -> None:
    """Every message in the table of docs/troubleshooting.md is in the source code, apart from inserted values."""
    source = "".join(path.read_text() for name in sorted(OWN_PACKAGES) for path in (ROOT / name).rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", source))
    (table,) = re.findall(r"^((?:\|.*\n)+)", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [span for row in table.splitlines() for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 15
    pieces = {piece.strip() for span in messages for piece in span.split("…")} - FOREIGN
    assert [piece for piece in sorted(pieces) if piece not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links within a page match GitHub's anchors of its headings; other links are existing files."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")}
    assert [link for link in sorted(links) if link not in anchors and not (page.parent / link).exists()] == []
