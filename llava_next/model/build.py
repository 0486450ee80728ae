"""A `ModelConfig` → Hugging Face configs, tokenizer, processor, and the model with its first weights.

Each of these can be had without the ones after it: the length table needs a processor and no model, the planner needs
configs and no weights. Directories of whole LLaVA-NeXT models are `hugging_face.py`'s; the first weights one tensor at
a time, without a model around them, `initial_weights.py`'s.
"""

import copy
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
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

from llava_next.config import PARTS, AttentionKernel, ImageMode, ModelConfig, ModelError, ProcessorConfig, check_grids
from llava_next.inputs.chat_template import adds_bos, set_post_processor
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import Processor
from llava_next.model.architecture import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    Architecture,
    check_directory,
    join_configs,
    read_config,
    refuse_whole_model,
)
from llava_next.model.llava_next import LlavaNext
from llava_next.model.towers import tower_config


@dataclass(frozen=True)
class Backbone(Architecture):
    """The parts of a model before any weight is read: configs and tokenizer, in agreement with one another."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def _mean_colour(self) -> tuple[int, int, int]:
        """The colour that becomes zero, as the authors round it."""
        red, green, blue = (int(mean * 255) for mean in self.config.vision_tower.image_mean)
        return red, green, blue

    def processor(
        self, *, template: str | None, image_mode: ImageMode, max_length: int, unmask_special_tokens: bool = False
    ) -> Processor:
        """The processor of one stage; `template` None takes the language model's own.

        Raises:
            ModelError: unknown template, or a maximum length beyond the model's positions.
        """
        self.check_length(max_length)
        return Processor(
            self.tokenizer,
            ProcessorConfig(
                template=template or self.config.language_model.template,
                image_mode=image_mode,
                grids=self.config.grids,
                tile=self.tile,
                patches_per_side=self.patches_per_side,
                max_length=max_length,
                unmask_special_tokens=unmask_special_tokens,
                pad_colour=self._mean_colour if image_mode == "pad" else None,
            ),
        )


def read_backbone(config: ModelConfig) -> Backbone:
    """Reads both configs and the tokenizer, adds the image token, and derives what follows from them.

    Raises:
        ModelError: a directory or file that is not there, a model that is not supported, or a tile of another size
            than the tower's own that its patch does not divide.
    """
    check_grids(config.grids)
    language, tower = config.language_model, config.vision_tower
    text = read_config(language.path, language.overrides, LANGUAGE_MODEL)
    if language.weights == "pretrained":
        refuse_whole_model(language.path)
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
    """A fast tokenizer that knows the image token and a padding token.

    Raises:
        ModelError: nothing that transformers reads as a tokenizer lies there.
    """
    check_directory(path, "model.language_model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.language_model.tokenizer: no tokenizer could be read in {path}: {error}") from error
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_PLACEHOLDER]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.is_fast:  # `Processor` refuses another, with its name
        set_post_processor(tokenizer, adds_bos=adds_bos(tokenizer))
    return tokenizer


def build_model(
    backbone: Backbone,
    *,
    dtype: torch.dtype,
    seed: int,
    num_sources: int = 1,
    attention: AttentionKernel = "auto",
    parts: Collection[str] = PARTS,
) -> LlavaNext:
    """The model with the first weights of its parts; random ones depend on the seed alone, not on the rank.

    Args:
        dtype: of every weight.
        seed: of the weights that are not read from a file.
        num_sources: length of the per-source loss sums.
        attention: the kernel inside packed samples.
        parts: which have weights; the others are on the meta device, names and shapes alone. A random part's weights
            depend on those drawn before it: ask for all of them then.

    Raises:
        ModelError: missing weights, or weights that do not fit the config.
    """
    config = backbone.config
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        hf = skeleton(backbone)
        if not hasattr(hf.model.language_model, "embed_tokens"):
            raise ModelError(
                f"model.language_model: {backbone.hf_config.text_config.model_type} keeps its embedding under another "
                "name than embed_tokens, which LLaVA-NeXT needs; choose a Llama-like model"
            )
        if "language_model" in parts:
            language = _language_model(backbone, dtype)
            hf.model.language_model = language.base_model
            hf.lm_head = language.get_output_embeddings()
        if "vision_tower" in parts:
            hf.model.vision_tower = _vision_tower(backbone, dtype)
        torch.manual_seed(seed)  # again, so that the connector does not depend on what the other parts have drawn
        if "projector" in parts:
            hf.model.multi_modal_projector.to_empty(device="cpu")
            for module in hf.model.multi_modal_projector.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()  # torch's own initialisation, as the authors' projector has
        if "image_newline" in parts:
            width = backbone.hf_config.text_config.hidden_size
            hf.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        for parameter in hf.parameters():  # not buffers: rotary frequencies in bf16 would turn late tokens by radians
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


def skeleton(backbone: Architecture) -> LlavaNextForConditionalGeneration:
    """The stock model without weights (on the meta device), with the projector of `model.projector`."""
    with torch.device("meta"):
        hf = LlavaNextForConditionalGeneration(backbone.hf_config)
        if backbone.config.projector == "linear":
            hf.model.multi_modal_projector = nn.Linear(
                backbone.hf_config.vision_config.hidden_size, backbone.hf_config.text_config.hidden_size
            )
    return hf


def _unless_loaded(weights: str) -> AbstractContextManager[None]:
    """Inside, parts whose weights `load.py` brings are given none: random ones would take minutes, and be replaced."""
    found: AbstractContextManager[None] = no_init_weights() if weights == "init_from" else nullcontext()
    return found


def _language_model(backbone: Backbone, dtype: torch.dtype) -> Any:
    text, config = backbone.hf_config.text_config, backbone.config.language_model
    if config.weights != "pretrained":
        with _unless_loaded(config.weights):
            return AutoModelForCausalLM.from_config(text, dtype=dtype)
    own_size = AutoConfig.from_pretrained(config.path).vocab_size
    wanted, text.vocab_size = text.vocab_size, own_size
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            config.path, config=text, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.language_model.path: the weights in {config.path} were not read: {error}") from error
    finally:
        text.vocab_size = wanted
    require_all_weights_loaded(found, f"model.language_model.path={config.path}")
    if wanted != own_size:
        _grow_vocabulary(model, wanted)
    return model


def require_all_weights_loaded(found: dict[str, Any], where: str) -> None:
    """Raises ModelError if loading left a tensor at random values, which transformers only mentions.

    Args:
        found: transformers' loading info.
        where: for the message.
    """
    missing = sorted(found["missing_keys"])
    mismatched = sorted(str(entry) for entry in found["mismatched_keys"])
    if missing or mismatched:
        what = f"lacks {missing[0]}" if missing else f"has another shape for {mismatched[0]}"
        raise ModelError(
            f"{where} {what} ({len(missing) + len(mismatched)} such tensors): they would be random; give the "
            "directory whose config.json belongs to its weights"
        )


def _grow_vocabulary(model: Any, size: int) -> None:
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data.copy_(extend_vocab(weight.data[:old], size))


def extend_vocab(table: torch.Tensor, size: int) -> torch.Tensor:
    """A vocabulary's table [n, D] as [size, D]: each new row is the mean of the old ones, in their type, so that a new
    token is neither likelier nor stranger than the rest."""
    return torch.cat([table, table.mean(dim=0, keepdim=True).expand(size - len(table), -1)])


def _vision_tower(backbone: Backbone, dtype: torch.dtype) -> nn.Module:
    vision, config = backbone.hf_config.vision_config, backbone.config.vision_tower
    if config.weights != "pretrained":
        with _unless_loaded(config.weights):
            return AutoModel.from_config(vision, dtype=dtype)
    native = copy.deepcopy(vision)  # overrides and all, at the size of the weights
    native.image_size = tower_config(AutoConfig.from_pretrained(config.path)).image_size
    try:
        tower, found = AutoModel.from_pretrained(config.path, config=native, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.vision_tower.path: the weights in {config.path} were not read: {error}") from error
    require_all_weights_loaded(found, f"model.vision_tower.path={config.path}")
    if vision.image_size == native.image_size:
        return tower
    resized = AutoModel.from_config(vision, dtype=dtype)
    wanted = resized.state_dict()
    state = {
        name: resampled_positions(value, wanted[name].shape) if value.shape != wanted[name].shape else value
        for name, value in tower.state_dict().items()
    }
    resized.load_state_dict(state)
    return resized


def resampled_positions(table: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A position table for another number of patches: class token kept, the square grid resampled (bicubic).

    Works on [n, D] (CLIP, SigLIP) and [1, n, D] (DINOv2), where n is a square or a square and one.

    Raises:
        ModelError: it is neither, or the shape is not.
    """
    rows, wanted = table.reshape(-1, table.shape[-1]).float(), shape[-2]
    prefix = len(rows) - int(len(rows) ** 0.5) ** 2
    side, new_side = int((len(rows) - prefix) ** 0.5), int((wanted - prefix) ** 0.5)
    if side * side + prefix != len(rows) or new_side * new_side + prefix != wanted:
        raise ModelError(f"model.vision_tower.tile: a table of {len(rows)} positions cannot become one of {wanted}")
    grid = rows[prefix:].T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False, antialias=True)
    resampled = torch.cat([rows[:prefix], grid.flatten(2)[0].T])
    return resampled.reshape(tuple(shape)).to(table.dtype)
