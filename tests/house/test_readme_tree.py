"""Owns the proof that the captioned tree of README.md shows what is there."""

import re
from collections.abc import Iterator

import pytest

from tests.house.readme import ROOT, blocks

BRACES = re.compile(r"^(.*?)\{([^{}]+)\}(.*)$")
PATH_WORD = re.compile(r"^[\w.{},/-]+$")
BARE_FILES = {"LICENSE", ".gitignore", "run"}


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
    for text in blocks("", "text"):
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
