"""The versions of Python, packages and this code, which a run records. Different versions are never refused."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers")


@cache
def versions() -> dict[str, str]:
    """The versions of Python, of the main packages, and of this code."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "code": _code_version(),
    }


def _code_version() -> str:
    """The commit of a checkout, with `+` if files differ from it; `unknown` without git or a checkout."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
