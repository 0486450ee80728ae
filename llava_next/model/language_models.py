"""Which language models packed rows are exact for, and what in their configs is refused.

A packed row must give each sample the loss that it has alone. That depends on how a model's own code attends and
counts positions, so only architectures whose packed rows are tested are admitted. What a config can still break
(windows, position tables that depend on the row) is refused by key, value and fix.
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

ADMITTED = (
    "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "internlm3",
    "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3",
)  # fmt: skip
"""transformers' model_type of each architecture for which tests compare a sample alone with the sample in a row."""

_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_OVERRIDES = "model.language_model.overrides"


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raises ModelError for a language model whose packed rows would not be exact, or whose export would not run."""
    kind = config.model_type
    _refuse_window(config)
    # A layer that carries a state would carry it to the next sample.
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(f"{kind} has {min(kinds)} layers, which do not stay inside packed samples")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            raise ModelError(f"{kind} uses {key}, which packed attention does not implement")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(f"{kind} attends in both directions (use_bidirectional_attention), packed attention is causal")
    for key in ("logit_scale", "logits_scaling"):
        scale = getattr(config, key, None)
        if scale not in (None, 1):
            raise ModelError(f"{kind} scales its logits ({key}={scale}), which LLaVA-NeXT's head does not")
    if "gpt_oss" in kind:
        raise ModelError(f"{kind} uses attention sinks, which packed attention does not implement")
    _refuse_experts(config)
    if kind not in ADMITTED:
        raise ModelError(
            f"model.language_model: {kind} is not supported, because no test shows that its samples keep their losses "
            f"in packed rows; choose one of {', '.join(ADMITTED)}"
        )


def _refuse_experts(config: PretrainedConfig) -> None:
    for key, value in config.to_dict().items():
        if _EXPERTS.match(key) and isinstance(value, int) and value > 1:
            raise ModelError(
                f"model.language_model: {config.model_type} is a mixture of experts ({key}={value}), which is not "
                "supported: its costs, its balancing and its tensor names are not those of a dense model; choose a "
                "dense language model"
            )


def _refuse_window(config: PretrainedConfig) -> None:
    """A window that covers every position is full attention, here and in every program that runs the export."""
    window, positions = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if not getattr(config, "use_sliding_window", True):
        return
    if window and window < positions:
        raise ModelError(
            f"{config.model_type} attends in a sliding window of {window} tokens, which packed attention does not "
            f"implement; if every sample is shorter, set sliding_window: {positions} in {_OVERRIDES} (its "
            "max_position_embeddings), which is the same attention up to there"
        )
    if not window and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            f"{config.model_type} has sliding_attention layers (layer_types) and sliding_window={window}, which stock "
            f"transformers cannot run; set sliding_window: {positions} in {_OVERRIDES} (its max_position_embeddings)"
        )


def check_positions(language_model: nn.Module, max_length: int) -> None:
    """Refuses position tables that depend on the longest sample of a row (LongRoPE, dynamic NTK).

    Each rotary module of the model computes the table of a short sample alone, and beside one of `max_length` tokens.

    Args:
        language_model: the decoder without its head, which may be on the meta device; it is left as it is.
        max_length: of a sample, in tokens.

    Raises:
        ModelError: they differ; says up to which length they do not.
    """
    for rotary, options in _rotary_modules(language_model):
        if _keeps_its_table(rotary, options, max_length):
            continue
        longest = bisect_left(
            range(1, max_length + 1), True, key=lambda length: not _keeps_its_table(rotary, options, length)
        )
        raise ModelError(
            f"stage.max_length={max_length}: {type(rotary).__name__} chooses the positions' frequencies by the longest "
            f"sample of a row, so beside a sample of more than {longest} tokens another one's loss would change; set "
            f"stage.max_length to at most {longest}"
        )


def _rotary_modules(language_model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Each rotary module with each of its kinds of layers, where it has several (Gemma 3)."""
    for module in language_model.modules():
        if "rotary" in type(module).__name__.lower():
            has_kinds = "layer_type" in inspect.signature(module.forward).parameters
            for kind in getattr(module, "layer_types", None) or (None,):
                yield module, {"layer_type": kind} if has_kinds and kind is not None else {}


def _keeps_its_table(rotary: nn.Module, options: dict[str, str], length: int) -> bool:
    """Whether a sample of 16 tokens has the same cosines and sines beside a sample of this length as alone."""
    states, short = torch.zeros(1, 1), torch.arange(16)
    both = torch.cat([short, torch.arange(length)])
    make = partial(type(rotary), config=rotary.config)
    with torch.device("cpu"), torch.no_grad():  # a new module each time: it may keep its frequencies from call to call
        alone, beside = make()(states, short[None], **options), make()(states, both[None], **options)
    return all(torch.equal(a, b[:, : len(short)]) for a, b in zip(alone, beside, strict=True))


def write_rope(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Writes `rope_scaling` and `rope_theta`, the keys of 2024, into `rope_parameters`, the dictionary of both.

    Returns:
        False where the name is neither, and nothing was written.

    Raises:
        ModelError: a config whose kinds of layers have a dictionary each.
    """
    if name not in ("rope_scaling", "rope_theta") or not isinstance(getattr(config, "rope_parameters", None), dict):
        return False
    own = dict(config.rope_parameters)
    if any(isinstance(entry, dict) for entry in own.values()):
        raise ModelError(
            f"{_OVERRIDES}.{name}: {config.model_type} has one for each kind of layer; set rope_parameters, as its "
            "config.json has it"
        )
    if name == "rope_theta":
        config.rope_parameters = own | {"rope_theta": value}
        return True
    if not isinstance(value, dict | None):
        raise ModelError(f"{_OVERRIDES}.rope_scaling is a dictionary with rope_type, or null, got {value!r}")
    scaling = dict(value or {"rope_type": "default"})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
    config.rope_parameters = kept | scaling
    return True


def check_rope(config: PretrainedConfig) -> None:
    """Raises ModelError for rotary parameters that no model can be built with."""
    own = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in own.values() if isinstance(entry, dict)] if isinstance(own, dict) else []
    for entry in nested or [own]:
        kind = entry.get("rope_type", entry.get("type", "default")) if isinstance(entry, dict) else entry
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ModelError(
                f"model.language_model: rope_parameters has rope_type={kind}, which transformers does not know; it "
                f"knows default, {', '.join(ROPE_INIT_FUNCTIONS)}"
            )
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model.language_model: rope_parameters={own} is not complete: {error}") from error
