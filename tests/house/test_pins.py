"""Owns the proof that constraints.txt and pyproject.toml speak of the same packages."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """The pinned version of each package, by canonical name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    matches = [re.fullmatch(r"([\w.\-]+)==([\w.+]+)", line) for line in lines if line]
    assert all(matches), "constraints.txt holds exact pins only: NAME==VERSION"
    return {canonicalize_name(m[1]): m[2] for m in matches if m}


def test_every_dependency_is_pinned_within_its_range() -> None:
    """What pyproject.toml asks for has one tested version in constraints.txt, and the range allows it."""
    wanted = [*PYPROJECT["dependencies"]]
    for extra in PYPROJECT["optional-dependencies"].values():
        wanted += extra
    pinned = pins()
    for line in wanted:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{line} refuses {pinned[name]}"


def test_pins_name_no_local_build() -> None:
    """A pin such as 2.13.0+cpu would refuse the same release on a machine with a GPU."""
    assert [f"{name}=={version}" for name, version in pins().items() if "+" in version] == []
