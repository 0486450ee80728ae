"""What is exported: a run, a checkpoint of one, or a Hugging Face directory, as tensors and all that describes them.

Every tensor stays where it lies until it is read: trained ones in the checkpoint's files, frozen ones where the run had
them from. What no file holds as it is needed is held, and said (`first_weights.py`).
"""

import json
import pickle
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig

from llava_next.config import PARTS, ImageMode, ModelError
from llava_next.formats.hugging_face import (
    SECOND_LAYER,
    as_stock,
    stock_image_mode,
    write_hf_folder,
    write_tokenizer_settings,
)
from llava_next.formats.initial_weights import first_weights
from llava_next.formats.original import OriginalModel, of_backbone
from llava_next.formats.tensor_names import as_published
from llava_next.formats.tensors import LazyTensor, read_folder, write_shards
from llava_next.inputs.anyres import grids_of_pinpoints
from llava_next.inputs.chat_template import PRINTED_BOS, adds_bos, adds_special_tokens, set_post_processor
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import live_parameters, set_trained_parts, without_adapters
from llava_next.model.released import is_original, projector_kind
from llava_next.model.towers import tower_config
from train.checkpoint import resume
from train.checkpoint import saver as checkpoint
from train.checkpoint.trained_weights import trained_weights
from train.config.compose import load_yaml
from train.config.schema import ConfigError, RunConfig
from train.data.loader import stage_processor

_DESCRIBES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        words: what it is, for people.
        place: of its weights.
        tensors: in published names, as its stock model has them, in one type.
        stock: `to_dict()` of the stock model's config.
        config: of the run it comes from, if it comes from one.
        backbone, processor: of that run; None for a directory that no run is known of.
        about: the run's data.json.
        versions: that it was trained with.
        checks: what was compared while it was opened, and what is held in memory, in sentences.
    """

    words: str
    place: Path
    tensors: list[LazyTensor]
    stock: dict[str, Any]
    config: RunConfig | None
    backbone: Backbone | None
    processor: Processor | None
    about: dict[str, Any] | None
    versions: dict[str, str]
    checks: list[str] = field(default_factory=list)

    @property
    def image_mode(self) -> ImageMode:
        """What its pictures are shown as."""
        if self.config is not None:
            return self.config.stage.image_mode
        return stock_image_mode(self.stock["model_type"], AutoImageProcessor.from_pretrained(self.place), self.place)

    def write_hf(self, folder: Path, shard_bytes: int) -> None:
        """Fills the folder with the Hugging Face layout; what describes a directory of no known run is copied."""
        if self.backbone is not None and self.processor is not None:
            write_hf_folder(self.tensors, self.backbone, self.processor, folder, shard_bytes)
            return
        write_shards(self.tensors, folder, shard_bytes)
        for path in sorted(self.place.iterdir()):
            if path.suffix in _DESCRIBES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        described = json.loads((folder / "config.json").read_text())
        for config in (described, described.get("text_config", {}), described.get("vision_config", {})):
            config["dtype"] = str(self.tensors[0].dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        _correct_tokenizer(folder)

    def single_layer_tensors(self) -> list[LazyTensor]:
        """The tensors without the identity that stands for a linear projector's second layer."""
        linear = projector_kind(self.stock, self.place) == "linear"
        return [tensor for tensor in self.tensors if not (linear and tensor.name in SECOND_LAYER)]

    def copy_about(self, folder: Path) -> None:
        """The fingerprints of what it has learned from go where it goes."""
        if self.about is not None:
            (folder / "data.json").write_text(json.dumps(self.about, indent=1) + "\n")

    def original(self, vision_tower: str | None) -> OriginalModel:
        """What its directory in the authors' layout is written from.

        Args:
            vision_tower: see `OriginalModel`; None takes the run's own.
        """
        if self.config is not None and self.backbone is not None and self.processor is not None:
            return of_backbone(self.backbone, self.processor, vision_tower, self.config.stage.rates)
        if vision_tower is None:
            raise ConfigError(
                f"{self.place} does not say which vision tower it was made with, and the authors' layout names it; "
                "give its directory or its name on the hub with --vision-tower (openai/clip-vit-large-patch14-336)"
            )
        pixels = AutoImageProcessor.from_pretrained(self.place)
        return OriginalModel(
            self.stock,
            projector_kind(self.stock, self.place),
            self.image_mode,
            _original_tokenizer(self.place),
            GenerationConfig.from_pretrained(self.place),
            vision_tower,
            pixels.image_mean,
            pixels.image_std,
        )


def open_source(path: Path, dtype: torch.dtype | None, *, verify: bool = True) -> Source:
    """The model that a path names, its tensors in this type (None: in their own).

    Args:
        verify: a checkpoint's files are compared with their sums.

    Raises:
        ConfigError: it is none of the three, or holds no weights; a checkpoint with other bytes than were written.
        ModelError: its frozen parts are not there, or not those that it was trained with; a damaged file.
    """
    try:
        if (path / "run_state.json").is_file():
            return _of_checkpoint(path, dtype, verify)
        if (path / "config.json").is_file():
            return _of_folder(path, dtype, _run_around(path))
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{path} is no run's folder (config.yaml), no checkpoint (run_state.json) and no Hugging Face "
                "directory (config.json)"
            )
        if (path / "export" / "config.json").is_file():
            return _of_folder(path / "export", dtype, load_yaml(path / "config.yaml"))
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise ConfigError(
                f"{path} holds neither an export/ nor a checkpoint; a connector/ is used with stage.init_from={path}/"
                "connector, and a whole model around it is a checkpoint's (save.every=N)"
            )
        return _of_checkpoint(newest, dtype, verify)
    except checkpoint.SaveFormatError:
        raise
    except (SafetensorError, OSError, RuntimeError, KeyError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        if "Cannot allocate memory" in str(error):
            raise ModelError(
                f"{path}: the kernel does not map a file that is larger than this host's memory and swap; let it with "
                f"`sysctl vm.overcommit_memory=1` (a mapped file takes no memory), or export on another host: {error}"
            ) from error
        raise ModelError(f"{path} cannot be read, a file in it is damaged or missing: {error}") from error


def _run_around(folder: Path) -> RunConfig | None:
    path = folder.parent / "config.yaml"
    return load_yaml(path) if folder.name == "export" and path.is_file() else None


def _of_checkpoint(place: Path, dtype: torch.dtype | None, verify: bool) -> Source:
    checks = [_compare_sums(place)] if verify else []
    checkpoint.refuse_unsafe_pickles(place)
    config = load_yaml(checkpoint.config_path(place))
    state = checkpoint.read_state(place)
    own = getattr(torch, state.dtype)
    backbone = read_backbone(config.model)
    processor = stage_processor(backbone, config.stage)
    model, frozen, held = _frozen_parts(config, backbone, state, place)
    wanted = dtype or own
    trained = trained_weights(model, place, masters=wanted == torch.float32 != own)
    wide = torch.promote_types(wanted, own)  # adapters are merged before anything is rounded off
    live = [(trained[name] if name in trained else frozen[name]).cast(wide) for name, _ in live_parameters(model)]
    tensors = [tensor.cast(wanted) for tensor in as_stock(live, model, backbone, config.stage.image_mode)]
    run_dir = place.parent.parent
    layout = f"{state.layout['num_ranks']} rank(s), ZeRO {state.layout['zero_stage']}, {state.dtype}"
    return Source(
        f"checkpoint {place} (step {state.step}; {layout})",
        place,
        tensors,
        _stock_dict(backbone, config.stage.image_mode),
        config,
        backbone,
        processor,
        _about(run_dir),
        state.versions,
        [*checks, *held],
    )


def _compare_sums(place: Path) -> str:
    """Raises ConfigError, with the first of its files that is not what the run wrote; returns a sentence."""
    told = checkpoint.corrupt_files(place)
    if told:
        others = [str(other) for other in checkpoint.complete(place.parent) if other.resolve() != place.resolve()]
        raise ConfigError(
            f"checkpoint {place} is damaged: {told}; export another one ("
            + (f"there are {', '.join(reversed(others))}" if others else f"there is none in {place.parent}")
            + "), or, where you have changed that file yourself, take it as it is with --no-verify"
        )
    return "the checkpoint's files are what the run wrote (sha256)"


def _stock_dict(backbone: Backbone, image_mode: ImageMode) -> dict[str, Any]:
    described: dict[str, Any] = backbone.hf_config.to_dict()
    return described | ({} if image_mode == "anyres" else {"model_type": "llava"})


def _frozen_parts(
    config: RunConfig, backbone: Backbone, state: checkpoint.RunState, place: Path
) -> tuple[LlavaNext, dict[str, LazyTensor], list[str]]:
    """The run's model as names and shapes, the tensors of it that a checkpoint does not hold, and what is held of them.

    The tower is always needed, since its layers above the feature layer are never trained. What the run has summed up
    is summed up again, one tensor at a time.
    """
    rates, lora = config.stage.rates, config.lora or {}
    start = config.stage.init_from
    model = build_model(backbone, dtype=getattr(torch, state.dtype), seed=config.seed, parts=())
    first, held = first_weights(
        model,
        backbone,
        parts={"vision_tower", *lora} | (set(PARTS) - set(rates)),
        seed=config.seed,
        init_from=Path(start) if start is not None else None,
    )
    add_adapters(model, lora, seed=config.seed)
    set_trained_parts(model, rates)
    frozen = {
        name: first[without_adapters(name)].renamed(name)
        for name, parameter in live_parameters(model)
        if not parameter.requires_grad
    }
    summed = [frozen[name] for name, parameter in model.named_parameters() if not parameter.requires_grad]
    resume.check_frozen(place, state, resume.sums_of(summed))
    return model, frozen, held


def _of_folder(folder: Path, dtype: torch.dtype | None, config: RunConfig | None) -> Source:
    described = json.loads((folder / "config.json").read_text())
    if is_original(described) or described.get("model_type") not in ("llava", "llava_next"):
        raise ConfigError(
            f"{folder} is no Hugging Face llava or llava_next directory (model_type {described.get('model_type')}, "
            f"{described.get('architectures')}); start a run from it with stage.init_from={folder}"
        )
    stock = AutoConfig.from_pretrained(folder)
    check_folder(folder, stock)
    tower_type = stock.vision_config.model_type
    tensors = [
        tensor.renamed(as_published(name, tower_type)).cast(dtype or tensor.dtype)
        for name, tensor in read_folder(folder).items()
    ]
    backbone = processor = None
    if config is not None:
        with suppress(ModelError):  # the model's own folders may be gone: the directory has all that it needs
            backbone = read_backbone(replace(config.model, projector=projector_kind(described, folder)))
            processor = stage_processor(backbone, config.stage)
    return Source(
        str(folder),
        folder,
        tensors,
        stock.to_dict(),
        config,
        backbone,
        processor,
        _about(folder) or _about(folder.parent),
        {},
    )


def check_folder(folder: Path, stock: Any) -> None:
    """Raises ModelError where a Hugging Face directory contradicts itself: its grids and its tower's tile, its
    tokenizer and its image token; or where its tower is not supported."""
    tower_config(stock.vision_config)
    if hasattr(stock, "image_grid_pinpoints"):
        try:
            grids_of_pinpoints(stock.image_grid_pinpoints, stock.vision_config.image_size)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    found = vocabulary.get(IMAGE_PLACEHOLDER)
    if found != stock.image_token_index:
        has = (
            f"has {IMAGE_PLACEHOLDER} as token {found}" if found is not None else f"lacks the token {IMAGE_PLACEHOLDER}"
        )
        raise ModelError(
            f"{folder}: its tokenizer {has}, and its config.json says image_token_index={stock.image_token_index}; "
            "give it the tokenizer that it was published with"
        )


def _original_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face directory for the authors' layout, where it adds the beginning-of-sequence token
    that our chat templates print otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template or ""
    if template.startswith(PRINTED_BOS):
        tokenizer.chat_template = template.removeprefix(PRINTED_BOS)
        set_post_processor(tokenizer, adds_bos=True)
    return tokenizer


def _correct_tokenizer(folder: Path) -> None:
    """Lets a copied tokenizer pad on the left, and add no beginning-of-sequence token where the chat template prints
    one: rendered text that is given to the processor would have it twice."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adds_bos(tokenizer):
        turn = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        rendered = AutoProcessor.from_pretrained(folder).apply_chat_template([turn], add_generation_prompt=True)
        if not adds_special_tokens(tokenizer, rendered):
            set_post_processor(tokenizer, adds_bos=False)
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_settings(folder, tokenizer)


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / "data.json"
    return json.loads(path.read_text()) if path.is_file() else None
