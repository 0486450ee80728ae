"""Keys that earlier versions wrote into config.yaml and this version does not have.

The config.yaml of an earlier run is read without them. On a command line they are refused with what to write instead.
"""

from collections.abc import Mapping
from typing import Any

REMOVED_KEYS: Mapping[str, str] = {
    "linear": "leave it out; fp32 products on a CPU are torch's own",
    "elementwise": "leave it out; norms, gates and rotary embeddings on a CPU are torch's own",
}
"""What to write instead, by dotted key."""

EARLIER_VALUES: Mapping[str, Any] = {"stage.betas": [0.9, 0.999], "stage.eps": 1e-8}
"""Keys that a config.yaml of an earlier version lacks, with the value that every run had then."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config.yaml without the removed keys, and with the keys that it lacks.

    Args:
        values: the file as plain dictionaries; not changed.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key in REMOVED_KEYS:
        group, _, name = key.rpartition(".")
        section = result.get(group) if group else result
        if isinstance(section, dict):
            section.pop(name, None)
    for key, value in EARLIER_VALUES.items():
        group, _, name = key.rpartition(".")
        if isinstance(result.get(group), dict):
            result[group].setdefault(name, value)
    return result


def explain_removed(key: str) -> str | None:
    """Why a key is refused and what to write instead, as one sentence; None if no version had the key."""
    advice = REMOVED_KEYS.get(key)
    return None if advice is None else f"{key}: this key was removed; {advice}"
