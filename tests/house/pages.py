"""Reads README.md and docs/*.md: their fenced blocks, the commands in them, the YAML files that they show.

In a bash block a comment `# needs ...` says that the commands below it, down to an empty line or the end of the block,
need more than a machine with two cores. Tests check their arguments and do not run them.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (.+)")
TITLE = re.compile(r"# (configs/\S+\.yaml)\n")


def _nav_files(entry: Any) -> list[str]:
    """The files of an entry of mkdocs' navigation, in its order."""
    if isinstance(entry, str):
        return [entry]
    return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in _nav_files(part)]


def _pages() -> list[Path]:
    """README.md, then the pages of docs/ in the order of the navigation."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    return [README, *(DOCS / file for file in _nav_files(site["nav"]))]


PAGES = _pages()
WALKED = DOCS / "your-own-images.md"
"""The page whose commands run in a checkout of their own, without the results of the quickstart
(test_your_own_images.py)."""


@dataclass(frozen=True)
class Command:
    """One command of a bash block, on one line. `needs` is the text of its mark, or empty."""

    text: str
    needs: str = ""

    @property
    def words(self) -> list[str]:
        """The command as split by a shell, without a surrounding `job=$( )` and without leading NAME=value."""
        inner = re.fullmatch(r"\w+=\$\((.*)\)", self.text)
        words = shlex.split(inner[1] if inner else self.text, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        return words


def blocks(*languages: str, pages: Sequence[Path] = PAGES) -> list[str]:
    """The fenced blocks of these pages in these languages (empty: in none)."""
    texts = (page.read_text() for page in pages)
    return [block for text in texts for language, block in FENCE.findall(text) if language in languages]


def commands_of(block: str) -> list[Command]:
    """Every command of a bash block, with what its mark says it needs."""
    listed, needs = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        line = line.strip()
        mark = NEEDS.fullmatch(line)
        if mark:
            needs = mark[1]
        elif not line:
            needs = ""
        elif not line.startswith("#"):
            listed.append(Command(line, needs))
    return listed


def commands(pages: Sequence[Path] = PAGES) -> list[Command]:
    """Every command of the bash blocks of these pages, in their order, each once."""
    return list(dict.fromkeys(command for block in blocks("bash", pages=pages) for command in commands_of(block)))


def inline_commands() -> list[Command]:
    """Those in the running text: `python -m ...`, `./scripts/...` and the like between backquotes."""
    text = "\n".join(FENCE.sub("", page.read_text()) for page in PAGES)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    starts = ("python ", "./", "torchrun ", "deepspeed ", "sbatch ")
    return [Command(span) for span in dict.fromkeys(spans) if span.startswith(starts)]


def shown_programs() -> dict[str, str]:
    """The Python programs that the pages show, by the name in their first line."""
    titled = ((re.match(r"# (\w+\.py)\n", block), block) for block in blocks("python"))
    return {title[1]: block for title, block in titled if title}


def yaml_files() -> dict[str, str]:
    """The YAML files that the pages show: path in the checkout -> text."""
    files = {}
    for block in blocks("yaml"):
        title = TITLE.match(block)
        assert title, f"a YAML block must begin with the name of the file, `# configs/....yaml`:\n{block}"
        files[title[1]] = block
    return files


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """Return (module, arguments) of a command that runs a module with -m or --module, or None."""
    for index, word in enumerate(words[:-1]):
        if word in {"-m", "--module"} and words[0] != "pytest":
            name, *arguments = words[index + 1 :]
            # torchrun -m train; but python -m torch.distributed.run -m train
            return module_call(arguments) or (name, arguments)
    return None


def script_of(words: list[str]) -> str | None:
    """Return the file that a command runs (`./x.sh`, `python x.py`, `sbatch --nodes 2 x.sh`), or None."""
    if words[0].startswith("./"):
        return words[0]
    return next((w for w in words[1:] if w.endswith((".py", ".sh", ".sbatch"))), None)
