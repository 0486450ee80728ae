"""Checks that a language model computes packed rows exactly.

A sample in a packed row must have the same loss as alone, which depends on how a model attends and counts positions. So
only architectures with a test are supported, and config keys that break this property (recurrent layers, position
tables that depend on the row) are errors.
"""

import inspect
import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_next.config import ModelError

SUPPORTED_MODEL_TYPES = (
    "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "internlm3",
    "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3",
)  # fmt: skip
"""model_type of each architecture for which tests compare the loss of a sample alone and in a packed row."""

_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_OVERRIDES = "model.language_model.overrides"


def check_language_model_supported(config: PretrainedConfig) -> None:
    """Raises ModelError if packed rows would not be exact for the language model, or if its export could not run."""
    kind = config.model_type
    _check_window(config)
    # A recurrent layer would carry its state to the next sample.
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        raise ModelError(f"{kind} has {min(layer_types)} layers, which do not stay inside packed samples")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            raise ModelError(f"{kind} uses {key}, which packed attention does not implement")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(f"{kind} uses use_bidirectional_attention, but packed attention is causal")
    for key in ("logit_scale", "logits_scaling"):
        scale = getattr(config, key, None)
        if scale not in (None, 1):
            raise ModelError(f"{kind} scales its logits ({key}={scale}), but LLaVA-NeXT's head does not")
    if "gpt_oss" in kind:
        raise ModelError(f"{kind} uses attention sinks, which packed attention does not implement")
    _check_dense(config)
    if kind not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"model.language_model: {kind} is not supported, because no test compares its losses in packed rows with "
            f"those of single samples; choose one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )


def _check_dense(config: PretrainedConfig) -> None:
    for key, value in config.to_dict().items():
        if _EXPERTS.match(key) and isinstance(value, int) and value > 1:
            raise ModelError(
                f"model.language_model: {config.model_type} is a mixture of experts ({key}={value}), which is not "
                "supported (FLOPs, load balancing and tensor names differ); choose a dense language model"
            )


def _check_window(config: PretrainedConfig) -> None:
    """Checks that layers with a sliding window have one."""
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and not window:
        raise ModelError(
            f"{config.model_type} has sliding_attention layers (layer_types) and sliding_window={window}, which stock "
            f"transformers cannot run; set sliding_window in {_OVERRIDES} to the model's own value, or to "
            f"{config.max_position_embeddings} (its max_position_embeddings) for full attention"
        )


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens; None where a token attends to all before it in its sample."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        is_used = getattr(config, "use_sliding_window", True)
        return [window if is_used else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_positions(language_model: nn.Module, max_length: int) -> None:
    """Checks that position embeddings do not depend on the longest sample of a row, as in LongRoPE and dynamic NTK.

    Each rotary module computes the embedding of a short sample alone and in a row with one of `max_length` tokens.

    Args:
        language_model: the decoder without its head, which can be on the meta device; it is not modified.
        max_length: maximum length of a sample in tokens.

    Raises:
        ModelError: the embeddings differ; the message gives the largest supported length.
    """
    for rotary, options in _rotary_modules(language_model):
        if _is_row_independent(rotary, options, max_length):
            continue
        longest = bisect_left(
            range(1, max_length + 1), True, key=lambda length: not _is_row_independent(rotary, options, length)
        )
        raise ModelError(
            f"stage.max_length={max_length}: {type(rotary).__name__} selects rotary frequencies by the longest sample "
            f"of a row, so a sample of more than {longest} tokens would change the losses of other samples; set "
            f"stage.max_length to at most {longest}"
        )


def _rotary_modules(language_model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Each rotary module with the arguments of each of its layer types (Gemma 3 has several)."""
    for module in language_model.modules():
        if "rotary" in type(module).__name__.lower():
            has_layer_type = "layer_type" in inspect.signature(module.forward).parameters
            for layer_type in getattr(module, "layer_types", None) or (None,):
                yield module, {"layer_type": layer_type} if has_layer_type and layer_type is not None else {}


def _is_row_independent(rotary: nn.Module, options: dict[str, str], length: int) -> bool:
    """Whether a sample of 16 tokens has the same cosines and sines alone and in a row with one of this length."""
    states, short = torch.zeros(1, 1), torch.arange(16)
    row = torch.cat([short, torch.arange(length)])
    build = partial(type(rotary), config=rotary.config)
    with torch.device("cpu"), torch.no_grad():  # a new module for each call, because it can cache its frequencies
        alone, in_row = build()(states, short[None], **options), build()(states, row[None], **options)
    return all(torch.equal(a, b[:, : len(short)]) for a, b in zip(alone, in_row, strict=True))


def override_rope(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Writes an override of `rope_scaling` or `rope_theta`, keys of transformers 4, to `rope_parameters`.

    Args:
        config: is modified.
        name: of the overridden key.
        value: of the overridden key.

    Returns:
        Whether `name` is one of the two keys and the config has `rope_parameters`.

    Raises:
        ModelError: each layer type has its own dictionary, or the value of `rope_scaling` is not a dictionary.
    """
    if name not in ("rope_scaling", "rope_theta") or not isinstance(getattr(config, "rope_parameters", None), dict):
        return False
    parameters = dict(config.rope_parameters)
    if any(isinstance(entry, dict) for entry in parameters.values()):
        raise ModelError(
            f"{_OVERRIDES}.{name}: {config.model_type} has one for each layer type; set rope_parameters in the form of "
            "its config.json"
        )
    if name == "rope_theta":
        config.rope_parameters = parameters | {"rope_theta": value}
        return True
    if not isinstance(value, dict | None):
        raise ModelError(f"{_OVERRIDES}.rope_scaling must be a dictionary with rope_type, or null, got {value!r}")
    scaling = dict(value or {"rope_type": "default"})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    unscaled = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    config.rope_parameters = unscaled | scaling
    return True


def check_rope(config: PretrainedConfig) -> None:
    """Raises ModelError if the rotary parameters are not valid for transformers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    entries = parameters.values() if isinstance(parameters, dict) else ()
    by_layer_type = [entry for entry in entries if isinstance(entry, dict)]
    for entry in by_layer_type or [parameters]:
        kind = entry.get("rope_type", entry.get("type", "default")) if isinstance(entry, dict) else entry
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ModelError(
                f"model.language_model: unknown rope_type={kind} in rope_parameters; choose one of default, "
                f"{', '.join(ROPE_INIT_FUNCTIONS)}"
            )
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model.language_model: rope_parameters={parameters} is incomplete: {error}") from error
