"""What a model is and how its inputs are made, as plain values.

Owns the dataclasses that name a language model, a vision tower and what joins them. Standard library only, so that
a configuration can be read and refused in a fraction of a second, before torch is imported. Building the model is
`llava_next.py`'s; encoding samples is `processor.py`'s.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("vision_tower", "projector", "image_newline", "language_model")
"""What can be trained or frozen, each with its own learning rate; the head belongs to the language model."""

Grid = tuple[int, int]
"""A tile grid as (rows, columns)."""

AUTHORS_GRIDS: tuple[Grid, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""The five grids of the released configurations, in the authors' order (ties go to the first)."""

ImageMode = Literal["anyres", "square", "pad", "squash"]
"""anyres: a base view and the tiles of the best grid. square: one centre-cropped view (LLaVA-1.5, stage 1). pad: one
view of the whole picture, made square with the tower's mean colour (LLaVA-1.5, stage 2). squash: one view of the whole
image, resized to a square without keeping its aspect ratio (LLaVA-NeXT with a SigLIP tower, stage 1)."""

ProjectorKind = Literal["mlp2x_gelu", "linear"]
"""What turns a tower's feature into a token. mlp2x_gelu: linear, GELU, linear (LLaVA-1.5 and later). linear: one linear
layer (LLaVA)."""

Rounding = Literal["exact", "authors"]
"""exact: what is kept of a map in whole numbers, as transformers and vLLM. authors: their int() of a float product, one
line less at 16 of 549,552 sizes; for the comparison with their code and for servers that count as they do."""

AttentionKernel = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"]
"""What computes attention inside packed samples; nothing learned depends on it, beyond rounding."""

LinearKernel = Literal["auto", "torch", "onednn"]
"""Whose products a linear layer on a CPU takes; nothing learned depends on it, beyond rounding."""

ElementwiseKernel = Literal["auto", "torch", "fused"]
"""What runs norms, gates and rotary embeddings on a CPU; nothing learned depends on it, beyond rounding."""


Weights = Literal["pretrained", "random", "init_from"]
"""Where a part's first weights come from: its own directory, a seed, or the whole model in stage.init_from, which then
also says how pictures are cut (`released.py`)."""

_STRICT = {"extra": "forbid"}
"""Read by pydantic where a run's configuration is checked: unknown keys are errors."""


class ModelError(ValueError):
    """A user's mistake about a model or a processor; the message says the rule, the value and the way out."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Where the language model comes from.

    `path` is a Hugging Face directory (its config.json, and its weights when `weights` is pretrained); `overrides`
    replaces keys of that config (for example a smaller depth, with random weights).
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
        """The directory of the tokenizer; the model's own unless one is named."""
        return self.tokenizer or self.path


@dataclass(frozen=True)
class VisionTowerConfig:
    """Where the vision tower comes from, and which of its features are used.

    `tile` is the side of a tile in pixels (null: the tower's own image size; another size resamples its position
    embedding). `feature_layer` counts as in `hidden_states` (-2: the output of the last layer but one).
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
    """A language model, a vision tower, the projector between them, and the grids that cut pictures."""

    __pydantic_config__ = _STRICT

    language_model: LanguageModelConfig
    vision_tower: VisionTowerConfig
    grids: tuple[Grid, ...] = AUTHORS_GRIDS
    projector: ProjectorKind = "mlp2x_gelu"


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of a part (LoRA, Hu et al. 2021): a frozen weight W of the part's blocks becomes W + B A alpha / rank.

    `targets` are linear layers by the end of their names (q_proj, or mlp.gate_proj).
    """

    __pydantic_config__ = _STRICT

    rank: int
    alpha: float
    targets: tuple[str, ...]


LORA_PARTS = ("vision_tower", "language_model")
"""Parts that are stacks of blocks, in which adapters may sit."""


@dataclass(frozen=True)
class ProcessorConfig:
    """All that decides how a sample becomes tokens and tiles, next to the tokenizer itself.

    `tile` and `patches_per_side` come from the tower, never from the user. Lengths are in tokens, image tokens
    included.
    """

    template: str
    image_mode: ImageMode
    grids: tuple[Grid, ...]
    tile: int
    patches_per_side: int
    max_length: int
    rounding: Rounding = "exact"
    unmask_special_tokens: bool = False
    """Supervise whole assistant messages, and special tokens everywhere, as the Llama-3 and Qwen releases were."""
    pad_colour: tuple[int, int, int] | None = None
    """Of image mode pad, and only there: what the square is filled with, red, green, blue from 0 to 255."""


def check_grids(grids: tuple[Grid, ...]) -> None:
    """Refuses an empty list, a grid without tiles and a grid that stands twice.

    Raises:
        ModelError: with the grid and the rule.
    """
    if not grids:
        raise ModelError("model.grids: at least one grid (rows, columns) is needed, got none")
    for grid in grids:
        if min(grid) < 1:
            raise ModelError(f"model.grids: rows and columns must be at least 1, got {list(grid)}")
    if len(set(grids)) != len(grids):
        raise ModelError(f"model.grids: a grid stands twice in {[list(g) for g in grids]}")


def check_lora(lora: Mapping[str, LoraConfig]) -> None:
    """Refuses what no adapter can be; whether a model has the targets is found out when it is built.

    Raises:
        ModelError: with the key, the rule, the value and the way out.
    """
    for part, chosen in lora.items():
        key = f"lora.{part}"
        if part not in PARTS:
            raise ModelError(f"{key}: there is no such part; adapters go into {' or '.join(LORA_PARTS)}")
        if part not in LORA_PARTS:
            raise ModelError(f"{key}: this part is small, it trains whole or not at all; leave it out of lora")
        if chosen.rank < 1:
            raise ModelError(f"{key}.rank must be at least 1, got {chosen.rank}; usual are 8 to 128")
        if not 0 < chosen.alpha < math.inf:
            raise ModelError(f"{key}.alpha must be above 0, got {chosen.alpha}; usual are the rank and twice the rank")
        if not chosen.targets:
            raise ModelError(f"{key}.targets names no layer: no adapter would be made; try [q_proj, v_proj]")


def check_peft() -> None:
    """Raises ModelError unless the package that makes adapters is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "lora: the package peft is not installed here; `./scripts/setup.sh --extras lora`, or lora=null"
        )
