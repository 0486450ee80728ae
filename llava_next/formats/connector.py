"""Reads and writes connectors: the projector and the newline vector that the align stage passes to the finetune stage.

A connector directory contains a contract that names the tower, the language model and the kind of projector, so that a
mismatch is an error before training. The authors' `mm_projector.bin` has no contract: its tensor names give the kind of
projector, and only its shapes are compared.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from llava_next.config import ModelError, ProjectorKind
from llava_next.formats.atomic import atomic_directory
from llava_next.formats.tensor_names import AUTHORS_PROJECTORS, NEWLINE, to_authors_name
from llava_next.formats.tensors import (
    Gather,
    LazyTensor,
    check_shape,
    check_tensor_names,
    from_tensor,
    no_gather,
    read_plain_tensors,
    write_safetensors,
)
from llava_next.model.build import Backbone
from llava_next.model.checkpoint_config import read_json
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters

CONTRACT = "contract.json"
MM_PROJECTOR = "mm_projector.bin"
_TENSORS = "connector.safetensors"
_LIVE_PREFIXES = ("hf.model.multi_modal_projector.", "hf.model.image_newline")
_AUTHORS_PREFIX = re.compile(r"^(?:(?:module|base_model|model)\.)+")
"""Prefixes of tensor names in the authors' files, which depend on DDP and LoRA."""


def write_connector(
    model: LlavaNext,
    backbone: Backbone,
    target: Path | None,
    gather: Gather = no_gather,
    *,
    attachments: Sequence[Path] = (),
) -> None:
    """Writes the projector and the newline vector with the contract that the next stage checks.

    Args:
        model: its weights are written in their dtype.
        backbone: the configuration that the contract records.
        target: the directory; None on ranks that only take part in gathering.
        gather: completes partitioned parameters.
        attachments: files that are copied into the directory.
    """
    with atomic_directory(target, attachments) as folder:
        tensors = {}
        for name, parameter in _connector_parameters(model).items():
            with gather([parameter]):
                if folder is not None:
                    tensors[name] = parameter.detach().cpu().clone().contiguous()
        if folder is None:
            return
        write_safetensors(tensors, folder / _TENSORS)
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
    """Reads a directory written by `write_connector`.

    Returns:
        The tensors by parameter name of `LlavaNext`, and a description for the log.

    Raises:
        ModelError: the connector was trained for other parts, a tensor is missing or has another shape, or a checksum
            differs from the contract's.
        SafetensorError, OSError, KeyError, json.JSONDecodeError: a file is damaged.
    """
    contract = read_json(source / CONTRACT)
    for key, value in _identity(backbone).items():
        if key not in contract and key in _LATER_KEYS:
            continue
        if contract[key] != value:
            fix = f"set model.projector={contract[key]}" if key == "projector" else "train one with stage=align"
            raise ModelError(
                f"the connector in {source} was trained for {key}={contract[key]}, this model has {value}; {fix}, or "
                "initialize the parts with stage.init_from=null"
            )
    parameters = _connector_parameters(model)
    with safe_open(source / _TENSORS, framework="pt") as file:
        check_tensor_names(parameters, set(file.keys()), source)
        tensors = {name: file.get_tensor(name) for name in parameters}
    for name, tensor in tensors.items():
        if _sha256(tensor) != contract["tensors"][name]["sha256"]:
            raise ModelError(
                f"{source}: the checksum of {name} is not the one in {CONTRACT}, the file is damaged; copy it again"
            )
        check_shape(parameters[name], tensor, name, source)
    newline = "trained" if contract["image_newline_trained"] else "not trained"
    return _with_parameter_names(tensors), f"connector from {source} (image_newline {newline})"


def read_mm_projector(model: LlavaNext, backbone: Backbone, path: Path) -> tuple[dict[str, LazyTensor], str]:
    """Reads a connector written by the authors' trainer (`mm_projector.bin`).

    Returns:
        The tensors by parameter name of `LlavaNext`, and a description for the log. `image_newline` is absent if the
        file does not contain it, as in LLaVA-1.5; the vector then keeps its initial values.

    Raises:
        ModelError: the file contains anything but tensors, another kind of projector, or a tensor of another shape.
    """
    by_full_name = read_plain_tensors(path, f"the authors' {MM_PROJECTOR}")
    full_names = {_AUTHORS_PREFIX.sub("", name): name for name in by_full_name}
    kind = _projector_kind(set(full_names), path)
    if len(full_names) != len(by_full_name):
        raise ModelError(f"stage.init_from={path} contains a tensor under two prefixes: {sorted(by_full_name)}")
    if kind != backbone.config.projector:
        raise ModelError(
            f"stage.init_from={path} is a projector of kind {kind}, this model's is {backbone.config.projector}; "
            f"set model.projector={kind}, or initialize the parts with stage.init_from=null"
        )
    tensors = {}
    for name, parameter in _connector_parameters(model).items():
        full_name = full_names.get(to_authors_name(name))
        if full_name is None:  # only the newline can be missing, `_projector_kind` has checked the others
            continue
        tensors[name] = tensor = by_full_name[full_name]
        check_shape(parameter, tensor, full_name, path)
        if not tensor.is_floating_point():
            raise ModelError(
                f"stage.init_from={path}: {full_name} has dtype {_dtype(tensor)}; use floating-point weights"
            )
    dtypes = "/".join(sorted({_dtype(tensor) for tensor in by_full_name.values()}))
    newline = "with image_newline" if NEWLINE in full_names else "without image_newline, which is newly initialized"
    return _with_parameter_names(tensors), (
        f"projector ({kind}, {dtypes}) from {path}, {newline}; the file does not name its tower and language model, so "
        "only shapes were compared"
    )


def _connector_parameters(model: LlavaNext) -> dict[str, nn.Parameter]:
    """The connector's parameters by their names on disk."""
    return {
        name.removeprefix("hf.model."): parameter
        for name, parameter in live_parameters(model)
        if name.startswith(_LIVE_PREFIXES)
    }


def _with_parameter_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {f"hf.model.{name}": from_tensor(f"hf.model.{name}", tensor) for name, tensor in tensors.items()}


def _identity(backbone: Backbone) -> dict[str, Any]:
    """The values that must agree between the connector and a model: tower features, embedding space, projector."""
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
"""Keys that contracts of earlier versions do not have."""


def _projector_kind(names: set[str], path: Path) -> ProjectorKind:
    for kind, expected in AUTHORS_PROJECTORS.items():
        if names - {NEWLINE} == expected:
            return kind
    known = "; ".join(f"{kind} has {', '.join(sorted(expected))}" for kind, expected in AUTHORS_PROJECTORS.items())
    shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise ModelError(f"stage.init_from={path} is not a supported connector: it contains {shown}; {known}")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
