"""What memory and time follow from: a model's shapes and parameters, from configs alone.

Owns `ModelFacts`, taken from the model itself on the meta device, so that parts, frozen and trained, are counted as
the run counts them. Configs come from disk where the directories are, else from `shapes.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from llava_next.config import ModelConfig, ModelError
from llava_next.model.architecture import Architecture, join_configs, read_config, replace_keys
from llava_next.model.build import read_backbone, skeleton
from llava_next.model.flops import StepCosts, step_costs
from llava_next.model.language_models import check_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import num_parameters, part_of, set_trained_parts
from llava_next.model.towers import mlp_shape
from train.config.schema import RunConfig
from train.plan.shapes import LANGUAGE_MODELS, VISION_TOWERS, num_tokens


@dataclass(frozen=True)
class LanguageShape:
    """Widths of a decoder: `query` and `key` are those of all heads together."""

    width: int
    mlp: int
    layers: int
    heads: int
    query: int
    key: int
    vocabulary: int


@dataclass(frozen=True)
class VisionShape:
    """Widths of a tower as it runs: `layers` up to the feature layer; `patches` of a tile, `prefix` tokens besides.

    `kind` is transformers' model_type, `quick_gelu` whether its activation keeps two tensors.
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
class ModelFacts:
    """A model of a stage, in numbers of elements.

    Attributes:
        parameters, trained: of each part; the tower's upper layers, which never run, are not in it.
        largest_group: trained elements of the largest optimizer group (a part's matrices).
        largest_block: elements of one block of the language model.
        num_tensors: parameters as tensors.
        upper_tower: elements of the tower's layers that are kept aside on the host.
        costs: FLOPs of tiles, tokens and pairs.
    """

    language: LanguageShape
    vision: VisionShape
    parameters: dict[str, int]
    trained: dict[str, int]
    largest_group: int
    largest_block: int
    num_tensors: int
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
        """Whether the language model trains whole, and not its adapters alone."""
        return self.trained["language_model"] == self.parameters["language_model"]


def read_architecture(config: ModelConfig) -> Architecture:
    """Configs from the directories where both are on disk (a Backbone, tokenizer and all), else as they are known.

    Raises:
        ModelError: a directory that is not there, of a model whose shape is not known.
    """
    language, tower = config.language_model, config.vision_tower
    if all(Path(path).is_dir() for path in (language.path, language.tokenizer_path, tower.path)):
        return read_backbone(config)
    text, known = _known(language.name, language.path, language.overrides, "language_model")
    vision, _ = _known(tower.name, tower.path, tower.overrides, "vision_tower")
    tokens = num_tokens(known)
    return Architecture(
        config, join_configs(config, text, vision, num_tokens=tokens, image_token=tokens - 1, pad_token=0)
    )


def _known(name: str, path: str, overrides: dict, part: str) -> tuple[PretrainedConfig, dict]:
    key = f"model.{part}"
    shapes = LANGUAGE_MODELS if part == "language_model" else VISION_TOWERS
    if Path(path).is_dir():
        config = read_config(path, overrides, key)
        return config, config.to_dict()
    if name not in shapes:
        raise ModelError(
            f"{key}.path: there is no folder {path}, and the shape of {name} is not known without it; its config.json "
            f"is enough (known are {', '.join(shapes)})"
        )
    shape = shapes[name]
    config = AutoConfig.for_model(**shape)
    replace_keys(config, overrides, key)
    return config, shape


def model_facts(architecture: Architecture, config: RunConfig) -> ModelFacts:
    """Counts the model of this stage, built on the meta device: seconds, and no memory.

    Raises:
        ModelError: as building it for a run would.
    """
    tower = architecture.config.vision_tower
    hf = skeleton(architecture)
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
        language=language_shape(text),
        vision=vision_shape(vision, model.num_tower_layers, model.num_prefix_tokens),
        parameters={part: num_parameters(model, part) for part in parts},
        trained={part: num_parameters(model, part, trained=True) for part in parts},
        largest_group=max(groups.values()),
        largest_block=sum(p.numel() for p in hf.model.language_model.layers[0].parameters()),
        num_tensors=sum(1 for _ in model.parameters()),
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


def language_shape(text: PretrainedConfig) -> LanguageShape:
    """The widths of a decoder's config."""
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


def vision_shape(vision: PretrainedConfig, num_layers: int, num_prefix: int) -> VisionShape:
    """The widths of a tower's config; `num_layers` run, `num_prefix` tokens stand before the patches."""
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


def half_precision(config: RunConfig, device: str) -> bool:
    """Whether weights are bf16, as `precision: auto` decides it."""
    return config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
