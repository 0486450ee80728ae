"""Weights from disk for a freshly built model: what `stage.init_from` may name.

A connector (ours or the authors'), or a whole model: a Hugging Face `llava_next` or `llava` directory in its published
or transformers 5's names, or one in the authors' own (LLaVA-1.5, LLaVA-NeXT; safetensors or `.bin`). Every tensor is
accounted for by name and shape; what a directory does not hold by its nature is said, nothing is made up in silence.
They are mapped first, and copied one at a time.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LlavaConfig, LlavaNextConfig

from llava_next.config import ModelError, ProjectorKind
from llava_next.formats.atomic import check_names, check_shape, copy_tensor
from llava_next.formats.connector import CONTRACT, MM_PROJECTOR, read_connector, read_mm_projector
from llava_next.formats.hugging_face import NEWLINE, SECOND_LAYER, check_identity
from llava_next.formats.tensor_names import as_published, from_original, published_name
from llava_next.formats.tensors import LazyTensor, read_folder
from llava_next.inputs.anyres import grids_of_pinpoints
from llava_next.model.build import Backbone, extend_vocab
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters
from llava_next.model.released import is_original, original_kind, projector_kind

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_HF_TYPES = (LlavaNextConfig.model_type, LlavaConfig.model_type)


def load_weights(model: LlavaNext, backbone: Backbone, source: Path) -> str:
    """Loads what `read_weights` finds into a freshly built model. Parameters on the meta device are compared and left
    empty.

    Returns:
        A sentence on what was loaded.

    Raises:
        ModelError: as `read_weights` does.
    """
    tensors, said = read_weights(model, backbone, source)
    parameters = dict(live_parameters(model))
    with _reading(source):
        for name, tensor in tensors.items():
            if not parameters[name].is_meta:
                copy_tensor(parameters[name], tensor.value(), name, source)
    return said


def read_weights(model: LlavaNext, backbone: Backbone, source: Path) -> tuple[dict[str, LazyTensor], str]:
    """A connector (ours, or the authors' `mm_projector.bin`, as a file or in its folder), or a whole model, by live
    names, none of a whole model's tensors read.

    Args:
        model: whose parameters they are to fit, which may be on the meta device; it is left as it is.

    Returns:
        The tensors in their own types, and a sentence on what was found. Parameters that are not among them keep their
        fresh values, as the sentence says.

    Raises:
        ModelError: nothing that can be loaded lies there, or it does not fit: the tensor, both shapes, the way out.
    """
    if source.is_file():
        return read_mm_projector(model, backbone, source)
    with _reading(source):
        if (source / CONTRACT).is_file():
            return read_connector(model, backbone, source)
        if (source / MM_PROJECTOR).is_file():
            _refuse_whole_model_beside(source)
            return read_mm_projector(model, backbone, source / MM_PROJECTOR)
        if (source / "config.json").is_file():
            return _read_model(model, backbone, source)
    raise ModelError(
        f"stage.init_from={source} holds neither a connector ({CONTRACT} or {MM_PROJECTOR}) nor a model (config.json); "
        "run stage=align first, or start from fresh parts with stage.init_from=null"
    )


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        raise ModelError(
            f"stage.init_from={source} cannot be read, a file in it is damaged or missing: {error}"
        ) from error


def _refuse_whole_model_beside(source: Path) -> None:
    beside = [*source.glob("model*.safetensors"), *source.glob("pytorch_model*.bin")]
    if beside:
        raise ModelError(
            f"stage.init_from={source} holds a connector ({MM_PROJECTOR}) and a whole model ({beside[0].name}); name "
            "the file to start from the connector alone, or take it away to start from the model"
        )


def _read_model(model: LlavaNext, backbone: Backbone, source: Path) -> tuple[dict[str, LazyTensor], str]:
    config = json.loads((source / "config.json").read_text())
    if is_original(config):
        kind, said = original_kind(config, source), [f"model from {source} in the authors' layout"]
        theirs = {from_original(name, kind): tensor for name, tensor in read_folder(source).items()}
    elif config.get("model_type") in _HF_TYPES:
        kind, said = projector_kind(config, source), [f"model from {source}"]
        tower_type = backbone.hf_config.vision_config.model_type
        theirs = {as_published(name, tower_type): tensor for name, tensor in read_folder(source).items()}
    else:
        raise ModelError(
            f"{source} is of model_type {config.get('model_type')} ({', '.join(config.get('architectures') or [])}), "
            "which is no LLaVA: Hugging Face's llava and llava_next are read, and the authors' LlavaLlamaForCausalLM, "
            "LlavaMistralForCausalLM and LlavaQwenForCausalLM; a language model alone is model.language_model.path"
        )
    _check_config(config, kind, backbone, source)
    tower_type = backbone.hf_config.vision_config.model_type
    live = {published_name(name, tower_type): name for name, _ in live_parameters(model)}
    ours = {published_name(name, tower_type): parameter for name, parameter in live_parameters(model)}
    if kind == "linear" and not is_original(config):
        for name in SECOND_LAYER:
            if name in theirs:
                check_identity(theirs.pop(name).value(), name, source)
    _drop_tied_head(ours, theirs, source)
    if is_original(config):
        said += _leave_tower(ours, theirs, backbone, source)
        said += _grow_vocabulary(ours, theirs)
    if NEWLINE not in theirs and _is_single_view(config):
        del ours[NEWLINE]
        said.append("a LLaVA has no image_newline, which starts fresh")
    check_names(ours, set(theirs), source)
    for name, parameter in ours.items():  # all shapes before the first weight
        check_shape(parameter, theirs[name], name, source)
        if not theirs[name].dtype.is_floating_point:
            dtype = str(theirs[name].dtype).removeprefix("torch.")
            raise ModelError(
                f"{source}: {name} is of type {dtype}, no weight's; give a directory that is not quantised"
            )
    found = {live[name]: theirs[name].renamed(live[name]) for name in ours}
    return found, said[0] + (f" ({'; '.join(said[1:])})" if said[1:] else "")


def _is_single_view(config: dict[str, Any]) -> bool:
    if is_original(config):
        return "unpad" not in config.get("mm_patch_merge_type", "flat")
    return bool(config["model_type"] == LlavaConfig.model_type)


def _check_config(config: dict[str, Any], kind: ProjectorKind, backbone: Backbone, source: Path) -> None:
    """What tensors' shapes do not tell: the projector's kind, the feature layer, the grids, the image token."""
    ours = backbone.config.projector
    if kind != ours:
        raise ModelError(
            f"the model in {source} has a projector of kind {kind}, this one's is {ours}; choose model.projector={kind}"
        )
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    depth = backbone.hf_config.vision_config.num_hidden_layers
    mine = backbone.config.vision_tower.feature_layer
    if not isinstance(layer, int) or layer % (depth + 1) != mine % (depth + 1):
        raise ModelError(
            f"the model in {source} was trained on the tower's layer {layer}, model.vision_tower.feature_layer is "
            f"{mine}; choose model.vision_tower.feature_layer={layer}"
        )
    strategy = backbone.hf_config.vision_feature_select_strategy
    if config.get("vision_feature_select_strategy", strategy) != strategy or (
        config.get("mm_vision_select_feature") == "cls_patch" and strategy == "default"
    ):
        raise ModelError(
            f"the model in {source} takes another choice of its tower's tokens than the patches that this one takes "
            f"({strategy}): class tokens as image tokens are not implemented"
        )
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, list) and pinpoints:
        tile = config.get("vision_config", {}).get("image_size", backbone.tile)
        try:
            grids_of_pinpoints(pinpoints, tile)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error
    theirs, token = config.get("image_token_index", config.get("image_token_id")), backbone.hf_config.image_token_index
    if not is_original(config) and theirs is not None and theirs != token:
        raise ModelError(
            f"the model in {source} has its image token at {theirs}, this tokenizer at {token}: it is another one; "
            f"choose model.language_model.tokenizer={source}"
        )


def _drop_tied_head(ours: dict[str, nn.Parameter], theirs: dict[str, LazyTensor], source: Path) -> None:
    """Some files hold a shared head a second time."""
    if HEAD in theirs and HEAD not in ours and EMBEDDING in theirs:
        if not torch.equal(theirs[HEAD].value(), theirs[EMBEDDING].value()):
            raise ModelError(
                f"{source} has a head ({HEAD}) that is not its embedding, and this model's share one tensor; choose "
                "+model.language_model.overrides.tie_word_embeddings=false"
            )
        del theirs[HEAD]


def _leave_tower(
    ours: dict[str, nn.Parameter], theirs: dict[str, LazyTensor], backbone: Backbone, source: Path
) -> list[str]:
    """A LLaVA-1.5 never tuned its tower and holds none of it: the one that is there stays."""
    if any(name.startswith("vision_tower.") for name in theirs):
        return []
    tower = backbone.config.vision_tower
    if tower.weights != "pretrained":
        named = json.loads((source / "config.json").read_text()).get("mm_vision_tower")
        raise ModelError(
            f"{source} holds no vision tower, and model.vision_tower.weights={tower.weights} brings none; choose the "
            f"pretrained tower that it was trained with ({named})"
        )
    for name in [name for name in ours if name.startswith("vision_tower.")]:
        del ours[name]
    return [f"it holds no vision tower: that of {tower.path} stays"]


def _grow_vocabulary(ours: dict[str, nn.Parameter], theirs: dict[str, LazyTensor]) -> list[str]:
    """The authors' tables end where their tokenizer does: rows of ours behind that are as `build.py` makes new ones."""
    said = []
    for name in (EMBEDDING, HEAD):
        if name not in ours or name not in theirs or len(theirs[name].shape) != 2:
            continue
        old, new = theirs[name].shape[0], ours[name].shape[0]
        if old < new and theirs[name].shape[1:] == ours[name].shape[1:]:
            theirs[name] = theirs[name].mapped(_grower(new), tuple(ours[name].shape), theirs[name].dtype)
            said = [f"rows {old} to {new - 1} of its vocabulary, which it lacks, start as the mean of the others"]
    return said


def _grower(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda table: extend_vocab(table.float(), size).to(table.dtype)  # theirs may be fp16, whose sums overflow
