"""Resumes a run: compares a checkpoint with the configuration, loads it, and verifies the loaded state.

With the same ranks and ZeRO stage, DeepSpeed's files are loaded and the run continues bit for bit. Otherwise each
parameter's state is converted (`universal.py`): the samples of each step are the same, and the losses up to rounding.
Frozen parameters are not in a checkpoint; they come from `init_from` again and are compared by their sha256.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from omegaconf import OmegaConf

from llava_next.formats.tensors import LazyTensor, from_tensor
from llava_next.inputs.batch import Batch
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import part_of
from train.checkpoint import saver as checkpoint
from train.checkpoint.saver import RunState
from train.checkpoint.universal import ParameterStates, copy_weights, open_initial_states, open_states, set_states
from train.config.compose import read_written, to_yaml
from train.config.schema import ConfigError, RunConfig
from train.distributed.versions import versions
from train.distributed.world import World, all_gather_objects, barrier, broadcast_from_main
from train.engine.deepspeed_engine import release_gathered, zero_stage
from train.engine.optimizer import parameter_groups, set_rates
from train.engine.replica_checksums import check_replicas

NON_SEMANTIC_KEYS = (
    # How the model is computed, and for how many steps.
    *("engine", "packing", "device", "precision", "attention", "recompute", "compile"),
    *("liger", "deterministic", "max_steps"),
    # Logging, saving, supervision and the like.
    *("recipe", "log", "evaluate", "save", "data", "timeout_s", "join_timeout_s", "time_limit_min", "skip_non_finite"),
    *("verify", "on_spike", "spike_threshold"),
    *("preflight", "profile", "resume_allow", "overwrite", "allow_idle_gpus"),
    # Paths; the content is covered by the data fingerprint and by the sha256 of the frozen parameters.
    *("root", "name", "mixture", "stage.init_from", "model.language_model.path", "model.language_model.tokenizer"),
    "model.vision_tower.path",
)
"""Keys, with all keys below them, that may differ from the checkpoint's: nothing that is learned depends on them."""

_OPTIMIZER_KEYS = ("stage.learning_rates", "stage.weight_decay", "stage.betas", "stage.eps")
"""Keys of the optimizer's groups. DeepSpeed loads the saved values; `resume_allow` lets the run's own replace them."""

_LAYOUT_KEYS = ("sub_group_size", "round_robin_gradients", "offload_optimizer", "offload_param")
"""Keys of DeepSpeed's `zero_optimization`, besides the stage, that determine the layout of its files."""


class ResumeError(RuntimeError):
    """The loaded state differs from what was saved."""


def make_run_state(
    step: int,
    data_fingerprint: str,
    config: RunConfig,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    frozen: dict[str, str],
) -> RunState:
    """Returns the state to save after `step` steps; optimizer groups and update counts are read from the engine."""
    groups = engine.optimizer.param_groups
    counts = _update_counts(engine)
    return RunState(
        step=step,
        data_fingerprint=data_fingerprint,
        layout=get_layout(config, world),
        dtype=_dtype_name(world.dtype),
        groups=[_describe_group(group) for group in groups],
        updates=max(counts, default=0),
        frozen=frozen,
        versions=versions(),
    )


def get_layout(config: RunConfig, world: World) -> dict[str, Any]:
    """Returns what the layout of DeepSpeed's files depends on; with an equal layout they load without conversion."""
    zero = config.engine.get("zero_optimization", {})
    options = {key: zero[key] for key in _LAYOUT_KEYS if key in zero}
    return {"num_ranks": world.size, "zero_stage": zero_stage(config), **options}


def hash_frozen_parts(model: LlavaNext, world: World) -> dict[str, str]:
    """Returns the sha256 of the frozen parameters, by part. Every rank must call it before the engine is built.

    Rank 0 has the weights and hashes several parameters in parallel.
    """
    frozen = [
        from_tensor(name, weight.detach()) for name, weight in model.named_parameters() if not weight.requires_grad
    ]
    hashes = hash_tensors(frozen, num_threads=min(8, len(os.sched_getaffinity(0)))) if world.is_main else {}
    return all_gather_objects(world, hashes)[0]


def hash_tensors(frozen: Sequence[LazyTensor], *, num_threads: int = 1) -> dict[str, str]:
    """Returns the sha256 of lazily read parameters, by part; see `hash_frozen_parts`.

    Args:
        frozen: parameters by live names, in the order of the model's `named_parameters` and in its dtype.
        num_threads: tensors that are read and hashed in parallel.
    """
    parts: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=num_threads) as pool:  # hashlib releases the GIL
        for tensor, digest in zip(frozen, pool.map(_hash_tensor, frozen), strict=True):
            parts.setdefault(part_of(tensor.name), hashlib.sha256()).update(digest.encode())
    return {part: total.hexdigest() for part, total in parts.items()}


def check_frozen_parts(path: Path, state: RunState, frozen: dict[str, str]) -> None:
    """Raises ConfigError if the hashes of frozen parts (`hash_frozen_parts`) differ from those of a checkpoint."""
    parts = sorted(part for part in {*frozen, *state.frozen} if frozen.get(part) != state.frozen.get(part))
    if parts:
        raise ConfigError(
            f"{path}: the frozen parameters of {', '.join(parts)} differ from those of the run that saved it (sha256); "
            "restore stage.init_from and the model's folders, or start a new run with another name=..."
        )


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that the run resumes from. `states` is None if DeepSpeed's files load without conversion."""

    path: Path
    state: RunState
    states: ParameterStates | None

    @property
    def description(self) -> str:
        """Checkpoint, step, conversion and changed versions, for the start of the log."""
        text = f"resumed from {self.path} at step {self.state.step}"
        if self.states is not None:
            ranks, stage = self.state.layout["num_ranks"], self.state.layout["zero_stage"]
            text += f" (converted: saved by {ranks} rank(s) at ZeRO {stage})"
        saved, current = self.state.versions, versions()
        changed = [f"{key} {saved.get(key)} -> {current[key]}" for key in current if saved.get(key) != current[key]]
        return text + (f"; versions have changed: {', '.join(changed)}" if changed else "")

    def load(
        self,
        engine: deepspeed.DeepSpeedEngine,
        blank: Batch,
        frozen: dict[str, str],
        world: World,
        config: RunConfig,
    ) -> int:
        """Loads the checkpoint into the engine and verifies the result.

        Args:
            engine: of the model that was passed to `open_checkpoint`.
            blank: a row without samples, on the device.
            frozen: `hash_frozen_parts` of the model.

        Returns:
            The number of finished steps.

        Raises:
            ConfigError: frozen parameters differ from the saved run's.
            ResumeError: the engine's state differs from the checkpoint's.
        """
        check_frozen_parts(self.path, self.state, frozen)
        fresh = [_describe_group(group) for group in engine.optimizer.param_groups]
        if self.states is None:
            folder, _ = engine.load_checkpoint(str(self.path), tag=checkpoint.ENGINE, load_module_strict=False)
            if folder is None:
                raise ResumeError(f"DeepSpeed found no checkpoint in {self.path}")
        elif self.state.updates:
            _init_optimizer_states(engine, blank)
            set_states(engine, self.states, world)
            # One step tensor per parameter: AdamW would increment a shared one once per group.
            for state in engine.basic_optimizer.state.values():
                state["step"] = torch.full_like(state["step"], float(self.state.updates))
        release_gathered(engine)
        check_replicas(engine.module, world)
        self._check_groups(engine, fresh, config)
        return self.state.step

    def _check_groups(self, engine: deepspeed.DeepSpeedEngine, fresh: list[dict[str, Any]], config: RunConfig) -> None:
        live = engine.optimizer.param_groups
        if len(live) != len(fresh):
            raise ResumeError(f"{self.path}: {len(live)} optimizer groups after loading, {len(fresh)} before")
        may_differ = any(key.startswith(_OPTIMIZER_KEYS) for key in config.resume_allow)
        for group, expected in zip(live, fresh, strict=True):
            if may_differ:
                group.update(expected)
            loaded = _describe_group(group)
            if loaded != expected:
                raise ResumeError(f"{self.path}: an optimizer group is {loaded} after loading; expected {expected}")
        # A checkpoint of an earlier version has fewer values for a group; its config.yaml has been compared.
        named = [{key: group[key] for key in saved} for group, saved in zip(fresh, self.state.groups, strict=False)]
        if not may_differ and (len(fresh) != len(self.state.groups) or named != self.state.groups):
            raise ResumeError(f"{self.path}: optimizer groups {self.state.groups} were saved, this run has {fresh}")
        counts = _update_counts(engine)
        # Without an update, for example after a first step that was not applied, the optimizer may have no state yet.
        if counts != {self.state.updates} and (counts or self.state.updates):
            raise ResumeError(
                f"{self.path}: the optimizer counts {sorted(counts)} updates after loading; expected "
                f"{self.state.updates}"
            )


@contextmanager
def open_checkpoint(
    path: Path | None, model: LlavaNext, data_fingerprint: str, config: RunConfig, world: World
) -> Iterator[Resumption | None]:
    """Context manager that opens a checkpoint for loading. Every rank must enter it before the engine is built.

    If the layout differs, the checkpoint is converted and the trained weights are copied into the model here.

    Yields:
        The resumption; None if `path` is None.

    Raises:
        ConfigError: the configuration differs, with every differing key; or there is too little disk space to convert.
        SaveFormatError: a file could run code when it is unpickled.
    """
    if path is None:
        yield None
        return

    def read() -> tuple[RunState, str]:
        state = checkpoint.read_state(path)
        check_same_run(path, state, data_fingerprint, config, world)
        checkpoint.refuse_unsafe_pickles(path)
        return state, secrets.token_hex(4)

    state, token = broadcast_from_main(world, read)
    if state.layout == get_layout(config, world):
        yield Resumption(path, state, None)
        return
    names = [name for group in _group_names(model, config) for name in group]
    # The token makes the name unique: a rank may still see the folder of a killed conversion.
    scratch = path.with_name(f"{path.name}.universal_{token}")
    open_saved = open_states if state.updates else open_initial_states
    with open_saved(path / checkpoint.ENGINE, scratch, world, state.layout["zero_stage"], names) as states:
        copy_weights(model, states)
        yield Resumption(path, state, states)
        barrier(world)  # before the converted files are removed


def check_same_run(path: Path, state: RunState, data_fingerprint: str, config: RunConfig, world: World) -> None:
    """Raises ConfigError, with every difference, if a checkpoint was saved with another configuration or other data."""
    saved = read_written(checkpoint.config_path(path))
    current = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    before = _flatten(saved) | {"data_fingerprint": state.data_fingerprint, "dtype": state.dtype}
    after = _flatten(current) | {"data_fingerprint": data_fingerprint, "dtype": _dtype_name(world.dtype)}
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    semantic = [key for key in changed if not _is_below(key, NON_SEMANTIC_KEYS)]
    refused = [key for key in semantic if not _is_below(key, config.resume_allow)]
    if refused:
        if "data_fingerprint" in semantic:  # the mixture's keys show what changed the data
            semantic += [key for key in changed if _is_below(key, ("mixture",))]
        differences = "; ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in semantic)
        raise ConfigError(
            f"{path} is of a run with other settings: {differences}. Restore them, allow the change with "
            f"'resume_allow=[{','.join(refused)}]', or start a new run with another name=... (or remove {path.parent})"
        )


def _group_names(model: LlavaNext, config: RunConfig) -> Iterator[list[str]]:
    """Yields the parameter names of each optimizer group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, config.stage):
        yield [names[id(parameter)] for parameter in group["params"]]


def _init_optimizer_states(engine: deepspeed.DeepSpeedEngine, blank: Batch) -> None:
    """Makes the optimizer allocate its states, by an update with zero rates and gradients that changes no weight."""
    set_rates(engine.optimizer.param_groups, 0.0)
    total, *_ = engine(blank)
    engine.backward(total * 0)
    engine.step()


def _update_counts(engine: deepspeed.DeepSpeedEngine) -> set[int]:
    """Returns the updates that the optimizer counts for its parameters; empty before the first one."""
    # After a step that was not applied, DeepSpeed may leave empty states.
    return {int(state["step"]) for state in engine.basic_optimizer.state.values() if state}


def _describe_group(group: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of an optimizer group that are saved and compared."""
    values = {key: group[key] for key in ("name", "part", "peak_lr", "weight_decay", "eps")}
    return {**values, "betas": list(group["betas"])}  # a list, as JSON returns it


def _hash_tensor(tensor: LazyTensor) -> str:
    total = hashlib.sha256(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    total.update(tensor.value().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _is_below(key: str, keys: Iterable[str]) -> bool:
    return any(key == other or key.startswith(other + ".") for other in keys)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
