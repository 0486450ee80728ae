"""Rewrites errors of Hydra, OmegaConf and pydantic as one sentence with the key, the rule and the fix.

The configuration's class is an argument, so that this file does not depend on its fields.
"""

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pydantic
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic_core import ErrorDetails

from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.mixture_config import SourceShare
from llava_next.config import PARTS, LoraConfig
from train.config.removed_keys import explain_removed


def explain_composition(text: str, config: type, overrides: Sequence[str] = ()) -> str:
    """Hydra's or OmegaConf's message as one sentence with the key and the fix.

    Args:
        text: the message.
        config: the dataclass whose fields are the known keys.
        overrides: of the command line, to name the one that cannot be parsed.
    """
    if "override_grammar" in text:
        return _explain_syntax(text, overrides)
    text = _without_hints(text)
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
        for override in overrides:  # a name may have a slash
            if override.lstrip("+").replace("=", "/", 1) == choice.group(1):
                group, _, name = override.lstrip("+").partition("=")
        known = ", ".join((choice.group(2) or "").split())
        return f"{group}={name}: there is no such choice" + (f"; the choices are {known}" if known else "")
    reference = re.search(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", text)
    if reference:
        other, key = reference.groups()
        return f"{key} refers to {other}, which has no value; set {other}=VALUE"
    groups = [override for override in overrides if override.endswith("=null")]
    groups = [override for override in groups if (CONFIG_DIR / override.lstrip("+").removesuffix("=null")).is_dir()]
    if "Config group override must be a string" in text and groups:
        return f"{groups[-1].lstrip('+')}: this group of YAML files needs a choice; name one, or leave it out"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} has no value; set it on the command line as {missing.group(1)}=VALUE"
    return " ".join(text.split())


def _explain_syntax(text: str, overrides: Sequence[str]) -> str:
    """Names the override that Hydra cannot parse, and how it is quoted."""
    parser = OverridesParser.create()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            continue
        try:
            parser.parse_override(override)
        except HydraException:
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            quoted = f"{key}='{escaped}'"
            quoted = f'"{quoted}"' if not set(quoted) & set('"$`\\!') else shlex.quote(quoted)
            return (
                f"{override!r} cannot be parsed; quote a value with special characters for the shell and for Hydra: "
                f"{quoted}"
            )
    if "" in overrides:
        return "an argument is empty; write KEY=VALUE"
    word = re.search(r"Error parsing override '(.*?)'\s", text, re.DOTALL)
    if word:
        return f"{word.group(1)!r} is no override KEY=VALUE; `python -m train --help` lists choices and options"
    return _without_hints(text)


def _without_hints(text: str) -> str:
    """The reason in Hydra's or argparse's message: without traceback, usage and links."""
    if "Traceback (most recent call last)" in text:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\w*: .*(?:\n(?! ).*|\n  in .*)*", text, re.MULTILINE)
        text = errors[-1].partition(": ")[2] if errors else text.rstrip().rpartition("\n")[2]
    if "usage: " in text and ": error: " in text:
        text = text.rpartition(": error: ")[2]
    text = re.sub(r"See https://hydra\.cc\S+ for details\.?", "", text)
    return re.sub(r"Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace\.?", "", text).strip()


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
            return (
                f"{key}: the mixture has no source {source}, or its YAML does not set {last}; correct the name, or "
                f"write +{key}=VALUE"
            )
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


_TYPE_NAMES = ("constrained-int", "str", "TemplateConfig")
"""What pydantic adds to the place of a value that may have several types."""


def _first_error(error: pydantic.ValidationError) -> ErrorDetails:
    """The first error. Of a dictionary in the place of a name or dictionary, it is the first one in the dictionary."""
    first, *others = error.errors()
    if first["loc"][-1:] == ("str",) and isinstance(first["input"], dict):
        return next((other for other in others if other["loc"][:-2] == first["loc"][:-1]), first)
    return first


def explain_invalid(error: pydantic.ValidationError, config: type) -> str:
    """The first of pydantic's errors as one sentence with the key, the rule and the fix."""
    first = _first_error(error)
    key = ".".join(str(part) for part in first["loc"] if part not in _TYPE_NAMES)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _no_such_key(key, config)
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} has no value; set it in the YAML, or as +{key}=VALUE"
    rule = first["msg"][0].lower() + first["msg"][1:]
    sentence = f"{key}: {rule.replace('input should', 'the value should')}, got {first['input']!r}"
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        sentence += f"; a text that looks like a number or a truth value is quoted: \"{key}='{first['input']}'\""
    return sentence
