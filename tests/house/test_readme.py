"""Owns the proofs about README.md: its commands name what exists and compose, its tree shows what is there.

That the two first commands run is proved by running them (scripts/quickstart.sh, scripts/test.sh).
"""

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.compose import load
from train.plan.__main__ import planned_stages

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
BRACES = re.compile(r"^(.*?)\{([^{}]+)\}(.*)$")
PATH_WORD = re.compile(r"^[\w.{},/-]+$")
BARE_FILES = {"LICENSE", ".gitignore", "run"}
PROGRAMS = ("python", "torchrun", "deepspeed", "sbatch", "srun")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block of the README; empty before there is one."""
    return FENCE.findall(README.read_text()) if README.is_file() else []


# ------------------------------------------------------------------------------------------------ commands


def commands() -> list[str]:
    """Every command line of the README's bash blocks that this repository answers for, on one line each."""
    found = []
    for language, text in blocks():
        if language not in {"bash", "sh", "shell", "console"}:
            continue
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;|\|", line.strip().removeprefix("$ ")):
                words = words_of(command)
                if words and (words[0].startswith("./") or words[0] in PROGRAMS):
                    found.append(shlex.join(words))
    return sorted(set(found))


def words_of(command: str) -> list[str]:
    """The words of a command, without comments and leading NAME=value."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    return words


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that runs one by -m or --module; None otherwise."""
    for index, word in enumerate(words[:-1]):
        if word in {"-m", "--module"}:
            name, *arguments = words[index + 1 :]
            # torchrun -m train; but python -m torch.distributed.run -m train
            return module_call(arguments) or (name, arguments)
    return None


def module_exists(name: str) -> bool:
    """Whether the module is ours and there, or another package's that is installed."""
    path = ROOT.joinpath(*name.split("."))
    if name.split(".")[0] in {"train", "llava_next", "data_recipes"}:
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(name.split(".")[0]) is not None


def script_of(words: list[str]) -> str | None:
    """The file that a command runs: `./x.sh`, `python x.py`, `sbatch --nodes 2 x.sh`; None: there is none."""
    if words[0].startswith("./"):
        return words[0]
    return next((w for w in words[1:] if w.endswith((".py", ".sh", ".sbatch"))), None)


@pytest.mark.parametrize("command", commands())
def test_command_names_what_exists(command: str) -> None:
    """The script or module is there (and executable); overrides of `train` compose and validate."""
    words = shlex.split(command)
    call = module_call(words)
    if call is None:
        script = script_of(words)
        assert script is not None, f"neither a module nor a script in: {command}"
        assert (ROOT / script).is_file(), f"{script} does not exist"
        assert not script.startswith("./") or os.access(ROOT / script, os.X_OK), f"{script} is not executable"
        return
    name, arguments = call
    assert module_exists(name), f"python -m {name}: no such module"
    if name == "train":
        load([word for word in arguments if not word.startswith("-") and "=" in word], folders=False)
    if name == "train.plan":
        assert planned_stages(arguments)


def test_readme_shows_the_two_first_commands() -> None:
    """A stranger finds the demo and the tests."""
    assert {"./scripts/quickstart.sh", "./scripts/test.sh"} <= set(commands())


# ---------------------------------------------------------------------------------------------------- tree


def spread(word: str) -> list[str]:
    """Shell braces: `quickstart/{assets,draw}.py` -> two paths."""
    match = BRACES.match(word)
    if match is None:
        return [word]
    head, inner, tail = match.groups()
    return [path for part in inner.split(",") for path in spread(f"{head}{part}{tail}")]


def is_path(word: str) -> bool:
    """Whether a word of the tree names a file or folder (a folder ends with /)."""
    if not PATH_WORD.match(word) or word.startswith("/"):
        return False
    return (
        word.endswith("/")
        or word in BARE_FILES
        or re.search(r"[\w}]\.(py|sh|md|ya?ml|toml|txt|json|sbatch)$", word) is not None
    )


def tree_paths(text: str) -> Iterator[str]:
    """Paths of a captioned tree. Indentation nests; leading path words of a line count, its caption does not.

    A line may name several files, or a folder and then some of what is in it: `scripts/  test.sh  slurm/`.
    """
    open_folders: list[tuple[int, str]] = []
    for raw in text.splitlines():
        line = re.sub(r"[│├└─]", " ", raw)
        indent = len(line) - len(line.lstrip())
        names: list[str] = []
        for word in line.split():
            if word == "+" and names:
                continue
            if not is_path(word):
                break
            names.append(word)
        if not names:
            continue
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        parent = open_folders[-1][1] if open_folders else ""
        first, *others = names
        for path in spread(first):
            yield parent + path
        if first.endswith("/"):
            open_folders.append((indent, parent + first))
            parent += first
        for word in others:
            for path in spread(word):
                yield parent + path


def tree() -> list[str]:
    """Paths of the README's captioned tree: the fenced block with the three packages at line starts."""
    for _, text in blocks():
        if all(re.search(rf"^\W*{name}/", text, re.MULTILINE) for name in ("llava_next", "data_recipes", "train")):
            return sorted(set(tree_paths(text)))
    return []


def test_readme_has_a_tree() -> None:
    """The captioned tree is there, and shows more than the packages' names."""
    assert len(tree()) > 10


@pytest.mark.parametrize("path", tree())
def test_tree_path_exists(path: str) -> None:
    """Everything that the tree shows is there; a folder is shown with a slash."""
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


def test_tree_reader_reads_what_it_should() -> None:
    """The reader itself: siblings, a folder with its contents, braces, captions, continuation lines."""
    text = (
        "pyproject.toml   LICENSE\n"
        "a_room/          WHAT IT HOLDS            with numpy\n"
        "  x.py  y.py     two files of it, see\n"
        "                 also the other room\n"
        "  inner/         z.py, one file a layout\n"
        "scripts/         test.sh + quickstart/{one,two}.py  slurm/  and more.py\n"
    )
    assert list(tree_paths(text)) == [
        "pyproject.toml",
        "LICENSE",
        "a_room/",
        "a_room/x.py",
        "a_room/y.py",
        "a_room/inner/",
        "scripts/",
        "scripts/test.sh",
        "scripts/quickstart/one.py",
        "scripts/quickstart/two.py",
        "scripts/slurm/",
    ]
