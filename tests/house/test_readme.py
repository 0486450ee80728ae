"""Owns the proofs about README.md that run nothing of it: its commands name what exists, the programs' own readers take
their arguments, its messages and links are there. That the commands run is proved in test_readme_runs.py.
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

from tests.house.readme import (
    FENCE,
    README,
    ROOT,
    Command,
    blocks,
    commands,
    commands_of,
    inline_commands,
    module_call,
    script_of,
    yaml_files,
)
from train.config.compose import load
from train.plan.__main__ import planned_stages

OWN_PACKAGES = {"train", "llava_next", "data_recipes"}
NOT_HERE = {"vllm", "sglang"}  # vLLM's reader is asked in tests/scripts/test_vllm.py, SGLang's nowhere


# ------------------------------------------------------------------------------------------- what they name


def module_exists(name: str) -> bool:
    """Whether the module is ours and there, or another package's that is installed."""
    path, package = ROOT.joinpath(*name.split(".")), name.split(".")[0]
    if package in OWN_PACKAGES:
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(package) is not None


def is_foreign(command: Command) -> bool:
    """Whether it starts a program that is not installed with this project."""
    call = module_call(command.words)
    return command.words[0] in NOT_HERE or (call is not None and call[0].split(".")[0] in NOT_HERE)


NAMED = [command for command in (*commands(), *inline_commands()) if not is_foreign(command)]


@pytest.mark.parametrize("command", NAMED, ids=lambda command: command.text)
def test_command_names_what_exists(command: Command) -> None:
    """The module is there, or the script, executable where it is run by its name."""
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
    """A stranger finds the demo and the tests."""
    assert {"./scripts/quickstart.sh", "./scripts/test.sh"} <= {command.text for command in commands()}


def test_commands_stand_in_bash_blocks() -> None:
    """Where they are found: no line of a block in another language begins with one."""
    languages = {language for language, _ in FENCE.findall(README.read_text())}
    assert languages <= {"bash", "python", "yaml", ""}
    starts = ("python ", "./", "torchrun ", "deepspeed ", "sbatch ", "pip ", "vllm ")
    lines = [line for block in blocks("", "yaml") for line in block.splitlines()]
    assert [line for line in lines if line.strip().startswith(starts)] == []


def test_foreign_programs_are_marked() -> None:
    """What is not installed with this project does not run, and says so."""
    assert [command.text for command in commands() if is_foreign(command) and not command.needs] == []


def test_reader_of_commands_reads_what_it_should() -> None:
    """The reader itself: a mark holds to the empty line, a broken line is one, words are the shell's."""
    block = "one a=1 # said\n# needs a ship\n# and this is a remark\nX=1 two \\\n  'b c'\n\nthree\n"
    assert commands_of(block) == [Command("one a=1 # said"), Command("X=1 two    'b c'", "a ship"), Command("three")]
    assert [command.words for command in commands_of(block)] == [["one", "a=1"], ["two", "b c"], ["three"]]
    assert Command("job=$(sbatch a.sbatch)").words == ["sbatch", "a.sbatch"]


# ----------------------------------------------------------------------------------- what is told and not run


class Parsed(Exception):
    """A program has read its arguments, and would begin now."""


def parse_only(words: list[str]) -> None:
    """Start a Python program in this process and end it when its parser has taken the arguments; SystemExit if not."""

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
        warnings.simplefilter("ignore", RuntimeWarning)  # of a module that another test has imported
        runpy.run_module(name, run_name="__main__") if call else runpy.run_path(name, run_name="__main__")
        pytest.fail(f"{name} never read its arguments")


def check_launcher(words: list[str]) -> None:
    """torchrun's and DeepSpeed's own readers take what stands before our module."""
    words = ["0" if word == "K" else word for word in words]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script in ("train", "train.accept")
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args(words[1:]).user_script in ("train", "train.accept")


def check_arguments(words: list[str], configs: Path) -> None:
    """The program's own reader takes the arguments; of a run, the configuration composes and breaks no rule."""
    name, arguments = module_call(words) or ("", [])
    check_launcher(words)
    if name == "train":
        load([word for word in arguments if "=" in word], str(configs), folders=False)
    elif name == "train.plan":
        assert planned_stages(arguments)
    else:
        parse_only(words)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The folder of the YAML files that the page shows: they are the reader's own."""
    for path, text in yaml_files().items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "configs"


def is_python(command: Command) -> bool:
    """Whether it starts a Python program of ours, alone or by a launcher."""
    call = module_call(command.words)
    return not is_foreign(command) and (command.words[0] == "python" or call is not None)


@pytest.mark.parametrize("command", [c for c in commands() if is_python(c)], ids=lambda command: command.text)
def test_arguments_are_taken(command: Command, configs: Path) -> None:
    """By the programs' own readers, of commands that are marked and of others."""
    check_arguments(command.words, configs)


MARKED_SCRIPTS = [c for c in commands() if c.needs and not is_python(c) and not is_foreign(c)]


@pytest.mark.parametrize("command", MARKED_SCRIPTS, ids=lambda command: command.text)
def test_a_marked_shell_script_is_one(command: Command) -> None:
    """It has bash's syntax, and knows the options that it is given before any `--`; Slurm's are not its own."""
    script = script_of(command.words)
    assert script is not None
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    text = (ROOT / script).read_text()
    options = [word for word in command.words if word.startswith("--")]
    assert "slurm" in script or [option for option in options if option not in text] == []


def test_what_is_handed_to_slurm(configs: Path, tmp_path: Path) -> None:
    """The block of Slurm's commands runs with an `sbatch` that only writes down what it is given: jobs that are there,
    with arguments that their programs take; what comes second waits for what comes first."""
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

FOREIGN = {"No space left on device", "BeginTime"}  # the system's words, Slurm's


def test_symptoms_are_what_the_programs_say() -> None:
    """Every message in the first table of "When something goes wrong" stands in the code, but for what is filled in."""
    source = "".join(path.read_text() for name in sorted(OWN_PACKAGES) for path in (ROOT / name).rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", source))
    (table,) = re.findall(r"^## When something goes wrong\n\n((?:\|.*\n)+)", README.read_text(), re.MULTILINE)
    said = [span for row in table.splitlines() for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(said) > 15
    pieces = {piece.strip() for span in said for piece in span.split("…")} - FOREIGN
    assert [piece for piece in sorted(pieces) if piece not in source] == []


def test_links_lead_somewhere() -> None:
    """Links into the page name headings of it, as GitHub makes names of them; others name files."""
    text = README.read_text()
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(([^)\s]+)\)", text))
    assert {"#data", "#serve-it"} <= links
    assert [link for link in sorted(links) if link not in anchors and not (ROOT / link).is_file()] == []
