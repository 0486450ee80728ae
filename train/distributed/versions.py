"""Which versions a run was made with: recorded and shown, never a reason to refuse."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers")


@cache
def versions() -> dict[str, str]:
    """Python's, the packages' and this code's."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "code": _code_version(),
    }


def _code_version() -> str:
    """The commit of a checkout, with `+` where files differ from it; else the installed version."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() if told.returncode == 0 else "unknown"
