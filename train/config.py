"""The configuration of a run: composed by Hydra, checked once, then a frozen value that every room reads.

Owns `RunConfig` and every rule that can be checked without torch, data or weights, so that a mistake costs a second
and not a queue slot. Parts whose owner is another package (model, mixture) are that package's dataclasses.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pydantic
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_recipes.config import MixtureConfig
from llava_next.config import (
    PARTS,
    AttentionKernel,
    ImageMode,
    LoraConfig,
    ModelConfig,
    ModelError,
    check_grids,
    check_lora,
    check_peft,
)
from llava_next.conversation import check_template_name
from llava_next.released import adopted
from train.sentences import explain_composition, explain_invalid

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_STRICT = {"extra": "forbid"}

_ENGINE_OWNED = {
    "optimizer": "stage.learning_rates (an optimizer block would silently replace the rate of every part)",
    "scheduler": "stage.warmup_ratio and stage.schedule (a scheduler block would silently replace them)",
    "train_batch_size": "stage.batch_size",
    "train_micro_batch_size_per_gpu": "packing.max_tokens",
    "gradient_accumulation_steps": "stage.batch_size and packing.max_tokens",
    "gradient_clipping": "stage.clip_norm",
    "bf16": "precision",
    "fp16": "precision",
    "managed_gradient_accumulation": "nothing: micro-steps vary from step to step",
    "data_types": "precision",
    "communication_data_type": "precision",
}


class ConfigError(ValueError):
    """A user's mistake; the message is one sentence with the key, the rule, the value and the way out."""


@dataclass(frozen=True)
class StageConfig:
    """What a stage trains, on how much, how fast.

    `learning_rates` is the whole truth of what is trained: a part that is not named, or null, is frozen (where there
    are tiles, image_newline follows the projector unless it is named). `init_from` is the folder whose weights the
    stage starts from, or the authors' `mm_projector.bin` (null: fresh parts). Lengths are in tokens, image tokens
    included.
    """

    __pydantic_config__ = _STRICT

    name: str
    learning_rates: dict[str, float | None]
    batch_size: int
    max_length: int
    epochs: float = 1.0
    template: str | None = None
    image_mode: ImageMode = "anyres"
    unmask_special_tokens: bool = False
    init_from: str | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    loss_weighting: Literal["token", "sample"] = "token"
    result: Literal["connector", "export"] = "export"

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each trained part, image_newline's included."""
        rates = dict(self.learning_rates)
        if "projector" in rates and self.image_mode == "anyres":  # single views have no newline to learn
            rates.setdefault("image_newline", rates["projector"])
        return {part: rate for part, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class PackingConfig:
    """Budgets of a row, the only memory knobs; they change nothing that is learned."""

    __pydantic_config__ = _STRICT

    max_tokens: int
    max_tiles: int


@dataclass(frozen=True)
class DataConfig:
    """Where prepared sources lie, and how many processes read them on each rank.

    `local_dir` is a folder on each node's own disk that the mixture's stores are copied to first (null: they are read
    where they lie). A read that fails is tried `read_retries` times more before the run stops.
    """

    __pydantic_config__ = _STRICT

    store_root: str
    workers: int = 2
    prefetch: int = 4
    length_workers: int = 0
    local_dir: str | None = None
    read_retries: int = 3


@dataclass(frozen=True)
class SaveConfig:
    """How often checkpoints are written (in steps; 0: never) and how many of the newest are kept.

    Those of every `keep_every`-th step are kept besides (0: none).
    """

    __pydantic_config__ = _STRICT

    every: int = 500
    keep: int = 2
    keep_every: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """How often the held-out loss of each source is computed on the live model (in steps; 0: never), and how many
    held-out questions it is asked then, for answers of at most `answer_tokens` tokens.

    It changes nothing that is learned. What is held out stands in the mixture (`holdout`).
    """

    __pydantic_config__ = _STRICT

    every: int = 0
    answers: int = 0
    answer_tokens: int = 32


@dataclass(frozen=True)
class LogConfig:
    """Where a run's numbers go besides metrics.jsonl."""

    __pydantic_config__ = _STRICT

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "llava-next"
    tensorboard: bool = False
    every: int = 1


@dataclass(frozen=True)
class ProfileConfig:
    """The first and the last step that rank 0 profiles; none: no step."""

    __pydantic_config__ = _STRICT

    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """One stage of one run.

    `lora` names parts whose adapters train, at the part's rate, while their own weights are frozen.
    """

    __pydantic_config__ = _STRICT

    root: str
    name: str
    seed: int
    model: ModelConfig
    stage: StageConfig
    mixture: MixtureConfig
    engine: dict[str, Any]
    packing: PackingConfig
    data: DataConfig
    lora: dict[str, LoraConfig] | None = None
    save: SaveConfig = field(default_factory=SaveConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: AttentionKernel = "auto"
    recompute: tuple[Literal["vision_tower", "language_model"], ...] = ()
    compile: tuple[Literal["vision_tower", "language_model"], ...] = ()
    liger: bool = False
    deterministic: bool = False
    timeout_s: int = 1800
    preflight: Literal["auto", "only", "off"] = "auto"
    max_steps: int | None = None
    time_limit_min: float | None = None
    skip_non_finite: int = 0
    resume_allow: tuple[str, ...] = ()
    recipe: str | None = None
    """Where the stage's numbers come from; the program writes it, nobody sets it."""

    @property
    def run_dir(self) -> Path:
        """Everything that this stage writes lies here."""
        return Path(self.root) / self.name / self.stage.name


def load(overrides: Sequence[str] = (), config_dir: str | None = None, *, folders: bool = True) -> RunConfig:
    """Composes and checks a configuration as the command line does.

    Args:
        overrides: as on the command line, for example ["experiment=quickstart", "stage=align"].
        config_dir: a folder of further YAML files.
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: with one sentence.
    """
    return check(composed_from(overrides, config_dir), folders=folders)


def composed_from(overrides: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """What `load` checks, as Hydra composes it.

    Raises:
        ConfigError: with one sentence.
    """
    GlobalHydra.instance().clear()
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("train", overrides=[*overrides, *searchpath])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(str(error))) from error


def load_yaml(path: Path) -> RunConfig:
    """The configuration that a run wrote into its folder.

    Raises:
        ConfigError: there is no such file, or it was written by an incompatible version.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is no run folder: it holds no {path.name}; name the folder of a stage")
    composed = OmegaConf.load(path)
    assert isinstance(composed, DictConfig)
    return check(composed, folders=False)


def check(composed: DictConfig, *, folders: bool = True) -> RunConfig:
    """The frozen configuration, or the first of its mistakes.

    Args:
        folders: also check that the folders it names exist.

    Raises:
        ConfigError: with the key, the rule, the value and the way out.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(str(error))) from error
    assert isinstance(plain, dict)
    for choice in ("hydra", "experiment"):
        plain.pop(choice, None)
    if isinstance(plain.get("mixture"), dict):  # as data_recipes.prepare reads the same file
        mixture = plain["mixture"]
        mixture.setdefault("seed", 0)
        if isinstance(mixture.get("sources"), dict):
            mixture["sources"] = {name: share or {} for name, share in mixture["sources"].items()}
    _check_origin(plain)
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(plain)
    except pydantic.ValidationError as error:
        raise ConfigError(explain_invalid(error, RunConfig)) from error
    config = _adopted(config)
    _check_values(config)
    if folders:
        _check_folders(config)
        _check_installed(config)
    return config


def _check_origin(plain: dict[Any, Any]) -> None:
    """Before the types are checked: the paths of a model that lies in stage.init_from are null where that is."""
    parts = [part for part in (plain.get("model") or {}).values() if isinstance(part, dict)]
    if any(part.get("weights") == "init_from" for part in parts) and not (plain.get("stage") or {}).get("init_from"):
        raise ConfigError(
            "stage.init_from has no value, and the model is to be the one that lies there; name the directory of a "
            "whole model, in Hugging Face's layout or the authors'"
        )


def _adopted(config: RunConfig) -> RunConfig:
    """Where the weights are those of a whole model in stage.init_from, grids and the like are its own, too."""
    model, start = config.model, config.stage.init_from
    if "init_from" not in (model.language_model.weights, model.vision_tower.weights):
        return config
    if (
        start is None or not Path(start).is_dir()
    ):  # told by `_check_folders`; a run's own config.yaml has what was there
        return config
    try:
        return replace(config, model=adopted(model, Path(start)))
    except ModelError as error:
        raise ConfigError(f"stage.init_from: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, readable by `load_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(pydantic.TypeAdapter(RunConfig).dump_python(config, mode="json")))


def _check_values(config: RunConfig) -> None:
    stage, packing = config.stage, config.packing
    for part, rate in stage.learning_rates.items():
        if part not in PARTS:
            raise ConfigError(f"stage.learning_rates.{part}: there is no such part; the parts are {', '.join(PARTS)}")
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"stage.learning_rates.{part} must be above 0, got {rate}; leave it out to freeze it")
    if not stage.rates:
        raise ConfigError(f"stage.learning_rates names no part: nothing would train; name some of {', '.join(PARTS)}")
    for key, value, least in (
        ("seed", config.seed, 0),
        ("stage.batch_size", stage.batch_size, 1),
        ("stage.max_length", stage.max_length, 2),
        ("data.workers", config.data.workers, 0),
        ("data.prefetch", config.data.prefetch, 1),
        ("data.length_workers", config.data.length_workers, 0),
        ("data.read_retries", config.data.read_retries, 0),
        ("save.every", config.save.every, 0),
        ("save.keep", config.save.keep, 1),
        ("save.keep_every", config.save.keep_every, 0),
        ("evaluate.every", config.evaluate.every, 0),
        ("evaluate.answers", config.evaluate.answers, 0),
        ("evaluate.answer_tokens", config.evaluate.answer_tokens, 1),
        ("skip_non_finite", config.skip_non_finite, 0),
        ("log.every", config.log.every, 1),
        ("timeout_s", config.timeout_s, 1),
        ("max_steps", config.max_steps, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{key} must be at least {least}, got {value}")
    steps = config.profile.steps
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
        raise ConfigError(f"profile.steps is [first, last] with 0 <= first <= last, or [], got {list(steps)}")
    if config.time_limit_min is not None and not 0 < config.time_limit_min < math.inf:
        raise ConfigError(f"time_limit_min must be above 0, got {config.time_limit_min}; null sets no limit")
    if not 0 < stage.epochs < math.inf:
        raise ConfigError(f"stage.epochs must be above 0 and finite, got {stage.epochs}")
    if not 0 <= stage.weight_decay < math.inf:
        raise ConfigError(f"stage.weight_decay must be 0 or more, got {stage.weight_decay}")
    if stage.clip_norm is not None and not 0 < stage.clip_norm < math.inf:
        raise ConfigError(f"stage.clip_norm must be above 0, got {stage.clip_norm}; null leaves gradients as they are")
    if not 0 <= stage.warmup_ratio < 1:
        raise ConfigError(f"stage.warmup_ratio is a share of the steps, from 0 to below 1, got {stage.warmup_ratio}")
    for key, template in (
        ("stage.template", stage.template),
        ("model.language_model.template", config.model.language_model.template),
    ):
        if template is None:
            continue
        try:
            check_template_name(template)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    try:
        check_grids(config.model.grids)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if packing.max_tokens < stage.max_length:
        raise ConfigError(
            f"packing.max_tokens={packing.max_tokens} is smaller than stage.max_length={stage.max_length}: the longest "
            f"allowed sample would fit no row; raise packing.max_tokens to at least {stage.max_length}"
        )
    most_tiles = 1 if stage.image_mode != "anyres" else 1 + max(r * c for r, c in config.model.grids)
    if packing.max_tiles < most_tiles:
        raise ConfigError(
            f"packing.max_tiles={packing.max_tiles} is smaller than the {most_tiles} tiles of one picture in the "
            f"largest of model.grids; raise it to at least {most_tiles}"
        )
    if config.evaluate.every and not any(share.holdout for share in config.mixture.sources.values()):
        raise ConfigError(
            f"evaluate.every={config.evaluate.every}, but mixture {config.mixture.name} holds nothing out; give a "
            "source `holdout: N`, or set evaluate.every=0"
        )
    if config.evaluate.answers and not config.evaluate.every:
        raise ConfigError(
            f"evaluate.answers={config.evaluate.answers} questions are asked where the held-out loss is computed, and "
            "evaluate.every=0 is never; set evaluate.every to a number of steps, or evaluate.answers=0"
        )
    if config.liger and "language_model" in config.compile:
        raise ConfigError(
            "liger=true and compile=[language_model] are two ways to run the same blocks, and torch.compile cannot "
            "read liger's; choose one (compile is the faster, compile=[vision_tower] goes with liger)"
        )
    _check_lora(config.lora or {}, stage)
    _check_engine(config.engine)


def _check_lora(lora: dict[str, LoraConfig], stage: StageConfig) -> None:
    try:
        check_lora(lora)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    for part in lora:
        if part not in stage.rates:
            raise ConfigError(
                f"lora.{part}: its adapters train at stage.learning_rates.{part}, which has no value; give it one "
                "(2.0e-4 is usual), or leave the part out of lora"
            )
    if lora and stage.result == "connector":
        raise ConfigError(
            f"lora names {', '.join(lora)}, and stage.result=connector writes the projector alone: the adapters would "
            "be lost; choose stage.result=export, or lora=null"
        )


def _check_engine(engine: dict[str, Any]) -> None:
    for key, owner in _ENGINE_OWNED.items():
        if key in engine:
            raise ConfigError(f"engine.{key} is the run's own, set by {owner}; remove it from the engine's dictionary")
    zero = engine.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.zero_optimization must be a dictionary with a `stage`, got {zero!r}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")


def _check_folders(config: RunConfig) -> None:
    language, tower = config.model.language_model, config.model.vision_tower
    for key, path in (
        ("model.language_model.path", language.path),
        ("model.language_model.tokenizer", language.tokenizer),
        ("model.vision_tower.path", tower.path),
    ):
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"{key}: there is no folder {path}; name a Hugging Face directory on disk")
    store_root = Path(config.data.store_root)
    prepare = f"run `python -m data_recipes.prepare --mixture {config.mixture.name} --raw RAW --stores {store_root}`"
    if config.mixture.name.startswith("quickstart_"):
        prepare = (
            f"./scripts/quickstart.sh draws the raw files and prepares them; with raw files of your own, {prepare}"
        )
    if not store_root.is_dir():
        raise ConfigError(f"data.store_root: there is no folder {store_root}; {prepare}")
    for source in (*config.mixture.sources, *config.mixture.exclude):
        if not (store_root / source / "manifest.json").is_file():
            key = f"mixture.sources.{source}" if source in config.mixture.sources else "mixture.exclude"
            raise ConfigError(f"{key}: there is no prepared source in {store_root / source}; {prepare}")
    local_dir = config.data.local_dir
    if local_dir is not None and not Path(local_dir).is_dir():
        raise ConfigError(
            f"data.local_dir: there is no folder {local_dir} on this machine; name one on its own disk, or null to "
            "read the stores where they lie"
        )
    if config.stage.init_from is not None:
        _check_start(Path(config.stage.init_from))


def _check_installed(config: RunConfig) -> None:
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard=true needs the package tensorboard, which is not installed; ./scripts/setup.sh --extras "
            "tensorboard, or leave it false: metrics.jsonl has the same numbers"
        )
    if config.lora:
        try:
            check_peft()
        except ModelError as error:
            raise ConfigError(str(error)) from error


def _check_start(start: Path) -> None:
    if start.is_file() and start.suffix != ".bin":
        raise ConfigError(
            f"stage.init_from: {start} is a file, and only the authors' connector is given as one (mm_projector.bin); "
            f"name its folder, {start.parent}"
        )
    if not start.is_dir() and not start.is_file():
        raise ConfigError(
            f"stage.init_from: there is no folder and no mm_projector.bin {start}; run stage=align first, or start "
            "from fresh parts with stage.init_from=null"
        )


def explain(text: str) -> str:
    """Hydra's and OmegaConf's messages as one sentence with the key and the way out."""
    return explain_composition(text, RunConfig)
