"""Builds the configs, the tokenizer, the processor and the model of a `ModelConfig`.

The steps are separate: the length table needs a processor but no model, and the planner needs configs but no weights.
"""

import copy
import json
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from llava_next.config import (
    PARTS,
    AttentionKernel,
    ModelConfig,
    ModelError,
    ProcessorConfig,
    TemplateConfig,
    ViewsConfig,
    check_grids,
)
from llava_next.file_access import permission_problem
from llava_next.inputs.chat_template import is_bos_added, set_post_processor
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import Processor
from llava_next.model.architecture import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    Architecture,
    check_directory,
    check_not_whole_model,
    join_configs,
    read_config,
)
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import prepare_tower_config


@dataclass(frozen=True)
class Backbone(Architecture):
    """The joined configs and the tokenizer of a model, before weights are read."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def _mean_color(self) -> tuple[int, int, int]:
        """The color that is normalized to zero, rounded as in the authors' code."""
        red, green, blue = (int(mean * 255) for mean in self.config.vision_tower.image_mean)
        return red, green, blue

    def processor(
        self,
        *,
        template: str | TemplateConfig | None,
        views: ViewsConfig,
        max_length: int,
        unmask_special_tokens: bool = False,
    ) -> Processor:
        """Builds the processor of a stage.

        Args:
            template: the chat template, as in `ProcessorConfig`; None means the language model's.
            views: how images become views.
            max_length: maximum length of a sample in tokens.
            unmask_special_tokens: see `ProcessorConfig`.

        Raises:
            ModelError: the template or a view is unknown, the template does not match the tokenizer, or the maximum
                length exceeds the model's positions.
        """
        self.check_length(max_length)
        return Processor(
            self.tokenizer,
            ProcessorConfig(
                template=template or self.config.language_model.template,
                views=views,
                grids=self.config.grids,
                tile=self.tile,
                patches_per_side=self.patches_per_side,
                max_length=max_length,
                unmask_special_tokens=unmask_special_tokens,
                pad_colour=self._mean_color if "pad" in views.modes else None,
            ),
        )


def read_backbone(config: ModelConfig) -> Backbone:
    """Reads both configs and the tokenizer, adds the image token, and joins the configs.

    Raises:
        ModelError: a directory or file does not exist, a part is not supported, or the tile is neither the tower's
            image size nor a multiple of its patch.
    """
    check_grids(config.grids)
    language, tower = config.language_model, config.vision_tower
    text = read_config(language.path, language.overrides, LANGUAGE_MODEL)
    if language.weights == "pretrained":
        check_not_whole_model(language.path)
    vision = read_config(tower.path, tower.overrides, VISION_TOWER)
    tokenizer = read_tokenizer(language.tokenizer_path)
    hf_config = join_configs(
        config,
        text,
        vision,
        num_tokens=len(tokenizer),
        image_token=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        pad_token=tokenizer.pad_token_id,
    )
    return Backbone(config, hf_config, tokenizer)


def read_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Reads a tokenizer and adds the image token and a padding token if it lacks them.

    Raises:
        ModelError: transformers cannot read a tokenizer from the directory.
    """
    check_directory(path, "model.language_model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = permission_problem(Path(path)) or f"cannot read a tokenizer in {path}: {error}"
        raise ModelError(f"model.language_model.tokenizer: {reason}") from error
    if not (Path(path) / "tokenizer.json").exists():
        _order_merges_by_score(tokenizer, Path(path) / "tokenizer.model")
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_PLACEHOLDER]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.is_fast:  # `Processor` raises an error for a slow one
        set_post_processor(tokenizer, add_bos=is_bos_added(tokenizer))
    return tokenizer


def _order_merges_by_score(tokenizer: Any, model_file: Path) -> None:
    """Orders the merges of a tokenizer that was read from a sentencepiece model by the scores of their results.

    transformers 5.23 orders them by token id. Llama's and Mistral's models give runs of spaces the first ids and the
    lowest scores, so text with several spaces in a row would get other tokens than sentencepiece gives.

    Args:
        tokenizer: is modified if it is a BPE tokenizer.
        model_file: the sentencepiece model. Nothing is changed if it does not exist or has another format.
    """
    # Imported here because most tokenizers need neither.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model_file.read_bytes())
    except (OSError, DecodeError):
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        return
    scores = {piece.piece: piece.score for piece in proto.pieces}
    merges = sorted(map(tuple, model["merges"]), key=lambda pair: -scores["".join(pair)])
    options = {key: model[key] for key in ("unk_token", "fuse_unk", "byte_fallback")}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges, **options)


def build_model(
    backbone: Backbone,
    *,
    dtype: torch.dtype,
    seed: int,
    num_sources: int = 1,
    attention: AttentionKernel = "auto",
    parts: Collection[str] = PARTS,
) -> LlavaNext:
    """Builds the model with the initial weights of its parts. Random weights depend only on the seed, not on the rank.

    Args:
        backbone: configs and tokenizer.
        dtype: of all weights.
        seed: of weights that are not read from a file.
        num_sources: length of the per-source loss sums.
        attention: the attention kernel of packed samples.
        parts: parts that get weights; the others stay on the meta device. The weights of a random part depend on those
            drawn before it, so `parts` must then contain all of them.

    Raises:
        ModelError: weights are missing or do not agree with the config.
    """
    config = backbone.config
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        hf = build_meta_model(backbone)
        if not hasattr(hf.model.language_model, "embed_tokens"):
            raise ModelError(
                f"model.language_model: {backbone.hf_config.text_config.model_type} has no module embed_tokens, which "
                "LLaVA-NeXT requires; choose a Llama-like model"
            )
        if "language_model" in parts:
            language = _language_model(backbone, dtype)
            hf.model.language_model = language.base_model
            hf.lm_head = language.get_output_embeddings()
        if "vision_tower" in parts:
            hf.model.vision_tower = _vision_tower(backbone, dtype)
        torch.manual_seed(seed)  # again, so that the connector does not depend on numbers drawn for the other parts
        if "projector" in parts:
            hf.model.multi_modal_projector.to_empty(device="cpu")
            for module in hf.model.multi_modal_projector.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()  # torch's default initialization, as in the authors' projector
        if "image_newline" in parts:
            width = backbone.hf_config.text_config.hidden_size
            hf.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        for (
            parameter
        ) in hf.parameters():  # not buffers: bf16 rotary frequencies would be wrong by radians at late positions
            parameter.data = parameter.data.to(dtype)
        if backbone.hf_config.tie_word_embeddings:
            hf.lm_head.weight = hf.get_input_embeddings().weight
    finally:
        torch.random.set_rng_state(generator_state)
    return LlavaNext(
        hf,
        image_mean=config.vision_tower.image_mean,
        image_std=config.vision_tower.image_std,
        num_sources=num_sources,
        attention=attention,
    )


def build_meta_model(backbone: Architecture) -> LlavaNextForConditionalGeneration:
    """Builds the stock model on the meta device, with the projector of `model.projector`."""
    with torch.device("meta"):
        hf = LlavaNextForConditionalGeneration(backbone.hf_config)
        if backbone.config.projector == "linear":
            hf.model.multi_modal_projector = nn.Linear(
                backbone.hf_config.vision_config.hidden_size, backbone.hf_config.text_config.hidden_size
            )
    return hf


def _initialization(weights: str) -> AbstractContextManager[None]:
    """Context manager that skips the initialization of a part whose weights `load_weights.py` replaces.

    Drawing random weights for a large part takes minutes.
    """
    context: AbstractContextManager[None] = no_init_weights() if weights == "init_from" else nullcontext()
    return context


def _language_model(backbone: Backbone, dtype: torch.dtype) -> Any:
    text, config = backbone.hf_config.text_config, backbone.config.language_model
    if config.weights != "pretrained":
        with _initialization(config.weights):
            return AutoModelForCausalLM.from_config(text, dtype=dtype)
    pretrained_size = AutoConfig.from_pretrained(config.path).vocab_size
    size, text.vocab_size = text.vocab_size, pretrained_size
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            config.path, config=text, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = permission_problem(Path(config.path)) or f"cannot read the weights in {config.path}: {error}"
        raise ModelError(f"model.language_model.path: {reason}") from error
    finally:
        text.vocab_size = size
    require_all_weights_loaded(loading_info, f"model.language_model.path={config.path}")
    if size != pretrained_size:
        _resize_vocabulary(model, size)
    return model


def require_all_weights_loaded(loading_info: dict[str, Any], source: str) -> None:
    """Raises ModelError if loading left a tensor at random values, for which transformers only logs a warning.

    Args:
        loading_info: from `from_pretrained(..., output_loading_info=True)`.
        source: for the message.
    """
    missing = sorted(loading_info["missing_keys"])
    mismatched = sorted(str(entry) for entry in loading_info["mismatched_keys"])
    if missing or mismatched:
        problem = f"lacks {missing[0]}" if missing else f"has another shape for {mismatched[0]}"
        raise ModelError(
            f"{source} {problem} ({len(missing) + len(mismatched)} such tensors), which would be initialized at "
            "random; give a directory whose weights match its config.json"
        )


def _resize_vocabulary(model: Any, size: int) -> None:
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data.copy_(extend_vocab(weight.data[:old], size))


def extend_vocab(table: torch.Tensor, size: int) -> torch.Tensor:
    """Extends a vocabulary table from [n, D] to [size, D].

    New rows are the mean of the others, in the table's dtype, so that a new token has an average embedding and logit.
    """
    return torch.cat([table, table.mean(dim=0, keepdim=True).expand(size - len(table), -1)])


def _vision_tower(backbone: Backbone, dtype: torch.dtype) -> nn.Module:
    vision, config = backbone.hf_config.vision_config, backbone.config.vision_tower
    if config.weights != "pretrained":
        with _initialization(config.weights):
            return AutoModel.from_config(vision, dtype=dtype)
    native = copy.deepcopy(vision)  # with overrides, at the image size of the weights
    native.image_size = prepare_tower_config(AutoConfig.from_pretrained(config.path)).image_size
    try:
        tower, loading_info = AutoModel.from_pretrained(
            config.path, config=native, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = permission_problem(Path(config.path)) or f"cannot read the weights in {config.path}: {error}"
        raise ModelError(f"model.vision_tower.path: {reason}") from error
    require_all_weights_loaded(loading_info, f"model.vision_tower.path={config.path}")
    if vision.image_size == native.image_size:
        return tower
    resized = AutoModel.from_config(vision, dtype=dtype)
    shapes = {name: value.shape for name, value in resized.state_dict().items()}
    state = {
        name: resample_positions(value, shapes[name]) if value.shape != shapes[name] else value
        for name, value in tower.state_dict().items()
    }
    resized.load_state_dict(state)
    return resized


def resample_positions(table: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resamples a position embedding to another number of patches (bicubic); a class token's row is unchanged.

    Args:
        table: [n, D] (CLIP, SigLIP) or [1, n, D] (DINOv2), where n or n - 1 is a square number.
        shape: of the result, of the same form.

    Raises:
        ModelError: the number of positions in `table` or in `shape` has another form.
    """
    rows, num_rows = table.reshape(-1, table.shape[-1]).float(), shape[-2]
    prefix = len(rows) - int(len(rows) ** 0.5) ** 2
    side, new_side = int((len(rows) - prefix) ** 0.5), int((num_rows - prefix) ** 0.5)
    if side * side + prefix != len(rows) or new_side * new_side + prefix != num_rows:
        raise ModelError(
            f"model.vision_tower.tile: {len(rows)} position embeddings cannot be resampled to {num_rows}; use null for "
            "the tower's image size"
        )
    grid = rows[prefix:].T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False, antialias=True)
    resampled = torch.cat([rows[:prefix], grid.flatten(2)[0].T])
    return resampled.reshape(tuple(shape)).to(table.dtype)
