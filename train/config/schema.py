"""The configuration of a run: a frozen value that every room reads.

Owns `RunConfig`, its defaults and `ConfigError`. How it is composed is compose.py's, what it may hold rules.py's; parts
whose owner is another package (model, mixture) are that package's dataclasses.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_recipes.schema.mixture_config import MixtureConfig
from llava_next.config import AttentionKernel, ElementwiseKernel, ImageMode, LinearKernel, LoraConfig, ModelConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_STRICT = {"extra": "forbid"}


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
    linear: LinearKernel = "auto"
    elementwise: ElementwiseKernel = "auto"
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
