"""What differs between runs: configuration, data, versions of code and libraries, hardware."""

from collections.abc import Sequence
from typing import Any

from train.observability.run_folder import Run

UNKNOWN = "not recorded"
_KEYS_NAMING_THE_RUN = ("root", "name")
"""They differ in any two runs, and a run's label has them."""
_DATA_KEYS = ("data_fingerprint", "mixture_fingerprint", "num_samples", "num_tokens", "num_supervised", "num_tiles")


def compare(runs: Sequence[Run]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(differences, what is equal): (kind, name, the value in each run) of all that is not the same in every run, and
    the number of equal facts of each kind. A value that one run lacks differs from one that another has."""
    differences: list[tuple[str, ...]] = []
    equal, facts = [], [_facts(run) for run in runs]
    for kind in facts[0]:
        values = [each[kind] for each in facts]
        missing = "not there" if kind == "configuration" else UNKNOWN
        names = dict.fromkeys(name for each in values for name in each)
        rows: list[tuple[str, ...]] = [(kind, name, *(each.get(name, missing) for each in values)) for name in names]
        unequal = [row for row in rows if len(set(row[2:])) > 1]
        differences += unequal
        if len(unequal) < len(rows):
            equal.append(f"{kind} {len(rows) - len(unequal)}")
    return differences, equal


def _facts(run: Run) -> dict[str, dict[str, str]]:
    """What is compared, by kind and name."""
    config = {key: value for key, value in _flatten(run.config).items() if key not in _KEYS_NAMING_THE_RUN}
    data = {name: run.data[name] for name in _DATA_KEYS if name in run.data}
    data |= {f"samples of {row.get('source')}": row.get("used") for row in run.data.get("mixture") or []}
    start = run.last_start
    hardware = {"ranks": run.num_ranks, "device": start.get("device"), "data type": start.get("dtype")}
    return {
        "configuration": config,
        "data": {name: f"{v:,}" if isinstance(v, int) else str(v)[:12] for name, v in data.items()},
        "versions": {name: str(version) for name, version in run.versions.items()},
        "hardware": {name: str(value) for name, value in hardware.items() if value is not None},
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys as on the command line, and their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat
