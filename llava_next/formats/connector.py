"""The hand-over between the stages: projector and newline vector, written with a contract and read back by the next
stage; and the authors' `mm_projector.bin`, which can take its place.

A contract names the tower, the language model and the kind of projector, so that a mismatch is told before training.
The authors' file names nothing: its tensors' names tell the kind, their shapes the rest. Whole models are
`hugging_face.py`'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llava_next.config import ModelError, ProjectorKind
from llava_next.formats.atomic import Gather, check_names, check_shape, complete_or_absent, no_gather
from llava_next.formats.tensor_names import AUTHORS_PROJECTORS, authors_name
from llava_next.formats.tensors import LazyTensor, from_tensor, read_plain_tensors
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters

CONTRACT = "contract.json"
MM_PROJECTOR = "mm_projector.bin"
_TENSORS = "connector.safetensors"
_LIVE_PREFIXES = ("hf.model.multi_modal_projector.", "hf.model.image_newline")
_NEWLINE = "image_newline"
_AUTHORS_PREFIX = re.compile(r"^(?:(?:module|base_model|model)\.)+")
"""What the authors' files have before a name, after DDP, after LoRA, or not at all."""


def write_connector(model: LlavaNext, backbone: Backbone, target: Path | None, gather: Gather = no_gather) -> None:
    """Writes the projector and the newline vector with the contract that the next stage checks.

    Args:
        model: the live model; its weights are written in their own dtype.
        backbone: names what the connector was trained for.
        target: the directory, or None on ranks that only help to gather.
        gather: makes parameters whole while inside it.
    """
    with complete_or_absent(target) as folder:
        tensors = {}
        for name, parameter in _parameters(model).items():
            with gather([parameter]):
                if folder is not None:
                    tensors[name] = parameter.detach().cpu().clone().contiguous()
        if folder is None:
            return
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
        contract = {
            **_identity(backbone),
            "image_newline_trained": bool(model.hf.model.image_newline.requires_grad),
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": _dtype(tensor),
                    "sha256": _sha256(tensor),
                }
                for name, tensor in tensors.items()
            },
        }
        (folder / CONTRACT).write_text(json.dumps(contract, indent=1) + "\n")


def read_connector(model: LlavaNext, backbone: Backbone, source: Path) -> tuple[dict[str, LazyTensor], str]:
    """What `write_connector` wrote, by live names, for a model of these shapes, and a sentence on it.

    Raises:
        ModelError: it was trained for other parts, lacks a tensor, or its bytes are not those of the contract.
        SafetensorError, OSError, KeyError, json.JSONDecodeError: a damaged file.
    """
    contract = json.loads((source / CONTRACT).read_text())
    for key, ours in _identity(backbone).items():
        if key not in contract and key in _LATER_KEYS:
            continue
        if contract[key] != ours:
            choose = f"choose model.projector={contract[key]}" if key == "projector" else "train one with stage=align"
            raise ModelError(
                f"the connector in {source} was trained for {key}={contract[key]}, this model has {ours}; {choose}, or "
                "start from fresh parts with stage.init_from=null"
            )
    found = _parameters(model)
    with safe_open(source / _TENSORS, framework="pt") as file:
        check_names(found, set(file.keys()), source)
        tensors = {name: file.get_tensor(name) for name in found}
    for name, tensor in tensors.items():
        if _sha256(tensor) != contract["tensors"][name]["sha256"]:
            raise ModelError(f"{source}: the bytes of {name} are not the ones in {CONTRACT}; the file is damaged")
        check_shape(found[name], tensor, name, source)
    newline = "trained" if contract["image_newline_trained"] else "not trained"
    return _live(tensors), f"connector from {source} (image_newline {newline})"


def read_mm_projector(model: LlavaNext, backbone: Backbone, path: Path) -> tuple[dict[str, LazyTensor], str]:
    """A connector as the authors' trainer writes it (`mm_projector.bin`), by live names, and a sentence on it.

    `image_newline` is not among them where the file has none, as LLaVA-1.5's: that vector keeps its fresh values.

    Raises:
        ModelError: no plain tensors, another kind of projector, or another shape: the tensor, both shapes, the way out.
    """
    by_full_name = read_plain_tensors(path, f"the authors' own {MM_PROJECTOR}")
    full_names = {_AUTHORS_PREFIX.sub("", name): name for name in by_full_name}
    kind = _kind(set(full_names), path)
    if len(full_names) != len(by_full_name):
        raise ModelError(f"stage.init_from={path} has a tensor twice, under two prefixes: {sorted(by_full_name)}")
    if kind != backbone.config.projector:
        raise ModelError(
            f"stage.init_from={path} is a projector of kind {kind}, this model's is {backbone.config.projector}; "
            f"choose model.projector={kind}, or start from fresh parts with stage.init_from=null"
        )
    tensors = {}
    for name, parameter in _parameters(model).items():
        full_name = full_names.get(authors_name(name))
        if full_name is None:  # the newline, as the kind has told
            continue
        tensors[name] = tensor = by_full_name[full_name]
        check_shape(parameter, tensor, full_name, path)
        if not tensor.is_floating_point():
            raise ModelError(f"stage.init_from={path}: {full_name} is of type {_dtype(tensor)}, no weight's")
    dtypes = "/".join(sorted({_dtype(tensor) for tensor in by_full_name.values()}))
    newline = "image_newline from it too" if _NEWLINE in full_names else "it has no image_newline, which starts fresh"
    return _live(tensors), (
        f"projector ({kind}, {dtypes}) from {path}: {newline}; the file does not say for which tower and language "
        "model, only its shapes were compared"
    )


def _parameters(model: LlavaNext) -> dict[str, nn.Parameter]:
    """The connector's parameters, by their names on disk."""
    return {
        name.removeprefix("hf.model."): parameter
        for name, parameter in live_parameters(model)
        if name.startswith(_LIVE_PREFIXES)
    }


def _live(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {f"hf.model.{name}": from_tensor(f"hf.model.{name}", tensor) for name, tensor in tensors.items()}


def _identity(backbone: Backbone) -> dict[str, Any]:
    """What a connector depends on: the tower's features, the language model's embedding space, its own kind."""
    vision, text = backbone.hf_config.vision_config, backbone.hf_config.text_config
    return {
        "language_model": backbone.config.language_model.name,
        "vision_tower": backbone.config.vision_tower.name,
        "feature_layer": backbone.config.vision_tower.feature_layer,
        "vision_width": vision.hidden_size,
        "language_width": text.hidden_size,
        "projector": backbone.config.projector,
        "image_mean": list(backbone.config.vision_tower.image_mean),
        "image_std": list(backbone.config.vision_tower.image_std),
    }


_LATER_KEYS = ("image_mean", "image_std")
"""Of a contract: connectors that were written before the keys were added have none of them."""


def _kind(names: set[str], path: Path) -> ProjectorKind:
    for kind, expected in AUTHORS_PROJECTORS.items():
        if names - {_NEWLINE} == expected:
            return kind
    known = "; ".join(f"{kind} has {', '.join(sorted(expected))}" for kind, expected in AUTHORS_PROJECTORS.items())
    shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise ModelError(f"stage.init_from={path} is no connector of a known kind: its tensors are {shown}; {known}")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
