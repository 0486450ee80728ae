"""The rules for the values of a configuration that can be checked without torch, data or weights.

They are checked before anything is loaded, so that a mistake is reported within a second. The first violated rule is
raised as a `ConfigError` with the key, the rule, the value and the fix.
"""

import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_next.config import (
    PARTS,
    LoraConfig,
    ModelError,
    check_grids,
    check_lora,
    check_peft,
    check_views,
    stock_class,
)
from llava_next.inputs.conversation import check_template
from llava_next.model_directory import check_directories
from train.config.schema import ConfigError, LogConfig, RunConfig, StageConfig
from train.config.wandb_mode import wandb_mode

_ENGINE_OWNED = {
    "optimizer": "stage.learning_rates (an optimizer block would silently replace the rate of every part)",
    "scheduler": "stage.warmup_ratio and stage.schedule (a scheduler block would silently replace them)",
    "train_batch_size": "stage.batch_size",
    "train_micro_batch_size_per_gpu": "packing.max_tokens",
    "gradient_accumulation_steps": "stage.batch_size and packing.max_tokens",
    "gradient_clipping": "stage.clip_norm",
    "bf16": "precision",
    "fp16": "precision",
    "managed_gradient_accumulation": "the program: the number of micro-steps varies from step to step",
    "data_types": "precision",
}
_ENGINE_REFUSED = {
    "gradient_allreduce_op": "the program sets it: the gradient of a step is a sum over rows and ranks",
    "prescale_gradients": "gradients are summed, not averaged, so there is nothing to scale",
    "gradient_predivide_factor": "gradients are summed, not averaged, so there is nothing to scale",
    "sequence_parallel_size": "it changes the number of ranks that DeepSpeed averages over",
    "data_parallel_size": "DeepSpeed does not read it",
    "tensor_parallel": "it requires the same batch on every rank of a group; shard with engine=zero3",
    "activation_checkpointing": "this model does not use DeepSpeed's; set recompute=[language_model]",
    "compile": "set compile=[language_model]",
    "torch_autocast": "it changes the precision; set precision",
}
"""Keys that published DeepSpeed dictionaries contain, and why each is refused."""

ZERO_KEYS: dict[str, tuple[int, ...]] = {
    "stage": (0, 1, 2, 3),
    "overlap_comm": (2, 3),  # at 1 DeepSpeed refuses it where micro-steps vary from step to step
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "round_robin_gradients": (1, 2),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "zero_hpz_partition_size": (3,),
}
"""Keys of DeepSpeed's `zero_optimization` that may be set, and the stages at which DeepSpeed 0.19.8 reads them. Tests
show that none of them changes the trained weights (tests/train/config/test_engine_keys.py)."""

COMMUNICATION_TYPES = ("fp32", "bf16")
"""Values of DeepSpeed's `communication_data_type`; fp32 is this program's default."""
_ENGINE_KEYS = ("zero_optimization", "communication_data_type")

OFFLOAD_KEYS = ("device", "pin_memory")
"""Keys of `offload_optimizer` and `offload_param` that may be set; `pin_memory` has an effect on a GPU only."""

_ZERO_REFUSED = {
    "leaf_module": "it changes which modules DeepSpeed gathers together, and has changed the trained weights silently",
    "allgather_partitions": "DeepSpeed does not read it",
    "zenflow": "it applies gradients of earlier steps",
    "zero_quantized_weights": "it rounds the weights",
    "zero_quantized_nontrainable_weights": "it rounds the weights",
    "zero_quantized_gradients": "it rounds the gradients",
    "compute_grad_norm": "the run logs the norm and clips by it",
    "stage3_gather_16bit_weights_on_model_save": "the run writes its result from partitioned weights",
    "elastic_checkpoint": "checkpoints are resumed on any number of ranks without it",
    "load_from_fp32_weights": "checkpoints are resumed on any number of ranks without it",
    "ignore_unused_parameters": "every row runs every part, so no parameter is unused",
    "cpu_offload": "DeepSpeed has renamed it; set offload_optimizer: {device: cpu}",
    "cpu_offload_param": "DeepSpeed has renamed it; set offload_param: {device: cpu}",
}


_MAX_NAME_BYTES = 200
"""File systems allow 255 for a file's name; temporary files have suffixes."""


def check_values(config: RunConfig) -> None:
    """Raises ConfigError for a value out of its range, or for two values that contradict each other."""
    _check_views(config.stage)
    _check_rates(config.stage)
    _check_numbers(config)
    _check_names(config)
    _check_wandb(config.log)
    _check_row_budgets(config)
    if config.evaluate.every and not any(share.holdout for share in config.mixture.sources.values()):
        raise ConfigError(
            f"evaluate.every={config.evaluate.every}, but mixture {config.mixture.name} holds nothing out; set "
            "`holdout: N` of a source, or evaluate.every=0"
        )
    if config.evaluate.answers and not config.evaluate.every:
        raise ConfigError(
            f"evaluate.answers={config.evaluate.answers} questions are asked when the held-out loss is computed, and "
            "evaluate.every=0 means never; set evaluate.every to a number of steps, or evaluate.answers=0"
        )
    if config.liger and "language_model" in config.compile:
        raise ConfigError(
            "liger=true and compile=[language_model] exclude each other: torch.compile cannot compile liger's kernels; "
            "set one of them (compile is faster; compile=[vision_tower] can be combined with liger)"
        )
    _check_lora(config.lora or {}, config.stage)
    _check_engine(config.engine)
    if config.compile and config.engine.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"compile=[{','.join(config.compile)}] cannot be combined with ZeRO stage 3: DeepSpeed gathers modules in "
            "hooks, so torch.compile recompiles each block until its limit stops the run; set compile=[], or "
            "engine=zero2"
        )


def _check_views(stage: StageConfig) -> None:
    """The views are known, and the export of a stage that writes one can represent them."""
    try:
        check_views(stage.views)
        if stage.result == "export":
            stock_class(stage.views)
    except ModelError as error:
        raise ConfigError(str(error)) from error


def _check_rates(stage: StageConfig) -> None:
    for part, rate in stage.learning_rates.items():
        if part not in PARTS:
            raise ConfigError(f"stage.learning_rates.{part}: there is no such part; the parts are {', '.join(PARTS)}")
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"stage.learning_rates.{part} must be above 0, got {rate}; leave it out to freeze it")
    if not stage.rates:
        raise ConfigError(f"stage.learning_rates names no part to train; name one or more of {', '.join(PARTS)}")


def _check_numbers(config: RunConfig) -> None:
    stage = config.stage
    for key, value, minimum in (
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
        ("verify.every", config.verify.every, 0),
        ("evaluate.every", config.evaluate.every, 0),
        ("evaluate.answers", config.evaluate.answers, 0),
        ("evaluate.answer_tokens", config.evaluate.answer_tokens, 1),
        ("skip_non_finite", config.skip_non_finite, 0),
        ("log.every", config.log.every, 1),
        ("timeout_s", config.timeout_s, 1),
        ("join_timeout_s", config.join_timeout_s, 1),
        ("max_steps", config.max_steps, 1),
    ):
        if value is not None and value < minimum:
            raise ConfigError(f"{key} must be at least {minimum}, got {value}")
    for key, number, maximum in (("seed", config.seed, 2**63 - 1), ("timeout_s", config.timeout_s, 10**9)):
        if number > maximum:
            raise ConfigError(f"{key} must be at most {maximum}, got {number}")
    steps = config.profile.steps
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
        raise ConfigError(f"profile.steps is [first, last] with 0 <= first <= last, or [], got {list(steps)}")
    if config.time_limit_min is not None and not 0 < config.time_limit_min < math.inf:
        raise ConfigError(f"time_limit_min must be above 0, got {config.time_limit_min}; null sets no limit")
    if not 0 < config.spike_threshold < math.inf:
        raise ConfigError(f"spike_threshold must be above 0 and finite, got {config.spike_threshold}")
    if not 0 < stage.epochs < math.inf:
        raise ConfigError(f"stage.epochs must be above 0 and finite, got {stage.epochs}")
    if not 0 <= stage.weight_decay < math.inf:
        raise ConfigError(f"stage.weight_decay must be 0 or more, got {stage.weight_decay}")
    if len(stage.betas) != 2 or not all(0 <= beta < 1 for beta in stage.betas):
        raise ConfigError(
            f"stage.betas must be two numbers from 0 to below 1, got {list(stage.betas)}; AdamW's defaults are "
            "[0.9, 0.999]"
        )
    if not 0 < stage.eps < math.inf:
        raise ConfigError(f"stage.eps must be above 0 and finite, got {stage.eps}; AdamW's default is 1.0e-8")
    if stage.clip_norm is not None and not 0 < stage.clip_norm < math.inf:
        raise ConfigError(f"stage.clip_norm must be above 0, got {stage.clip_norm}; null disables clipping")
    if not 0 <= stage.warmup_ratio < 1:
        raise ConfigError(
            f"stage.warmup_ratio must be a share of the steps from 0 to below 1, got {stage.warmup_ratio}"
        )


def _check_names(config: RunConfig) -> None:
    _check_folder_name("name", config.name)
    _check_folder_name("stage.name", config.stage.name, nested=False)
    for key, template in (
        ("stage.template", config.stage.template),
        ("model.language_model.template", config.model.language_model.template),
    ):
        if template is None:
            continue
        try:
            check_template(template)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error


def _check_wandb(log: LogConfig) -> None:
    """The project's name is one that wandb accepts. wandb itself would refuse it after the model has been built."""
    project = log.wandb_project
    if log.wandb == "off":
        return
    if not project or len(project) > _MAX_WANDB_PROJECT or set(project) & set(_NOT_IN_WANDB_PROJECT):
        raise ConfigError(
            f"log.wandb_project must have 1 to {_MAX_WANDB_PROJECT} characters and none of {_NOT_IN_WANDB_PROJECT}, "
            f"got {project!r}; an entity is set by the environment variable WANDB_ENTITY"
        )


_MAX_WANDB_PROJECT = 128
_NOT_IN_WANDB_PROJECT = "/\\#?%:"


def _check_folder_name(key: str, name: str, *, nested: bool = True) -> None:
    """The run's folder is root/name/stage.name: inside root, and with a name that can be printed in one line."""
    reason = ""
    if not name.strip() or name != name.strip():
        reason = "is empty, or begins or ends with a space"
    elif not name.isprintable():
        reason = "has a line break or another character that cannot be printed"
    elif name.startswith("/") or {"", ".", ".."} & set(name.split("/")) or ("/" in name and not nested):
        reason = "does not name a folder inside root"
    elif max(len(part.encode()) for part in name.split("/")) > _MAX_NAME_BYTES:
        reason = f"is longer than {_MAX_NAME_BYTES} bytes"
    if reason:
        raise ConfigError(
            f"{key}={name!r} {reason}; the run's folder is root/name/stage.name, for example {key}=llava_7b"
        )


def _check_row_budgets(config: RunConfig) -> None:
    """There are grids, and a row holds the longest sample and the image with the most tiles."""
    stage, packing = config.stage, config.packing
    try:
        check_grids(config.model.grids)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if packing.max_tokens < stage.max_length:
        raise ConfigError(
            f"packing.max_tokens={packing.max_tokens} is smaller than stage.max_length={stage.max_length}: the longest "
            f"allowed sample would not fit into a row; raise packing.max_tokens to at least {stage.max_length}"
        )
    max_tiles = 1 if "anyres" not in stage.views.modes else 1 + max(r * c for r, c in config.model.grids)
    if packing.max_tiles < max_tiles:
        raise ConfigError(
            f"packing.max_tiles={packing.max_tiles} is smaller than the {max_tiles} tiles of one image in the largest "
            f"of model.grids; raise it to at least {max_tiles}"
        )


def _check_lora(lora: dict[str, LoraConfig], stage: StageConfig) -> None:
    try:
        check_lora(lora)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    for part in lora:
        if part not in stage.rates:
            raise ConfigError(
                f"lora.{part}: its adapters train at stage.learning_rates.{part}, which has no value; set it (usual: "
                "2.0e-4), or leave the part out of lora"
            )
    if lora and stage.result == "connector":
        raise ConfigError(
            f"lora names {', '.join(lora)}, and stage.result=connector writes only the projector: the adapters would "
            "be lost; set stage.result=export, or lora=null"
        )


def _check_engine(engine: dict[str, Any]) -> None:
    """Accepts only keys that have an effect, and no effect on what is learned."""
    for key in engine:
        if key in _ENGINE_OWNED:
            raise ConfigError(
                f"engine.{key} is derived, it is set by {_ENGINE_OWNED[key]}; remove it from the engine's dictionary"
            )
        if key not in _ENGINE_KEYS:
            raise _refused_key(f"engine.{key}", _ENGINE_REFUSED.get(key), _ENGINE_KEYS)
    communication = engine.get("communication_data_type", COMMUNICATION_TYPES[0])
    if communication not in COMMUNICATION_TYPES:
        raise ConfigError(
            f"engine.communication_data_type must be one of {', '.join(COMMUNICATION_TYPES)}, got {communication!r}"
        )
    zero = engine.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.zero_optimization must be a dictionary with a `stage`, got {zero!r}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for key, value in zero.items():
        name = f"engine.zero_optimization.{key}"
        if key not in ZERO_KEYS:
            allowed = (known for known, stages in ZERO_KEYS.items() if stage in stages)
            raise _refused_key(name, _ZERO_REFUSED.get(key), allowed)
        if stage not in ZERO_KEYS[key]:
            stages = " and ".join(str(number) for number in ZERO_KEYS[key])
            raise ConfigError(
                f"{name}={value} has no effect at ZeRO stage {stage}, only at {stages}; remove it, or set "
                f"engine=zero{ZERO_KEYS[key][-1]}"
            )
        if key.startswith("offload_"):
            _check_offload(name, value)
    _check_copy_in_nodes(zero)


def _check_copy_in_nodes(zero: dict[str, Any]) -> None:
    """The number of ranks is one, and the copy is on the GPU."""
    key, size = "engine.zero_optimization.zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1)
    if size is not None and (type(size) is not int or size < 1):
        raise ConfigError(
            f"{key} must be null (the ranks of a node) or a number of ranks from 1 on, got {size!r}; 1 switches it "
            "off, as engine=zero3 does"
        )
    offload = zero.get("offload_param") or {"device": "none"}
    if size != 1 and offload["device"] != "none":
        raise ConfigError(
            f"{key}={'null' if size is None else size} and offload_param exclude each other: the copy in a node is "
            "there to gather from GPUs, and offload_param would hold it on the host; set engine=zero3, or remove "
            "offload_param"
        )


def _refused_key(name: str, reason: str | None, allowed: Iterable[str]) -> ConfigError:
    reason = reason or "no test shows that it changes nothing that is learned"
    return ConfigError(f"{name} is refused: {reason}; remove it. Keys that may be set: {', '.join(allowed)}")


def _check_offload(name: str, offload: Any) -> None:
    if not isinstance(offload, dict) or "device" not in offload:
        raise ConfigError(f"{name} must be a dictionary with a `device`, got {offload!r}; set {name}.device=cpu")
    for key in offload:
        if key not in OFFLOAD_KEYS:
            raise _refused_key(f"{name}.{key}", None, OFFLOAD_KEYS)
    if offload["device"] not in ("none", "cpu"):
        raise ConfigError(
            f"{name}.device must be none or cpu, got {offload['device']!r}: DeepSpeed's NVMe operator is not tested "
            f"with this program; set {name}.device=cpu"
        )


def check_folders(config: RunConfig) -> None:
    """Raises ConfigError for a named folder that does not exist or, for a model's, lacks files that a run reads.

    The message gives the command that creates it.
    """
    _check_model_directories(config)
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
            "read the stores from data.store_root"
        )
    _check_root(config)
    if config.stage.init_from is not None:
        _check_start(Path(config.stage.init_from))


def _check_model_directories(config: RunConfig) -> None:
    """The directories of all parts have what is read from them, weights included; reported together."""
    language, tower = config.model.language_model, config.model.vision_tower
    language_key, tower_key = (
        "stage.init_from" if part.weights == "init_from" else f"model.{name}.path"
        for name, part in (("language_model", language), ("vision_tower", tower))
    )
    tokenizer_key = "model.language_model.tokenizer" if language.tokenizer else language_key
    problems = check_directories(
        [
            (language_key, language.path, "language model", language.weights != "random"),
            (tokenizer_key, language.tokenizer_path, "tokenizer", False),
            (tower_key, tower.path, "vision tower", tower.weights != "random"),
        ]
    )
    if problems:
        raise ConfigError(problems)


def _check_root(config: RunConfig) -> None:
    """The folder of the run exists or can be created, and can be written."""
    nearest = next(path for path in (config.run_dir, *config.run_dir.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"root: {nearest} is a file, and {config.run_dir} would be inside it; choose another root")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"root: {nearest} cannot be written by this user, and {config.run_dir} is to be in it; choose another root"
        )


def check_installed(config: RunConfig) -> None:
    """Raises ConfigError for an optional package that is needed and not installed, or for an unknown WANDB_MODE."""
    wandb_mode(config.log)
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard=true needs the package tensorboard, which is not installed; run ./scripts/setup.sh "
            "--extras tensorboard, or set it to false: metrics.jsonl has the same numbers"
        )
    if config.lora:
        try:
            check_peft()
        except ModelError as error:
            raise ConfigError(str(error)) from error


def _check_start(start: Path) -> None:
    if start.is_file() and start.suffix != ".bin":
        raise ConfigError(
            f"stage.init_from: {start} is a file, and the only file allowed is the authors' connector "
            f"(mm_projector.bin); name its folder, {start.parent}"
        )
    if not start.is_dir() and not start.is_file():
        raise ConfigError(
            f"stage.init_from: there is no folder and no mm_projector.bin {start}; run stage=align first, or start "
            "from newly initialised parts with stage.init_from=null"
        )
