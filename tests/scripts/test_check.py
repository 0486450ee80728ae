"""`scripts/check.sh` checks the project's own files, and nothing else that lies in the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "import os\ndef f(:\n"
NOT_TESTED_HERE = ("python", "mypy", "lint-imports", "shellcheck", "mkdocs")
"""They read fixed folders, which pyproject.toml and mkdocs.yml name; here they succeed at once."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The tracked files of this checkout, with a folder `bin` in which only ruff is a real program."""
    clone = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.strip("\0").split("\0"):
        if name.endswith((".py", ".sh", ".toml")) and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    (tmp_path / "bin").mkdir()
    for name in NOT_TESTED_HERE:
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    (tmp_path / "bin" / "ruff").symlink_to(Path(sys.executable).parent / "ruff")
    return clone


def check(clone: Path) -> tuple[int, str]:
    """Exit code and output of the program."""
    environment = {**os.environ, "LLAVA_NEXT_PYTHON": str(clone.parent / "bin" / "python")}
    ended = subprocess.run(
        ["./scripts/check.sh"], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_other_files_in_the_checkout_are_not_checked(clone: Path) -> None:
    """A cache with broken code and with another project's ruff configuration, an environment, a run's folder; a broken
    file of the project's own is reported."""
    for folder in (".cache/pip", "env/lib/python3.11/site-packages", "outputs/run"):
        (clone / folder).mkdir(parents=True)
        (clone / folder / "x.py").write_text(BROKEN)
        (clone / folder / "pyproject.toml").write_text("[tool.ruff]\nno-such-key = 1\n")
    code, output = check(clone)
    assert code == 0, output
    (clone / "train" / "x.py").write_text(BROKEN)
    code, output = check(clone)
    assert code == 1
    assert "2 failed: formatting (ruff format), lint (ruff check)" in output


def test_every_tracked_python_file_is_checked(clone: Path) -> None:
    """ruff, started by hand, finds the same files."""
    shown = subprocess.run(
        [clone.parent / "bin" / "ruff", "check", "--show-files"], cwd=clone, capture_output=True, text=True, check=True
    )
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {str(Path(line).relative_to(clone.resolve())) for line in shown.stdout.splitlines() if line.endswith(".py")}
    assert found == {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
