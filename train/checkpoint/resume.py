"""Going on from a checkpoint: whether it is this run's, how it is loaded, and that it has been.

The same ranks and ZeRO stage load DeepSpeed's own files and go on bit for bit. Others go by way of the parameters'
states (`universal.py`): the same samples in each step, and the same losses up to rounding. Frozen parts are not in a
checkpoint: they come from `init_from`, as at the first start, and are compared with what was saved.
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
from train.checkpoint.universal import ParameterStates, copy_weights, parameter_states, set_states
from train.config.compose import to_yaml
from train.config.schema import ConfigError, RunConfig
from train.distributed.versions import versions
from train.distributed.world import World, all_gather_objects, barrier, broadcast_from_main
from train.engine.deepspeed_engine import release_gathered, zero_stage
from train.engine.optimizer import parameter_groups, set_rates
from train.engine.replica_checksums import check_replicas

NON_SEMANTIC_KEYS = (
    # How it is computed, and how much of it.
    *("engine", "packing", "device", "precision", "attention", "linear", "elementwise", "recompute", "compile"),
    *("liger", "deterministic", "max_steps"),
    # What happens around it.
    *("recipe", "log", "evaluate", "save", "data", "timeout_s", "time_limit_min", "skip_non_finite", "preflight"),
    *("profile", "resume_allow"),
    # Where things lie; what they are is in the fingerprint and in the frozen parts' sums.
    *("root", "name", "mixture", "stage.init_from", "model.language_model.path", "model.language_model.tokenizer"),
    "model.vision_tower.path",
)
"""Keys that may differ from the checkpoint's, those below them included: nothing that is learned depends on them."""

_LAYOUT_KEYS = ("sub_group_size", "round_robin_gradients", "offload_optimizer", "offload_param")
"""Of DeepSpeed's `zero_optimization`: what its files depend on besides the stage."""


class ResumeError(RuntimeError):
    """What was loaded is not what was saved."""


def run_state(
    step: int,
    data_fingerprint: str,
    config: RunConfig,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    frozen: dict[str, str],
) -> RunState:
    """The state to save after `step` steps, the optimizer's part of it read from the live engine."""
    groups = engine.optimizer.param_groups
    counts = _update_counts(engine)
    return RunState(
        step=step,
        data_fingerprint=data_fingerprint,
        layout=layout(config, world),
        dtype=_dtype_name(world.dtype),
        groups=[_about_group(group) for group in groups],
        updates=max(counts, default=0),
        frozen=frozen,
        versions=versions(),
    )


def layout(config: RunConfig, world: World) -> dict[str, Any]:
    """What DeepSpeed's files depend on: they load as they are where this is the same."""
    zero = config.engine.get("zero_optimization", {})
    options = {key: zero[key] for key in _LAYOUT_KEYS if key in zero}
    return {"num_ranks": world.size, "zero_stage": zero_stage(config), **options}


def frozen_sums(model: LlavaNext, world: World) -> dict[str, str]:
    """sha256 of the frozen parameters of each part that has some. Every rank must call it, before there is an engine.

    Rank 0 has the weights, and sums up several parameters at a time.
    """
    frozen = [
        from_tensor(name, weight.detach()) for name, weight in model.named_parameters() if not weight.requires_grad
    ]
    return all_gather_objects(world, sums_of(frozen, at_a_time=min(8, os.cpu_count() or 1)) if world.is_main else {})[0]


def sums_of(frozen: Sequence[LazyTensor], *, at_a_time: int = 1) -> dict[str, str]:
    """`frozen_sums` of parameters that may lie anywhere.

    Args:
        frozen: by live names, in the order of the model's `named_parameters`, in its type.
        at_a_time: so many are read and summed up at once.
    """
    parts: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=at_a_time) as pool:  # hashlib lets other threads run
        for tensor, found in zip(frozen, pool.map(_tensor_sum, frozen), strict=True):
            parts.setdefault(part_of(tensor.name), hashlib.sha256()).update(found.encode())
    return {part: total.hexdigest() for part, total in parts.items()}


def check_frozen(place: Path, state: RunState, frozen: dict[str, str]) -> None:
    """Raises ConfigError, with their names, if frozen parts (`frozen_sums` of a model) are others than were saved."""
    parts = sorted(part for part in {*frozen, *state.frozen} if frozen.get(part) != state.frozen.get(part))
    if parts:
        raise ConfigError(
            f"{place}: the frozen parameters of {', '.join(parts)} are not those that it was trained with (sha256); "
            "restore stage.init_from and the model's folders, or start afresh with another name=..."
        )


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that this run goes on from. `states` is None where DeepSpeed's own files fit as they are."""

    place: Path
    state: RunState
    states: ParameterStates | None

    @property
    def description(self) -> str:
        """Where the run goes on, for the start of its log."""
        text = f"resumed from {self.place} at step {self.state.step}"
        if self.states is not None:
            ranks, stage = self.state.layout["num_ranks"], self.state.layout["zero_stage"]
            text += f" (converted: saved by {ranks} rank(s) at ZeRO {stage})"
        code, now = self.state.versions, versions()
        changed = [f"{key} {code.get(key)} -> {now[key]}" for key in now if code.get(key) != now[key]]
        return text + (f"; versions have changed: {', '.join(changed)}" if changed else "")

    def load(
        self,
        engine: deepspeed.DeepSpeedEngine,
        blank: Batch,
        frozen: dict[str, str],
        world: World,
        config: RunConfig,
    ) -> int:
        """Puts the engine where the checkpoint was, and makes sure of it; returns the steps that are done.

        Args:
            engine: over the model that `opened` has seen.
            blank: a row without a sample, on the device.
            frozen: `frozen_sums` of the model.

        Raises:
            ConfigError: frozen parts are others than they were.
            ResumeError: the engine is not where the checkpoint was.
        """
        check_frozen(self.place, self.state, frozen)
        fresh = [_about_group(group) for group in engine.optimizer.param_groups]
        if self.states is None:
            folder, _ = engine.load_checkpoint(str(self.place), tag=checkpoint.ENGINE, load_module_strict=False)
            if folder is None:
                raise ResumeError(f"DeepSpeed found nothing to load in {self.place}")
        else:
            _make_states(engine, blank)
            set_states(engine, self.states, world)
            for state in engine.basic_optimizer.state.values():  # one counter each: a shared one would run ahead
                state["step"] = torch.full_like(state["step"], float(self.state.updates))
        release_gathered(engine)
        check_replicas(engine.module, world)
        self._check_groups(engine, fresh, config)
        return self.state.step

    def _check_groups(self, engine: deepspeed.DeepSpeedEngine, fresh: list[dict[str, Any]], config: RunConfig) -> None:
        live = engine.optimizer.param_groups
        if len(live) != len(fresh):
            raise ResumeError(f"{self.place}: {len(live)} optimizer groups after loading, {len(fresh)} before")
        allowed = any(key.startswith(("stage.learning_rates", "stage.weight_decay")) for key in config.resume_allow)
        for group, expected in zip(live, fresh, strict=True):
            if allowed:
                group.update(expected)
            found = _about_group(group)
            if found != expected:
                raise ResumeError(f"{self.place}: an optimizer group is {found} after loading, it should be {expected}")
        if not allowed and fresh != self.state.groups:
            raise ResumeError(f"{self.place}: optimizer groups {self.state.groups} were saved, this run has {fresh}")
        counts = _update_counts(engine)
        if counts != {self.state.updates}:
            raise ResumeError(
                f"{self.place}: the optimizer has counted {sorted(counts)} updates after loading, {self.state.updates} "
                "were saved"
            )


@contextmanager
def opened(
    place: Path | None, model: LlavaNext, data_fingerprint: str, config: RunConfig, world: World
) -> Iterator[Resumption | None]:
    """The checkpoint to go on from, for as long as it is being loaded; None where there is none.

    Every rank must enter it, with the model before it has an engine: where the layout is another one, the model gets
    the trained weights here.

    Raises:
        ConfigError: the checkpoint is another run's, with the difference key by key; or too little room to convert it.
    """
    if place is None:
        yield None
        return

    def read() -> tuple[RunState, str]:
        state = checkpoint.read_state(place)
        refuse_another_run(place, state, data_fingerprint, config, world)
        checkpoint.refuse_unsafe_pickles(place)
        return state, secrets.token_hex(4)

    state, token = broadcast_from_main(world, read)
    if state.layout == layout(config, world):
        yield Resumption(place, state, None)
        return
    names = [name for group in _named_groups(model, config) for name in group]
    scratch = place.with_name(f"{place.name}.universal_{token}")  # a killed conversion's may still be seen by a rank
    with parameter_states(place / checkpoint.ENGINE, scratch, world, state.layout["zero_stage"], names) as states:
        copy_weights(model, states)
        yield Resumption(place, state, states)
        barrier(world)  # before the converted files are removed


def refuse_another_run(place: Path, state: RunState, data_fingerprint: str, config: RunConfig, world: World) -> None:
    """Raises ConfigError, with every difference, if the checkpoint is not this run's."""
    saved = OmegaConf.to_container(OmegaConf.load(checkpoint.config_path(place)))
    now = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    before = _flat(saved) | {"data_fingerprint": state.data_fingerprint, "dtype": state.dtype}
    after = _flat(now) | {"data_fingerprint": data_fingerprint, "dtype": _dtype_name(world.dtype)}
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    told = [key for key in changed if not _is_below(key, NON_SEMANTIC_KEYS)]
    refused = [key for key in told if not _is_below(key, config.resume_allow)]
    if refused:
        if "data_fingerprint" in told:  # what of the mixture makes it another one
            told += [key for key in changed if _is_below(key, ("mixture",))]
        differences = "; ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in told)
        raise ConfigError(
            f"{place} is of a run with other settings: {differences}. Restore them, allow it with "
            f"'resume_allow=[{','.join(refused)}]', or start afresh with another name=... (or without {place.parent})"
        )


def _named_groups(model: LlavaNext, config: RunConfig) -> Iterator[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, config.stage):
        yield [names[id(parameter)] for parameter in group["params"]]


def _make_states(engine: deepspeed.DeepSpeedEngine, blank: Batch) -> None:
    """Lets the optimizer make its states: an update with rates and gradients of zero, which changes nothing."""
    set_rates(engine.optimizer.param_groups, 0.0)
    total, *_ = engine(blank)
    engine.backward(total * 0)
    engine.step()


def _update_counts(engine: deepspeed.DeepSpeedEngine) -> set[int]:
    return {int(state["step"]) for state in engine.basic_optimizer.state.values()}


def _about_group(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("name", "part", "peak_lr", "weight_decay")}


def _tensor_sum(tensor: LazyTensor) -> str:
    total = hashlib.sha256(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    total.update(tensor.value().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _is_below(key: str, keys: Iterable[str]) -> bool:
    return any(key == other or key.startswith(other + ".") for other in keys)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
