"""Rewrites errors of Hydra, OmegaConf and pydantic as one sentence with the key, the rule and the fix.

The configuration's class is an argument, so that this file does not depend on its fields.
"""

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pydantic

from data_recipes.schema.mixture_config import SourceShare
from llava_next.config import PARTS, LoraConfig
from train.config.removed_keys import explain_removed


def explain_composition(text: str, config: type) -> str:
    """Hydra's or OmegaConf's message as one sentence with the key and the fix.

    Args:
        text: the message.
        config: the dataclass whose fields are the known keys.
    """
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    if unknown and ("not in struct" in text or "Could not override" in text):
        return _unknown_key(unknown.group(1), config)
    choice = re.search(
        r"Could not find '([^']+)'(?:.*?Available options in '[^']+':\s*(.*?))?(?:Config search|$)",
        text,
        re.S,
    )
    if choice:
        group, _, name = choice.group(1).rpartition("/")
        known = ", ".join((choice.group(2) or "").split())
        return f"{group}={name}: there is no such choice" + (f"; the choices are {known}" if known else "")
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} has no value; set it on the command line as {missing.group(1)}=VALUE"
    return " ".join(text.split())


def _unknown_key(key: str, config: type) -> str:
    part = key.removeprefix("stage.learning_rates.")
    if part != key:
        if part in PARTS:
            return f"{key} has no value in this stage; to train this part too, write +{key}=RATE"
        return f"{key}: there is no such part; the parts are {', '.join(PARTS)}"
    if key.startswith("lora.") and key.rpartition(".")[2] in _LORA:
        return f"{key}: that part has no adapters; set all of {', '.join(_LORA)}, each as +lora.PART.KEY=VALUE"
    if key in _all_keys(config):
        return f"{key} has no value in the YAML; write it there, or set +{key}=VALUE"
    return _no_such_key(key, config)


_LORA = [item.name for item in fields(LoraConfig)]


def _no_such_key(key: str, config: type) -> str:
    removed = explain_removed(key)
    if removed is not None:
        return removed
    if key.startswith("lora."):
        return f"{key}: there is no such key; the keys of a part's adapters are {', '.join(_LORA)}"
    source, _, last = key.removeprefix("mixture.sources.").rpartition(".")
    if key.startswith("mixture.sources.") and source:
        known = [item.name for item in fields(SourceShare)]
        if last in known:
            return f"{key}: the mixture has no source {source}; correct the name, or add a source with +{key}=VALUE"
        close = difflib.get_close_matches(last, known, n=1)
        near = f"; did you mean mixture.sources.{source}.{close[0]}?" if close else ""
        return f"{key}: there is no such key; a source of a mixture has {', '.join(known)}{near}"
    return f"{key}: there is no such key{_suggest(key, config)}; `python -m train --cfg job` prints all keys"


def _suggest(key: str, config: type) -> str:
    close = difflib.get_close_matches(key, list(_all_keys(config)), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _all_keys(config: type, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(config)
    for item in fields(config):
        keys.append(prefix + item.name)
        for candidate in (hints[item.name], *get_args(hints[item.name])):
            if isinstance(candidate, type) and is_dataclass(candidate):
                keys += _all_keys(candidate, f"{prefix}{item.name}.")
    return keys


def explain_invalid(error: pydantic.ValidationError, config: type) -> str:
    """The first of pydantic's errors as one sentence with the key, the rule and the fix."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-int",))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _no_such_key(key, config)
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} has no value; set it in the YAML, or as +{key}=VALUE"
    rule = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {rule.replace('input should', 'the value should')}, got {first['input']!r}"
