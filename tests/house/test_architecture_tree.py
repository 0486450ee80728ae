"""Tests that the file tree in README.md agrees with the repository."""

import re
from collections.abc import Iterator

import pytest

from tests.house.pages import ROOT, blocks

BRACES = re.compile(r"^(.*?)\{([^{}]+)\}(.*)$")
PATH_WORD = re.compile(r"^[\w.{},/-]+$")
BARE_FILES = {"LICENSE", ".gitignore", "run"}


def expand_braces(word: str) -> list[str]:
    """Expand shell braces: `quickstart/{assets,draw}.py` gives two paths."""
    match = BRACES.match(word)
    if match is None:
        return [word]
    head, inner, tail = match.groups()
    return [path for part in inner.split(",") for path in expand_braces(f"{head}{part}{tail}")]


def is_path(word: str) -> bool:
    """Return whether a word of the tree is a file or folder name (a folder ends with /)."""
    if not PATH_WORD.match(word) or word.startswith("/"):
        return False
    return (
        word.endswith("/")
        or word in BARE_FILES
        or re.search(r"[\w}]\.(py|sh|md|ya?ml|toml|txt|json|sbatch)$", word) is not None
    )


def tree_paths(text: str) -> Iterator[str]:
    """Yield the paths of a captioned tree. Indentation nests; the leading path words of a line count, its caption does
    not.

    A line may contain several files, or a folder and some of its files: `scripts/  test.sh  slurm/`.
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
        for path in expand_braces(first):
            yield parent + path
        if first.endswith("/"):
            open_folders.append((indent, parent + first))
            parent += first
        for word in others:
            for path in expand_braces(word):
                yield parent + path


def tree() -> list[str]:
    """Return the paths of the README's tree, the block that contains the three packages at the start of lines."""
    for text in blocks("", "text"):
        if all(re.search(rf"^\W*{name}/", text, re.MULTILINE) for name in ("llava_next", "data_recipes", "train")):
            return sorted(set(tree_paths(text)))
    return []


def test_readme_has_a_tree() -> None:
    """The tree exists and has more than the packages."""
    assert len(tree()) > 10


@pytest.mark.parametrize("path", tree())
def test_tree_path_exists(path: str) -> None:
    """Every path of the tree exists; folders have a trailing slash."""
    full_path = ROOT / path
    assert full_path.is_dir() if path.endswith("/") else full_path.is_file()


def test_tree_parser() -> None:
    """The parser handles siblings, folders with files, braces, captions and continuation lines."""
    text = (
        "pyproject.toml   LICENSE\n"
        "a_folder/        CAPTION                  with numpy\n"
        "  x.py  y.py     two files, see\n"
        "                 also the other folder\n"
        "  inner/         z.py, one file a layout\n"
        "scripts/         test.sh + quickstart/{one,two}.py  slurm/  and more.py\n"
    )
    assert list(tree_paths(text)) == [
        "pyproject.toml",
        "LICENSE",
        "a_folder/",
        "a_folder/x.py",
        "a_folder/y.py",
        "a_folder/inner/",
        "scripts/",
        "scripts/test.sh",
        "scripts/quickstart/one.py",
        "scripts/quickstart/two.py",
        "scripts/slurm/",
    ]
