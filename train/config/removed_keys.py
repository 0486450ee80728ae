"""Keys that earlier versions wrote into config.yaml and this version does not have.

The config.yaml of an earlier run is read without them. On a command line they are refused with what to write instead.
`stage.image_mode`, which YAML files and command lines of a user may have, is read as the views that it stood for.
"""

import re
from collections.abc import Mapping, Sequence
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
    if isinstance(result.get("stage"), dict):
        result["stage"] = with_views(result["stage"])
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


def with_views(stage: dict[Any, Any]) -> dict[Any, Any]:
    """The values of a stage, with `views` instead of an `image_mode`, which was the mode of all images."""
    if not isinstance(stage.get("image_mode"), str):
        return stage
    mode = _current_mode(stage["image_mode"])
    kept = {key: value for key, value in stage.items() if key != "image_mode"}
    return kept | {"views": {"single": mode, "several": mode, "closing_newline": False}}


def with_views_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command line, with `stage.views` instead of `stage.image_mode`."""
    return [re.sub(r"^\+*stage\.image_mode=(.*)$", _views_override, each, flags=re.DOTALL) for each in overrides]


def _views_override(override: re.Match[str]) -> str:
    mode = _current_mode(override[1])
    return f"stage.views={{single:{mode},several:{mode},closing_newline:false}}"


def _current_mode(mode: str) -> str:
    return "crop" if mode == "square" else mode


def explain_removed(key: str) -> str | None:
    """Why a key is refused and what to write instead, as one sentence; None if no version had the key."""
    if key == "stage.image_mode":
        return f"{key}: this key was replaced; set stage.views.single and stage.views.several (square is called crop)"
    advice = REMOVED_KEYS.get(key)
    return None if advice is None else f"{key}: this key was removed; {advice}"
