"""Configuration dataclasses of a model and of the processing of its inputs.

Only the standard library is imported, so that a configuration is checked before torch is loaded.
"""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

PARTS = ("vision_tower", "projector", "image_newline", "language_model")
"""Parts that are trained or frozen, each with its own learning rate; the head belongs to the language model."""

Grid = tuple[int, int]
"""A tile grid as (rows, columns)."""

AUTHORS_GRIDS: tuple[Grid, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""The five grids of the released configurations, in their order; among equally good grids the first is chosen."""

ImageMode = Literal["anyres", "crop", "pad", "squash"]
"""How an image becomes views.

anyres: a base view and the tiles of the best grid. crop: one center-cropped view (LLaVA-1.5, stage 1). pad: one view of
the entire image, padded to a square with the tower's mean color (LLaVA-1.5, stage 2). squash: one view of the entire
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
class TemplateConfig:
    """The text around messages, in a YAML file in place of the name of a template. A round is question, header, answer,
    end.

    Attributes:
        question_format: contains `{text}`, in whose place the question is.
        header: text between a question and its answer.
        end: text of the end token, supervised with the answer; generation stops at it.
        answer_format: contains `{text}`, in whose place the answer is.
        between: text after the end token, not supervised.
        system_format: contains `{text}`, in whose place the system text is; None if a sample cannot have a system turn.
        default_system: the system text of samples without a system turn; None means none. If `system_format` is None,
            every sample begins with this text.
        bos: whether a sample begins with the tokenizer's beginning-of-sequence token.
        trims: whether leading and trailing white space of every text is removed.
    """

    __pydantic_config__ = _STRICT

    question_format: str
    header: str
    end: str
    answer_format: str = "{text}"
    between: str = ""
    system_format: str | None = None
    default_system: str | None = None
    bos: bool = False
    trims: bool = False


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model and its chat template.

    Attributes:
        name: identifies the model in messages and in connector contracts.
        path: a Hugging Face directory with config.json, and the weights if `weights` is pretrained.
        template: the default chat template: a name, `tokenizer` for the tokenizer's own, or its text.
        tokenizer: directory of the tokenizer; None means `path`.
        weights: source of the initial weights.
        overrides: keys of config.json that are replaced, for example a smaller depth with random weights.
    """

    __pydantic_config__ = _STRICT

    name: str
    path: str
    template: str | TemplateConfig
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
class ViewRule:
    """How an image becomes views and tokens.

    Attributes:
        mode: how it becomes views.
        max_views: number of views to whose size a larger feature map of the grid is reduced (OneVision's anyres_max_N);
            None: maps are not reduced.
        closing_newline: whether the newline vector follows the tokens of a single view.
    """

    mode: ImageMode
    max_views: int | None = None
    closing_newline: bool = False


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a sample's images, by the number of its images.

    A value is a name of `ImageMode`, or anyres_max_N: AnyRes, where a feature map with more places than N views is
    reduced to at most that number by bilinear interpolation (up to 1.21 N views are left as they are).

    Attributes:
        single: for the image of a sample with one image.
        several: for each image of a sample with several images; None: such samples are rejected.
        closing_newline: whether the newline vector follows the tokens of each image with one view (the authors'
            `mm_patch_merge_type` with unpad).
    """

    __pydantic_config__ = _STRICT

    single: str
    several: str | None = None
    closing_newline: bool = False

    @property
    def rules(self) -> tuple[ViewRule, ...]:
        """The rule of a single image, and that of several if there is one."""
        values = {"single": self.single} | ({} if self.several is None else {"several": self.several})
        return tuple(_view_rule(name, value, self.closing_newline) for name, value in values.items())

    def rule(self, num_images: int) -> ViewRule | None:
        """The rule for the images of a sample with this number of images; None if there is none."""
        if num_images == 1:
            return self.rules[0]
        return None if self.several is None else self.rules[1]

    @property
    def modes(self) -> set[ImageMode]:
        """The modes that images may have."""
        return {rule.mode for rule in self.rules}

    @property
    def has_newlines(self) -> bool:
        """Whether the newline vector is among the tokens of some image."""
        return any(rule.mode == "anyres" or rule.closing_newline for rule in self.rules)

    def __str__(self) -> str:
        several = "null" if self.several is None else self.several
        newline = ", closing_newline: true" if self.closing_newline else ""
        return f"{{single: {self.single}, several: {several}{newline}}}"


ANYRES = ViewsConfig("anyres", "anyres")
"""The views of LLaVA-NeXT: AnyRes for every image."""

_ANYRES_MAX = re.compile(r"anyres_max_([1-9][0-9]{0,3})")


def _view_rule(name: str, value: str, closing_newline: bool) -> ViewRule:
    reduced = _ANYRES_MAX.fullmatch(value)
    if reduced:
        return ViewRule("anyres", int(reduced[1]))
    if value not in get_args(ImageMode):
        raise ModelError(
            f"stage.views.{name} must be {', '.join(get_args(ImageMode))} or anyres_max_N (N from 1 to 9999), got "
            f"{value[:40]!r}"
        )
    return ViewRule(cast(ImageMode, value), closing_newline=closing_newline and value != "anyres")


def check_views(views: ViewsConfig) -> None:
    """Checks that the values are known and that the closing newline has an effect.

    Raises:
        ModelError: a check fails; the message names the key, the rule, the value and the fix.
    """
    if views.closing_newline and views.modes == {"anyres"}:
        raise ModelError(
            "stage.views.closing_newline=true has no effect, because no image has one view only; set it to false, or "
            "stage.views.several to pad, squash or crop"
        )


StockClass = Literal["llava_next", "llava", "llava_onevision"]
"""The `model_type` of the stock classes that a model is exported as."""


def stock_class(views: ViewsConfig) -> StockClass:
    """The stock class whose processor makes these views.

    A LLaVA-NeXT cuts every image with AnyRes, and a LLaVA makes the same single view of every image. A LLaVA-OneVision
    reduces the feature map of a single image (anyres_max_N), and pads each of several images to a square, with a
    closing newline.

    Raises:
        ModelError: no class makes the views.
    """
    first = views.rules[0]
    if all(rule == ViewRule(first.mode) for rule in views.rules):
        return "llava_next" if first.mode == "anyres" else "llava"
    if first.max_views is not None and views.rules[1:] in ((), (ViewRule("pad", closing_newline=True),)):
        return "llava_onevision"
    raise ModelError(
        f"stage.views={views} cannot be exported: an export is a llava_next or llava model, which makes the same views "
        "of every image, without anyres_max_N and without a closing newline, or a llava_onevision model, which has "
        "{single: anyres_max_N, several: pad, closing_newline: true}; choose such views, or stage.result=connector"
    )


@dataclass(frozen=True)
class ProcessorConfig:
    """The settings, besides the tokenizer, that determine the tokens and tiles of a sample.

    Attributes:
        template: the chat template: a name, `tokenizer` for the tokenizer's own, or its text.
        views: how images become views.
        grids: tile grids of AnyRes.
        tile: side of a tile in pixels, derived from the tower.
        patches_per_side: patches along a side of a tile, derived from the tower.
        max_length: maximum length of a sample in tokens, including image tokens.
        rounding: rounding of the unpadded range.
    """

    template: str | TemplateConfig
    views: ViewsConfig
    grids: tuple[Grid, ...]
    tile: int
    patches_per_side: int
    max_length: int
    rounding: Rounding = "exact"
    unmask_special_tokens: bool = False
    """Supervise complete assistant messages, and special tokens everywhere, as the Llama-3 and Qwen releases did."""
    pad_colour: tuple[int, int, int] | None = None
    """Padding color of views `pad` as (red, green, blue) in 0 to 255; None if no image is padded."""

    def fingerprint_values(self) -> dict[str, Any]:
        """The values that enter the processor's fingerprint.

        Views that earlier versions had as one `image_mode` of all images enter under that name and its value of that
        time, so that length tables and checkpoints of earlier versions remain valid.
        """
        values = asdict(self)
        single = self.views.rules[0]
        if self.views.rules == (ViewRule(single.mode), ViewRule(single.mode)):
            del values["views"]
            values["image_mode"] = "square" if single.mode == "crop" else single.mode
        return values


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
