"""Configuration dataclasses of a model and of the processing of its inputs.

Only the standard library is imported, so that a configuration is checked before torch is loaded.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("vision_tower", "projector", "image_newline", "language_model")
"""Parts that are trained or frozen, each with its own learning rate; the head belongs to the language model."""

Grid = tuple[int, int]
"""A tile grid as (rows, columns)."""

AUTHORS_GRIDS: tuple[Grid, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""The five grids of the released configurations, in their order; among equally good grids the first is chosen."""

ImageMode = Literal["anyres", "square", "pad", "squash"]
"""How an image becomes views.

anyres: a base view and the tiles of the best grid. square: one center-cropped view (LLaVA-1.5, stage 1). pad: one view
of the entire image, padded to a square with the tower's mean color (LLaVA-1.5, stage 2). squash: one view of the entire
image, resized to a square without keeping its aspect ratio (LLaVA-NeXT with a SigLIP tower, stage 1).
"""

ProjectorKind = Literal["mlp2x_gelu", "linear"]
"""The layers that map a tower's feature to a token embedding. mlp2x_gelu: linear, GELU, linear (LLaVA-1.5 and later).
linear: one linear layer (LLaVA)."""

Rounding = Literal["exact", "authors"]
"""How the unpadded range of a feature map is rounded. exact: integer arithmetic, as in transformers and vLLM. authors:
int() of a floating-point product, which drops one more line for 16 of 549,552 sizes; for comparison with the authors'
code and for servers that count tokens the same way."""

AttentionKernel = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"]
"""The attention kernel for packed samples. The choice affects results only through rounding."""

Weights = Literal["pretrained", "random", "init_from"]
"""Source of a part's initial weights. pretrained: the part's own directory. random: drawn from the seed. init_from: the
complete model in stage.init_from, which then also defines the image grids (`checkpoint_config.py`)."""

IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that can contain a Hugging Face directory's image processor settings (transformers 5, older versions)."""

_STRICT = {"extra": "forbid"}
"""Configuration of pydantic's validation: unknown keys are errors."""


class ModelError(ValueError):
    """Invalid configuration or input of a model or a processor. The message names the value, the rule and the fix."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model and its chat template.

    Attributes:
        name: identifies the model in messages and in connector contracts.
        path: a Hugging Face directory with config.json, and the weights if `weights` is pretrained.
        template: name of the default chat template.
        tokenizer: directory of the tokenizer; None means `path`.
        weights: source of the initial weights.
        overrides: keys of config.json that are replaced, for example a smaller depth with random weights.
    """

    __pydantic_config__ = _STRICT

    name: str
    path: str
    template: str
    tokenizer: str | None = None
    weights: Weights = "pretrained"
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_path(self) -> str:
        """Directory of the tokenizer: `tokenizer` if it is set, else `path`."""
        return self.tokenizer or self.path


@dataclass(frozen=True)
class VisionTowerConfig:
    """The vision tower and the layer whose features are used.

    Attributes:
        name: identifies the tower in messages and in connector contracts.
        path: a Hugging Face directory with config.json, and the weights if `weights` is pretrained.
        weights: source of the initial weights.
        overrides: keys of config.json that are replaced.
        tile: side of a tile in pixels; None means the tower's image size. For another size the position embedding is
            resampled.
        feature_layer: index into `hidden_states` (-2: the output of the second-to-last layer).
        image_mean, image_std: normalization of red, green and blue in [0, 1].
    """

    __pydantic_config__ = _STRICT

    name: str
    path: str
    weights: Weights = "pretrained"
    overrides: dict[str, Any] = field(default_factory=dict)
    tile: int | None = None
    feature_layer: int = -2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelConfig:
    """A language model, a vision tower, the projector between them, and the tile grids of images."""

    __pydantic_config__ = _STRICT

    language_model: LanguageModelConfig
    vision_tower: VisionTowerConfig
    grids: tuple[Grid, ...] = AUTHORS_GRIDS
    projector: ProjectorKind = "mlp2x_gelu"


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of a part (LoRA, Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, with W frozen.

    Attributes:
        rank: inner dimension of B A.
        alpha: scale of the adapters.
        targets: suffixes of the names of the adapted linear layers, such as q_proj or mlp.gate_proj.
    """

    __pydantic_config__ = _STRICT

    rank: int
    alpha: float
    targets: tuple[str, ...]


LORA_PARTS = ("vision_tower", "language_model")
"""Parts that consist of transformer blocks and can have adapters."""


@dataclass(frozen=True)
class ProcessorConfig:
    """The settings, besides the tokenizer, that determine the tokens and tiles of a sample.

    Attributes:
        template: name of the chat template.
        image_mode: how an image becomes views.
        grids: tile grids of image mode anyres.
        tile: side of a tile in pixels, derived from the tower.
        patches_per_side: patches along a side of a tile, derived from the tower.
        max_length: maximum length of a sample in tokens, including image tokens.
        rounding: rounding of the unpadded range.
    """

    template: str
    image_mode: ImageMode
    grids: tuple[Grid, ...]
    tile: int
    patches_per_side: int
    max_length: int
    rounding: Rounding = "exact"
    unmask_special_tokens: bool = False
    """Supervise complete assistant messages, and special tokens everywhere, as the Llama-3 and Qwen releases did."""
    pad_colour: tuple[int, int, int] | None = None
    """Padding color of image mode pad as (red, green, blue) in 0 to 255; None in the other modes."""


def check_grids(grids: tuple[Grid, ...]) -> None:
    """Checks that there is a grid, that every grid has tiles, and that no grid is listed twice.

    Raises:
        ModelError: a check fails; the message names the grid and the rule.
    """
    if not grids:
        raise ModelError("model.grids: at least one grid (rows, columns) is required, got none")
    for grid in grids:
        if min(grid) < 1:
            raise ModelError(f"model.grids: rows and columns must be at least 1, got {list(grid)}")
    if len(set(grids)) != len(grids):
        raise ModelError(f"model.grids: each grid must be listed once, got {[list(grid) for grid in grids]}")


def check_lora(lora: Mapping[str, LoraConfig]) -> None:
    """Checks the adapters' settings. The target layers are checked when the model is built.

    Raises:
        ModelError: a setting is invalid; the message names the key, the value and the fix.
    """
    for part, adapters in lora.items():
        key = f"lora.{part}"
        if part not in PARTS:
            raise ModelError(f"{key}: unknown part; adapters are supported in {' and '.join(LORA_PARTS)}")
        if part not in LORA_PARTS:
            raise ModelError(f"{key}: adapters are supported in {' and '.join(LORA_PARTS)} only; remove {key}")
        if adapters.rank < 1:
            raise ModelError(f"{key}.rank must be at least 1, got {adapters.rank}; common values are 8 to 128")
        if not 0 < adapters.alpha < math.inf:
            raise ModelError(
                f"{key}.alpha must be positive and finite, got {adapters.alpha}; common values are rank and 2 * rank"
            )
        if not adapters.targets:
            raise ModelError(f"{key}.targets is empty; name at least one linear layer, for example [q_proj, v_proj]")


def check_peft() -> None:
    """Raises ModelError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "lora: the package peft is not installed; run `./scripts/setup.sh --extras lora`, or set lora=null"
        )
