"""What differs between runs: configuration, data, code and libraries, hardware.

Owns which things are compared and what is equal to what; the table is `page.py`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from train.report.run_folder import Run

UNKNOWN = "not recorded"
_NAMES_THE_RUN = ("root", "name")
"""Keys that differ in any two runs and say nothing: a run's label has them."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same everywhere: of which kind, its name, its value in each run."""

    kind: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What differs, and sentences on what is equal or cannot be compared."""

    differences: list[Difference]
    equal: list[str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Every thing that is not the same in all runs. A value that one run lacks differs from one that another has."""
    aspects: list[tuple[str, str, Callable[[Run], dict[str, str]]]] = [
        ("configuration", "keys of the configuration", _config_of),
        ("data", "facts about the data", _data_of),
        ("versions", "versions", _versions_of),
        ("hardware", "facts about the hardware", _hardware_of),
    ]
    differences, equal = [], []
    for kind, words, read in aspects:
        values = [read(run) for run in runs]
        names = list(dict.fromkeys(name for one in values for name in one))
        num_equal = 0
        for name in names:
            row = tuple(one.get(name, UNKNOWN if kind != "configuration" else "not there") for one in values)
            if len(set(row)) > 1:
                differences.append(Difference(kind, name, row))
            else:
                num_equal += 1
        if num_equal:
            equal.append(f"{num_equal} {words}")
    return Comparison(differences, equal)


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys as on the command line, and what they hold as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flattened(value, f"{name}.")
        else:
            found[name] = "null" if value is None else str(value)
    return found


def _config_of(run: Run) -> dict[str, str]:
    return {key: value for key, value in flattened(run.config).items() if key not in _NAMES_THE_RUN}


def _data_of(run: Run) -> dict[str, str]:
    names = ("data_fingerprint", "mixture_fingerprint", "num_samples", "num_tokens", "num_supervised", "num_tiles")
    found = {name: _short(run.data[name]) for name in names if name in run.data}
    for row in run.data.get("mixture") or []:
        found[f"samples of {row.get('source')}"] = _short(row.get("used"))
    return found


def _versions_of(run: Run) -> dict[str, str]:
    return {name: str(version) for name, version in run.versions.items()}


def _hardware_of(run: Run) -> dict[str, str]:
    found = {"ranks": run.num_ranks, "device": run.last_start.get("device"), "data type": run.last_start.get("dtype")}
    return {name: str(value) for name, value in found.items() if value is not None}


def _short(value: object) -> str:
    """Counts with thousands, fingerprints as far as they are shown elsewhere."""
    return f"{value:,}" if isinstance(value, int) else str(value)[:12]
