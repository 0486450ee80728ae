"""A skipped test says what makes it run: `scripts/test.sh` shows the reasons."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"scripts/|apt-get install|pip install|as root|pytest -m|COMMAND|missing_requirement")


def skips() -> Iterator[tuple[str, str]]:
    """Position and source of the reason of every skip; the whole call if it has none."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = ast.unparse(node.func)
            if name not in ("pytest.skip", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.skipif"):
                continue
            reasons = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            reason = reasons[0] if reasons else node
            yield f"{path.relative_to(TESTS)}:{node.lineno}", ast.unparse(reason)


def test_every_skip_has_a_command() -> None:
    """The reason has the command, or the rights, without which the test cannot run."""
    reasons = list(skips())
    assert len(reasons) > 20
    assert [place for place, reason in reasons if not COMMAND.search(reason)] == []


def test_the_script_shows_the_reasons() -> None:
    """pytest prints them with -rs."""
    script = (TESTS.parent / "scripts" / "test.sh").read_text()
    (command,) = re.findall(r"^exec python -m pytest .*$", script, re.MULTILINE)
    assert " -rs " in command
