"""The list of changes fits the sources, and the program tells a change that is noticed from one that is not."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.mutations.changes import ROOT, Change, OutdatedChange, read_changes

CHANGES = read_changes()


@cache
def _syntax(file: str) -> str:
    return ast.dump(ast.parse((ROOT / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_applies_once_and_stays_python(change: Change) -> None:
    """Its old text is in the file exactly once, what comes of it parses, it is one line, and its tests are there."""
    changed = change.apply((ROOT / change.file).read_text(encoding="utf-8"))
    assert ast.dump(ast.parse(changed)) != _syntax(change.file)
    assert "\n" not in change.old + change.new
    for test in change.tests:
        path, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8"), test


def test_an_outdated_change_is_an_error() -> None:
    """A text that is not there, or there twice, is reported with the change's name and the count."""
    change = Change("name", "subject", "file.py", "old", "new", ())
    assert change.apply("an old text") == "an new text"
    for source, count in (("", 0), ("old old", 2)):
        with pytest.raises(OutdatedChange, match=rf"name: 'old' occurs {count} times in file\.py"):
            change.apply(source)


def test_a_name_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    """Names identify changes on the command line."""
    entry = '[[loss]]\nname = "a"\nfile = "b"\nold = "c"\nnew = "d"\ntests = ["e"]\n'
    (tmp_path / "changes.toml").write_text(2 * entry)
    with pytest.raises(ValueError, match="two changes named a"):
        read_changes(tmp_path / "changes.toml")


def test_every_subject_is_covered() -> None:
    """At least sixty changes, several of each subject."""
    subjects = Counter(change.subject for change in CHANGES)
    assert subjects.total() >= 60
    assert min(subjects.values()) >= 3
