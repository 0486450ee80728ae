"""The shapes and parameter counts of a model, which memory and time are computed from.

They are read from the model on the meta device, so that parts, trained and frozen, are counted as in the run. Configs
are read from disk if the directories exist, else from `known_model_shapes`.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from llava_next.config import ModelConfig, ModelError
from llava_next.model.architecture import Architecture, join_configs, read_config, replace_keys
from llava_next.model.build import build_meta_model, read_backbone
from llava_next.model.flops import StepCosts, step_costs
from llava_next.model.language_models import check_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import num_parameters, part_of, set_trained_parts
from llava_next.model.towers import mlp_shape
from llava_next.model_directory import has_tokenizer
from train.config.schema import RunConfig
from train.plan.known_model_shapes import LANGUAGE_MODELS, VISION_TOWERS, count_tokens


@dataclass(frozen=True)
class LanguageShape:
    """Shape of a decoder. `query` and `key` are the widths of all heads together, `vocabulary` the rows of the head."""

    width: int
    mlp: int
    layers: int
    heads: int
    query: int
    key: int
    vocabulary: int


@dataclass(frozen=True)
class VisionShape:
    """Shape of a vision tower as it runs.

    Attributes:
        kind: transformers' model_type.
        layers: number of layers up to the feature layer.
        patches: per tile.
        prefix: tokens per tile besides the patches.
        tile: side of a tile in pixels.
        quick_gelu: whether the activation is quick GELU, which saves two tensors.
    """

    kind: str
    width: int
    mlp: int
    layers: int
    patches: int
    prefix: int
    tile: int
    quick_gelu: bool


@dataclass(frozen=True)
class TensorSizes:
    """Elements of the parameters that are communicated, in the model's order.

    Attributes:
        sizes: of every parameter.
        trained: of the trained ones.
        num_groups: number of optimizer groups.
        backward: of those that the backward pass uses: without a frozen tower, which no gradient passes.
    """

    sizes: tuple[int, ...]
    trained: tuple[int, ...]
    backward: tuple[int, ...]
    num_groups: int


@dataclass(frozen=True)
class ModelFacts:
    """Counts of a stage's model, in elements unless stated otherwise.

    Attributes:
        parameters, trained: by part; without the tower's layers above the feature layer, which do not run.
        largest_group: trained elements of the largest optimizer group (the matrices of a part).
        largest_block: elements of one block of the language model.
        tensors: sizes of the parameters.
        upper_tower: elements of the tower's layers above the feature layer, which stay on the host.
        costs: FLOPs of tiles, tokens and pairs of tokens.
    """

    language: LanguageShape
    vision: VisionShape
    parameters: dict[str, int]
    trained: dict[str, int]
    largest_group: int
    largest_block: int
    tensors: TensorSizes
    upper_tower: int
    costs: StepCosts

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def trains_head(self) -> bool:
        """Whether the language model itself is trained, and not only its adapters."""
        return self.trained["language_model"] == self.parameters["language_model"]


def read_architecture(config: ModelConfig) -> Architecture:
    """Reads the configs of language model and tower.

    Returns:
        A Backbone, tokenizer included, if all directories exist; else an Architecture, with known shapes of those that
        do not.

    Raises:
        ModelError: a directory does not exist and the model's shape is not known.
    """
    language, tower = config.language_model, config.vision_tower
    is_on_disk = all(Path(path).is_dir() for path in (language.path, tower.path))
    if is_on_disk and has_tokenizer(Path(language.tokenizer_path)):
        return read_backbone(config)
    text, known = _read_or_look_up(language.name, language.path, language.overrides, "language_model")
    vision, _ = _read_or_look_up(tower.name, tower.path, tower.overrides, "vision_tower")
    tokens = count_tokens(known)
    return Architecture(
        config, join_configs(config, text, vision, num_tokens=tokens, image_token=tokens - 1, pad_token=0)
    )


def _read_or_look_up(name: str, path: str, overrides: dict, part: str) -> tuple[PretrainedConfig, dict]:
    key = f"model.{part}"
    shapes = LANGUAGE_MODELS if part == "language_model" else VISION_TOWERS
    if Path(path).is_dir():
        config = read_config(path, overrides, key)
        return config, config.to_dict()
    if name not in shapes:
        raise ModelError(
            f"{key}.path: there is no folder {path}, and the shape of {name} is unknown; a folder with its config.json "
            f"is sufficient (known shapes: {', '.join(shapes)})"
        )
    shape = shapes[name]
    config = AutoConfig.for_model(**shape)
    replace_keys(config, overrides, key)
    return config, shape


def count_model(architecture: Architecture, config: RunConfig) -> ModelFacts:
    """Builds the model of a stage on the meta device and counts it; takes seconds and no memory.

    Raises:
        ModelError: as when a run builds it.
    """
    tower = architecture.config.vision_tower
    hf = build_meta_model(architecture)
    check_positions(hf.model.language_model, config.stage.max_length)
    model = LlavaNext(hf, image_mean=tower.image_mean, image_std=tower.image_std, attention="sdpa")
    add_adapters(model, config.lora, seed=config.seed)
    set_trained_parts(model, config.stage.rates)
    groups: dict[tuple[str, bool], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = (part_of(name), parameter.ndim > 1)
            groups[group] = groups.get(group, 0) + parameter.numel()
    parts = ("vision_tower", "projector", "image_newline", "language_model")
    vision, text = architecture.hf_config.vision_config, architecture.hf_config.text_config
    return ModelFacts(
        language=read_language_shape(text),
        vision=read_vision_shape(vision, model.num_tower_layers, model.num_prefix_tokens),
        parameters={part: num_parameters(model, part) for part in parts},
        trained={part: num_parameters(model, part, trained=True) for part in parts},
        largest_group=max(groups.values()),
        largest_block=sum(p.numel() for p in hf.model.language_model.layers[0].parameters()),
        tensors=count_tensors(model, num_groups=len(groups)),
        upper_tower=sum(p.numel() for layer in model.upper_tower_layers for p in layer.parameters()),
        costs=step_costs(
            vision,
            text,
            projector=config.model.projector,
            num_vision_layers=model.num_tower_layers,
            trains_tower="vision_tower" in config.stage.rates,
            trains_language_model="language_model" in config.stage.rates,
            adapted=config.lora or (),
        ),
    )


def count_tensors(model: LlavaNext, *, num_groups: int) -> TensorSizes:
    """Returns the sizes of a model's parameters."""
    named = [(part_of(name), parameter) for name, parameter in model.named_parameters()]
    trained = {part for part, parameter in named if parameter.requires_grad}
    return TensorSizes(
        tuple(parameter.numel() for _, parameter in named),
        tuple(parameter.numel() for _, parameter in named if parameter.requires_grad),
        tuple(parameter.numel() for part, parameter in named if part != "vision_tower" or part in trained),
        num_groups,
    )


def read_language_shape(text: PretrainedConfig) -> LanguageShape:
    """Returns the shape of a decoder from its config."""
    heads = int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return LanguageShape(
        width=int(text.hidden_size),
        mlp=int(text.intermediate_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        query=heads * head,
        key=int(getattr(text, "num_key_value_heads", None) or heads) * head,
        vocabulary=int(text.vocab_size),
    )


def read_vision_shape(vision: PretrainedConfig, num_layers: int, num_prefix: int) -> VisionShape:
    """Returns the shape of a tower from its config, the number of layers that run, and that of prefix tokens."""
    width = int(vision.hidden_size)
    return VisionShape(
        kind=vision.model_type,
        width=width,
        mlp=mlp_shape(vision)[0],
        layers=num_layers,
        patches=(vision.image_size // vision.patch_size) ** 2,
        prefix=num_prefix,
        tile=int(vision.image_size),
        quick_gelu=vision.hidden_act == "quick_gelu",
    )


def is_half_precision(config: RunConfig, device: str) -> bool:
    """Whether the weights are bf16; `precision: auto` means bf16 on GPUs."""
    return config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
