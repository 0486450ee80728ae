"""Reads README.md: its fenced blocks, the commands in them, the YAML files that it shows.

What is proved about them stands in the tests. In a bash block a comment `# needs ...` says that the commands below it,
down to an empty line or the block's end, want more than a machine with two cores: those are checked and not run.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (.+)")
TITLE = re.compile(r"# (configs/\S+\.yaml)\n")


@dataclass(frozen=True)
class Command:
    """One command of a bash block, on one line; `needs` is what its mark says, empty where it has none."""

    text: str
    needs: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell splits them, without `job=$( )` around them and without NAME=value before them."""
        inner = re.fullmatch(r"\w+=\$\((.*)\)", self.text)
        words = shlex.split(inner[1] if inner else self.text, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        return words


def blocks(*languages: str) -> list[str]:
    """The fenced blocks of the page in these languages (empty: in none)."""
    return [text for language, text in FENCE.findall(README.read_text()) if language in languages]


def commands_of(block: str) -> list[Command]:
    """Every command of a bash block, those that want more marked."""
    found, needs = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        line = line.strip()
        mark = NEEDS.fullmatch(line)
        if mark:
            needs = mark[1]
        elif not line:
            needs = ""
        elif not line.startswith("#"):
            found.append(Command(line, needs))
    return found


def commands() -> list[Command]:
    """Every command of the page's bash blocks, in its order, each once."""
    return list(dict.fromkeys(command for block in blocks("bash") for command in commands_of(block)))


def inline_commands() -> list[Command]:
    """Those in the running text: `python -m ...`, `./scripts/...` and the like between backquotes."""
    text = FENCE.sub("", README.read_text())
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    starts = ("python ", "./", "torchrun ", "deepspeed ", "sbatch ")
    return [Command(span) for span in dict.fromkeys(spans) if span.startswith(starts)]


def yaml_files() -> dict[str, str]:
    """The YAML files that the page shows: path in the checkout -> text."""
    files = {}
    for block in blocks("yaml"):
        title = TITLE.match(block)
        assert title, f"a YAML block must begin with the file's name, `# configs/....yaml`:\n{block}"
        files[title[1]] = block
    return files


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that runs one by -m or --module; None otherwise."""
    for index, word in enumerate(words[:-1]):
        if word in {"-m", "--module"} and words[0] != "pytest":
            name, *arguments = words[index + 1 :]
            # torchrun -m train; but python -m torch.distributed.run -m train
            return module_call(arguments) or (name, arguments)
    return None


def script_of(words: list[str]) -> str | None:
    """The file that a command runs: `./x.sh`, `python x.py`, `sbatch --nodes 2 x.sh`; None: there is none."""
    if words[0].startswith("./"):
        return words[0]
    return next((w for w in words[1:] if w.endswith((".py", ".sh", ".sbatch"))), None)
