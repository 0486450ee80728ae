"""Tests that constraints.txt and pyproject.toml are consistent."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Return {canonical package name: pinned version}."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    matches = [re.fullmatch(r"([\w.\-]+)==([\w.+]+)", line) for line in lines if line]
    assert all(matches), "constraints.txt must contain exact pins only: NAME==VERSION"
    return {canonicalize_name(m[1]): m[2] for m in matches if m}


def test_every_dependency_is_pinned_within_its_range() -> None:
    """Every dependency in pyproject.toml has a pinned version that its range allows."""
    requirements = [*PYPROJECT["dependencies"]]
    for extra in PYPROJECT["optional-dependencies"].values():
        requirements += extra
    pinned = pins()
    for line in requirements:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{line} excludes {pinned[name]}"


def test_pins_name_no_local_build() -> None:
    """No pin has a local version such as 2.13.0+cpu, which would exclude the same release for GPUs."""
    assert [f"{name}=={version}" for name, version in pins().items() if "+" in version] == []
