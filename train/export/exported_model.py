"""Opens the model to export: a run, a checkpoint, or a Hugging Face directory.

Tensors are read lazily: trained ones from the checkpoint's files, frozen ones from the files that the run read them
from. Tensors that no file contains in the required form are kept in memory, and a sentence says so.
"""

import json
import pickle
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from llava_next.config import PARTS, ModelError, StockClass, ViewsConfig, stock_class
from llava_next.file_access import permission_problem
from llava_next.formats.hugging_face import (
    stock_views,
    to_stock_tensors,
    write_hf_folder,
    write_tokenizer_settings,
)
from llava_next.formats.initial_weights import read_initial_weights
from llava_next.formats.onevision import load_processor
from llava_next.formats.original import OriginalModel, original_model
from llava_next.formats.tensor_names import SECOND_LAYER, to_published_name
from llava_next.formats.tensors import LazyTensor, read_folder, write_shards
from llava_next.inputs.anyres import grids_from_pinpoints
from llava_next.inputs.chat_template import BOS_EXPRESSION, is_bos_added, set_post_processor, should_add_special_tokens
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.checkpoint_config import is_original, projector_kind
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import live_parameters, set_trained_parts, without_adapters
from llava_next.model.towers import prepare_tower_config
from train.checkpoint import resume
from train.checkpoint import saver as checkpoint
from train.checkpoint.trained_weights import trained_weights
from train.config.compose import load_yaml
from train.config.schema import ConfigError, RunConfig
from train.data.loader import build_processor

_METADATA_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class ExportedModel:
    """A model to export.

    Attributes:
        description: of the source, for messages.
        path: directory of the weights.
        tensors: the tensors of the stock model by published names, in one dtype.
        stock_config: `to_dict()` of the stock model's config.
        config: configuration of the run; None if no run is known.
        backbone, processor: of that run; None if no run is known.
        data_summary: content of the run's data.json.
        versions: of the packages that it was trained with.
        checks: sentences that say what was verified while opening, and what is kept in memory.
    """

    description: str
    path: Path
    tensors: list[LazyTensor]
    stock_config: dict[str, Any]
    config: RunConfig | None
    backbone: Backbone | None
    processor: Processor | None
    data_summary: dict[str, Any] | None
    versions: dict[str, str]
    checks: list[str] = field(default_factory=list)

    @property
    def is_of_run(self) -> bool:
        """Whether the weights are those in the export/ of a run, to which the run's results belong."""
        return self.config is not None and self.path.name == "export"

    @property
    def views(self) -> ViewsConfig:
        """How images are presented to the model."""
        if self.config is not None:
            return self.config.stage.views
        return stock_views(
            AutoConfig.from_pretrained(self.path), AutoImageProcessor.from_pretrained(self.path), self.path
        )

    def write_hf(self, folder: Path, shard_bytes: int) -> None:
        """Writes the Hugging Face layout into the folder. If no run is known, the metadata files are copied."""
        if self.backbone is not None and self.processor is not None:
            write_hf_folder(self.tensors, self.backbone, self.processor, folder, shard_bytes)
            return
        write_shards(self.tensors, folder, shard_bytes)
        for path in sorted(self.path.iterdir()):
            if path.suffix in _METADATA_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        stock_config = json.loads((folder / "config.json").read_text())
        for config in (stock_config, stock_config.get("text_config", {}), stock_config.get("vision_config", {})):
            config["dtype"] = str(self.tensors[0].dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(stock_config, indent=2) + "\n")
        _correct_tokenizer(folder)

    def single_layer_tensors(self) -> list[LazyTensor]:
        """Returns the tensors without the identity matrix that represents a linear projector's second layer."""
        linear = projector_kind(self.stock_config, self.path) == "linear"
        return [tensor for tensor in self.tensors if not (linear and tensor.name in SECOND_LAYER)]

    def write_data_summary(self, folder: Path) -> None:
        """Writes data.json into the folder, so that the data fingerprints stay with the weights."""
        if self.data_summary is not None:
            (folder / "data.json").write_text(json.dumps(self.data_summary, indent=1) + "\n")

    def to_original(self, vision_tower: str | None) -> OriginalModel:
        """Returns the content of a directory in the authors' layout.

        Args:
            vision_tower: see `OriginalModel`; None uses that of the run.

        Raises:
            ConfigError: no run is known and `vision_tower` is None.
        """
        if self.config is not None and self.backbone is not None and self.processor is not None:
            return original_model(self.backbone, self.processor, vision_tower, self.config.stage.rates)
        if vision_tower is None:
            raise ConfigError(
                f"{self.path} does not name its vision tower, which the authors' layout requires; give its directory "
                "or hub name with --vision-tower (for example openai/clip-vit-large-patch14-336)"
            )
        pixels = AutoImageProcessor.from_pretrained(self.path)
        return OriginalModel(
            self.stock_config,
            projector_kind(self.stock_config, self.path),
            self.views,
            _load_original_tokenizer(self.path),
            GenerationConfig.from_pretrained(self.path),
            vision_tower,
            pixels.image_mean,
            pixels.image_std,
        )


def open_model(path: Path, dtype: torch.dtype | None, *, verify: bool = True) -> ExportedModel:
    """Opens a run, a checkpoint or a Hugging Face directory.

    Args:
        dtype: of the tensors; None keeps theirs.
        verify: compare a checkpoint's files with their sha256.

    Raises:
        ConfigError: the path is none of the three, contains no weights, or is a checkpoint with damaged files.
        ModelError: frozen parameters are missing or differ from those of the training; a file is damaged.
        SaveFormatError: a file of the checkpoint could run code when it is unpickled.
    """
    try:
        if (path / "run_state.json").is_file():
            return _open_checkpoint(path, dtype, verify)
        if (path / "config.json").is_file():
            return _open_folder(path, dtype, _load_run_config(path))
        if (path / "contract.json").is_file():
            raise ConfigError(
                f"{path} is a connector, which holds the projector only: train from it with stage.init_from={path}, "
                "or export the run of the next stage"
            )
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{path} is neither a run folder (config.yaml), a checkpoint (run_state.json) nor a Hugging Face "
                "directory (config.json)"
            )
        if (path / "export" / "config.json").is_file():
            return _open_folder(path / "export", dtype, load_yaml(path / "config.yaml"))
        newest = checkpoint.find_newest(path / "checkpoints")
        if newest is None:
            raise ConfigError(
                f"{path} holds neither an export/ nor a checkpoint; a connector/ is used with stage.init_from={path}/"
                "connector, and a full model can be exported from a checkpoint (save.every=N)"
            )
        return _open_checkpoint(newest, dtype, verify)
    except checkpoint.SaveFormatError:
        raise
    except (SafetensorError, OSError, RuntimeError, KeyError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        if "Cannot allocate memory" in str(error):
            raise ModelError(
                f"{path}: the kernel refuses to map a file that is larger than this host's memory and swap; allow it "
                f"with `sysctl vm.overcommit_memory=1` (mapping uses no memory), or export on another host: {error}"
            ) from error
        raise ModelError(
            permission_problem(path, depth=3) or f"{path} cannot be read; a file is damaged or missing: {error}"
        ) from error


def _load_run_config(folder: Path) -> RunConfig | None:
    """Returns the configuration of the run whose export/ the folder is; None for other folders."""
    path = folder.parent / "config.yaml"
    return load_yaml(path) if folder.name == "export" and path.is_file() else None


def _open_checkpoint(checkpoint_dir: Path, dtype: torch.dtype | None, verify: bool) -> ExportedModel:
    checks = [_verify_files(checkpoint_dir)] if verify else []
    checkpoint.refuse_unsafe_pickles(checkpoint_dir)
    config = load_yaml(checkpoint.config_path(checkpoint_dir))
    stock_class(config.stage.views)  # before the files are read
    state = checkpoint.read_state(checkpoint_dir)
    saved_dtype = getattr(torch, state.dtype)
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, config.stage)
    model, frozen, notes = _open_frozen_parts(config, backbone, state, checkpoint_dir)
    export_dtype = dtype or saved_dtype
    masters = export_dtype == torch.float32 != saved_dtype
    trained = trained_weights(model, checkpoint_dir, masters=masters)
    wide = torch.promote_types(export_dtype, saved_dtype)  # adapters are merged before rounding
    live = [(trained[name] if name in trained else frozen[name]).cast(wide) for name, _ in live_parameters(model)]
    tensors = [tensor.cast(export_dtype) for tensor in to_stock_tensors(live, model, backbone, config.stage.views)]
    run_dir = checkpoint_dir.parent.parent
    layout = f"{state.layout['num_ranks']} rank(s), ZeRO {state.layout['zero_stage']}, {state.dtype}"
    return ExportedModel(
        f"checkpoint {checkpoint_dir} (step {state.step}; {layout})",
        checkpoint_dir,
        tensors,
        backbone.hf_config.to_dict() | {"model_type": stock_class(config.stage.views)},
        config,
        backbone,
        processor,
        _read_data_summary(run_dir),
        state.versions,
        [*checks, *notes],
    )


def _verify_files(path: Path) -> str:
    """Verifies the sha256 of a checkpoint's files; returns a sentence that says so.

    Raises:
        ConfigError: a file is damaged, with the first one and other checkpoints; or it may not be read, with its owner.
    """
    damage = checkpoint.corrupt_files(path)
    denied = permission_problem(path, depth=2) if damage else ""
    if denied:
        raise ConfigError(denied)
    if damage:
        others = [str(other) for other in checkpoint.list_complete(path.parent) if other.resolve() != path.resolve()]
        available = f"available: {', '.join(reversed(others))}" if others else f"there is none in {path.parent}"
        raise ConfigError(
            f"checkpoint {path} is damaged: {damage}; export another checkpoint ({available}), or use --no-verify if "
            "you changed that file yourself"
        )
    return "the checkpoint's files match their sha256"


def _open_frozen_parts(
    config: RunConfig, backbone: Backbone, state: checkpoint.RunState, checkpoint_dir: Path
) -> tuple[LlavaNext, dict[str, LazyTensor], list[str]]:
    """Opens the tensors that the checkpoint does not contain, and verifies their sha256 against the run's.

    The tower is always needed, since its layers above the feature layer are never trained.

    Returns:
        The model of the run on the meta device, the frozen tensors by live name, and sentences about those that are
        kept in memory.
    """
    rates, lora = config.stage.rates, config.lora or {}
    start = config.stage.init_from
    model = build_model(backbone, dtype=getattr(torch, state.dtype), seed=config.seed, parts=())
    initial, notes = read_initial_weights(
        model,
        backbone,
        parts={"vision_tower", *lora} | (set(PARTS) - set(rates)),
        seed=config.seed,
        init_from=Path(start) if start is not None else None,
    )
    add_adapters(model, lora, seed=config.seed)
    set_trained_parts(model, rates)
    frozen = {
        name: initial[without_adapters(name)].renamed(name)
        for name, parameter in live_parameters(model)
        if not parameter.requires_grad
    }
    hashed = [frozen[name] for name, parameter in model.named_parameters() if not parameter.requires_grad]
    resume.check_frozen_parts(checkpoint_dir, state, resume.hash_tensors(hashed))
    return model, frozen, notes


def _open_folder(folder: Path, dtype: torch.dtype | None, config: RunConfig | None) -> ExportedModel:
    stock_config = json.loads((folder / "config.json").read_text())
    if not isinstance(stock_config, dict):
        raise ConfigError(f"{folder / 'config.json'} is not the configuration of a model: it holds no keys")
    if is_original(stock_config) or stock_config.get("model_type") not in get_args(StockClass):
        raise ConfigError(
            f"{folder} is not a Hugging Face llava, llava_next or llava_onevision directory (model_type "
            f"{stock_config.get('model_type')}, {stock_config.get('architectures')}); to train from it, set "
            f"stage.init_from={folder}"
        )
    stock = AutoConfig.from_pretrained(folder)
    check_folder(folder, stock)
    tower_type = stock.vision_config.model_type
    tensors = [
        tensor.renamed(to_published_name(name, tower_type)).cast(dtype or tensor.dtype)
        for name, tensor in read_folder(folder).items()
    ]
    backbone = processor = None
    if config is not None:
        with suppress(ModelError):  # the model's own folders may be missing; the directory is sufficient
            backbone = read_backbone(replace(config.model, projector=projector_kind(stock_config, folder)))
            processor = build_processor(backbone, config.stage)
    return ExportedModel(
        str(folder),
        folder,
        tensors,
        stock.to_dict(),
        config,
        backbone,
        processor,
        _read_data_summary(folder) or _read_data_summary(folder.parent),
        {},
    )


def check_folder(folder: Path, stock: Any) -> None:
    """Checks that a Hugging Face directory is consistent.

    Raises:
        ModelError: the grids do not match the tower's tile, the tokenizer does not match the image token, or the tower
            is not supported.
    """
    prepare_tower_config(stock.vision_config)
    if hasattr(stock, "image_grid_pinpoints"):
        try:
            grids_from_pinpoints(stock.image_grid_pinpoints, stock.vision_config.image_size)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    token = vocabulary.get(IMAGE_PLACEHOLDER)
    if token != stock.image_token_index:
        state = f"has {IMAGE_PLACEHOLDER} as token {token}" if token is not None else f"lacks {IMAGE_PLACEHOLDER}"
        raise ModelError(
            f"{folder}: its tokenizer {state}, but its config.json has image_token_index={stock.image_token_index}; "
            "use the tokenizer that was published with the model"
        )


def _load_original_tokenizer(folder: Path) -> Any:
    """Returns a Hugging Face directory's tokenizer for the authors' layout, where the tokenizer adds the
    beginning-of-sequence token instead of the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template or ""
    if template.startswith(BOS_EXPRESSION):
        tokenizer.chat_template = template.removeprefix(BOS_EXPRESSION)
        set_post_processor(tokenizer, add_bos=True)
    return tokenizer


def _correct_tokenizer(folder: Path) -> None:
    """Makes a copied tokenizer pad on the left and, if the chat template prints a beginning-of-sequence token, not add
    one: rendered text that is passed to the processor would have it twice."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if is_bos_added(tokenizer):
        turn = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        rendered = load_processor(folder).apply_chat_template([turn], add_generation_prompt=True)
        if not should_add_special_tokens(tokenizer, rendered):
            set_post_processor(tokenizer, add_bos=False)
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_settings(folder, tokenizer)


def _read_data_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "data.json"
    return json.loads(path.read_text()) if path.is_file() else None
