"""The list of one-line changes, read from `changes.toml`, and how a change is applied to a copy of the tree."""

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("changes.toml")

Tier = Literal["quick", "full"]


class OutdatedChange(ValueError):
    """The old text of a change is not in its file exactly once; names the change, the file and the count."""


@dataclass(frozen=True)
class Change:
    """One line of a source file that is replaced, and the tests that must fail then.

    Attributes:
        name: unique in the list.
        subject: the table of `changes.toml` that the change is listed under.
        file: relative to the root of the tree.
        old, new: the text to replace, which occurs exactly once in the file, and its replacement.
        tests: files or node ids for pytest; the smallest group that must notice the change.
        tier: `quick` if the quick tier notices, `full` if only tests marked `full` do.
    """

    name: str
    subject: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    tier: Tier = "quick"

    def apply(self, source: str) -> str:
        """The changed text of the file.

        Raises:
            OutdatedChange: the old text does not occur exactly once.
        """
        count = source.count(self.old)
        if count != 1:
            raise OutdatedChange(
                f"{self.name}: {self.old!r} occurs {count} times in {self.file}; correct `old` in {LIST.name}"
            )
        return source.replace(self.old, self.new)


def read_changes(path: Path = LIST) -> list[Change]:
    """All changes of the list, in its order.

    Raises:
        ValueError: a name occurs twice, or a change replaces a text by itself.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    changes = [
        Change(**{**entry, "subject": subject, "tests": tuple(entry["tests"])})
        for subject, entries in tables.items()
        for entry in entries
    ]
    for number, change in enumerate(changes):
        if change.name in {other.name for other in changes[:number]}:
            raise ValueError(f"{path.name} has two changes named {change.name}")
        if change.old == change.new:
            raise ValueError(f"{path.name}: {change.name} replaces a text by itself")
    return changes


def copy_tree(target: Path) -> None:
    """Copies every file of the tree that git does not ignore."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
