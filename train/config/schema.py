"""The configuration of a run as frozen dataclasses, with its defaults.

`compose.py` reads it from YAML and the command line, and `rules.py` checks its values. The model's and the mixture's
parts are dataclasses of the packages that use them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_recipes.schema.mixture_config import MixtureConfig
from llava_next.config import ANYRES, AttentionKernel, LoraConfig, ModelConfig, TemplateConfig, ViewsConfig

_STRICT = {"extra": "forbid"}


class ConfigError(ValueError):
    """A user's mistake; the message is one sentence with the key, the rule, the value and the fix."""


@dataclass(frozen=True)
class StageConfig:
    """The parts that a stage trains, their learning rates, and the length of the stage.

    A part is trained if `learning_rates` names it with a rate, and frozen otherwise (image_newline, where images have
    newlines, has the projector's rate unless it is named). `init_from` is the folder whose weights the stage starts
    from, or the authors' `mm_projector.bin` (null: newly initialised parts). Lengths are in tokens, image tokens
    included. `betas` and `eps` are AdamW's: the decay rates of its two moments, and the term added to its denominator.
    """

    __pydantic_config__ = _STRICT

    name: str
    learning_rates: dict[str, float | None]
    batch_size: int
    max_length: int
    epochs: float = 1.0
    template: str | TemplateConfig | None = None
    views: ViewsConfig = ANYRES
    unmask_special_tokens: bool = False
    init_from: str | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    loss_weighting: Literal["token", "sample"] = "token"
    result: Literal["connector", "export"] = "export"

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each trained part, image_newline included."""
        rates = dict(self.learning_rates)
        if "projector" in rates and self.views.has_newlines:
            rates.setdefault("image_newline", rates["projector"])
        return {part: rate for part, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class PackingConfig:
    """Largest number of tokens and tiles of a row. They change memory use and nothing that is learned."""

    __pydantic_config__ = _STRICT

    max_tokens: int
    max_tiles: int


@dataclass(frozen=True)
class DataConfig:
    """Where prepared sources are, and how many processes read them on each rank.

    `local_dir` is a folder on each node's own disk to which the mixture's stores are copied first (null: they are read
    from `store_root`). A failed read is repeated `read_retries` times before the run stops.
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

    In addition those of every `keep_every`-th step are kept (0: none).
    """

    __pydantic_config__ = _STRICT

    every: int = 500
    keep: int = 2
    keep_every: int = 0


@dataclass(frozen=True)
class VerifyConfig:
    """How often a step is computed twice on the same rows and the ranks are compared (in steps; 0: never)."""

    __pydantic_config__ = _STRICT

    every: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """How often the held-out loss of each source is computed (in steps; 0: never), and how many held-out questions the
    model answers then, with at most `answer_tokens` tokens each.

    It changes nothing that is learned. The mixture's `holdout` says how many samples are held out.
    """

    __pydantic_config__ = _STRICT

    every: int = 0
    answers: int = 0
    answer_tokens: int = 32


@dataclass(frozen=True)
class LogConfig:
    """Where a run's metrics are written in addition to metrics.jsonl."""

    __pydantic_config__ = _STRICT

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "llava-next"
    tensorboard: bool = False
    every: int = 1


@dataclass(frozen=True)
class ProfileConfig:
    """The first and the last step that rank 0 profiles; empty: no step."""

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
    verify: VerifyConfig = field(default_factory=VerifyConfig)
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
    allow_idle_gpus: bool = False
    timeout_s: int = 1800
    join_timeout_s: int = 300
    preflight: Literal["auto", "only", "off"] = "auto"
    max_steps: int | None = None
    time_limit_min: float | None = None
    skip_non_finite: int = 0
    on_spike: Literal["none", "stop"] = "none"
    spike_threshold: float = 10.0
    resume_allow: tuple[str, ...] = ()
    overwrite: bool = False
    recipe: str | None = None
    """The source of the stage's numbers. Recipe files and the program set it, not the user."""

    @property
    def run_dir(self) -> Path:
        """The folder of all files that this stage writes."""
        return Path(self.root) / self.name / self.stage.name
