"""Reads the optimizer state per parameter from a checkpoint of any ZeRO stage and number of ranks, and sets it.

DeepSpeed's converter (`ds_to_universal`) writes its universal format; it does not support ZeRO 0, which is read
directly. DeepSpeed's loader is not used: at ZeRO-3 it gives every group the first group's rate, and all groups one step
counter. Instead, each rank sets its share through DeepSpeed's public functions.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from train.config.schema import ConfigError
from train.distributed.quiet_libraries import muted_stdout
from train.distributed.world import World, heartbeat_mtime, wait_for

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
_GIB = 2**30
_HEARTBEAT_S = 2.0


class ParameterStates:
    """The states `fp32`, `exp_avg` and `exp_avg_sq` of the trained parameters. The files are memory-mapped.

    Args:
        folder: folder in DeepSpeed's universal format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "zero"

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """Returns one state of a parameter: float32 [numel].

        Args:
            name: live name of the parameter.
            key: `fp32`, `exp_avg` or `exp_avg_sq`.

        Raises:
            FileNotFoundError: the checkpoint has no such parameter.
        """
        content = torch.load(self._folder / name / f"{key}.pt", map_location="cpu", mmap=True, weights_only=True)
        tensor = content["param"] if isinstance(content, dict) else content
        assert isinstance(tensor, torch.Tensor)
        return tensor.flatten()


class UnpartitionedStates(ParameterStates):
    """The same states, from the single file of a ZeRO-0 checkpoint.

    Args:
        file: DeepSpeed's file, which contains the state of torch's AdamW.
        names: the trained parameters in the order of the optimizer's groups.
    """

    def __init__(self, file: Path, names: list[str]) -> None:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        self._weights, self._states = content["module"], content["optimizer"]["state"]
        self._numbers = {name: number for number, name in enumerate(names)}

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """See `ParameterStates.tensor`."""
        state = self._weights[name] if key == FP32 else self._states[self._numbers[name]][key]
        assert isinstance(state, torch.Tensor)
        return state.flatten()


class InitialStates(ParameterStates):
    """The weights of a checkpoint whose optimizer has made no update, and so has no moments.

    Args:
        weights: float32 weights by live name.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """See `ParameterStates.tensor`; only the key `fp32`."""
        assert key == FP32
        return self._weights[name].flatten()


@contextmanager
def open_initial_states(
    engine_folder: Path, scratch: Path, world: World, zero_stage: int, names: list[str]
) -> Iterator[ParameterStates]:
    """Context manager that opens the weights of a checkpoint without an update. DeepSpeed cannot convert such a one.

    Rank 0 alone has them, as `copy_weights` needs. Arguments are those of `open_states`; nothing is written.
    """
    weights: Mapping[str, torch.Tensor] = {}
    if zero_stage == 0:
        yield UnpartitionedStates(engine_folder / "mp_rank_00_model_states.pt", names)
        return
    if world.is_main:
        with muted_stdout():
            weights = get_fp32_state_dict_from_zero_checkpoint(str(engine_folder.parent), tag=engine_folder.name)
    yield InitialStates(weights)


@contextmanager
def open_states(
    engine_folder: Path, scratch: Path, world: World, zero_stage: int, names: list[str]
) -> Iterator[ParameterStates]:
    """Context manager that converts a checkpoint if necessary and opens its states. Every rank must enter it.

    Args:
        engine_folder: folder of DeepSpeed's files.
        scratch: folder for the converted files; removed on exit.
        zero_stage: the ZeRO stage of the files.
        names: the trained parameters in the order of the optimizer's groups.

    Raises:
        ConfigError: the disk has too little space for the conversion.
        RuntimeError: DeepSpeed's converter failed.
    """
    if zero_stage == 0:
        yield UnpartitionedStates(engine_folder / "mp_rank_00_model_states.pt", names)
        return
    done, heartbeat = scratch / "converted", scratch.with_suffix(".alive")
    try:
        if world.is_main:
            _convert(engine_folder, scratch, heartbeat)
            done.touch()
        else:
            wait_for(done.exists, lambda: heartbeat_mtime(heartbeat), what=f"conversion of {engine_folder.parent}")
        yield ParameterStates(scratch)
    finally:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            heartbeat.unlink(missing_ok=True)


def conversion_bytes(engine_folder: Path) -> int:
    """Returns the bytes that a conversion needs on disk: the states in slices and merged, and a copy of the rest."""
    sizes = {path.name: path.stat().st_size for path in engine_folder.iterdir() if path.is_file()}
    return sum(size * (2 if name.endswith("optim_states.pt") else 1) for name, size in sizes.items())


def _convert(engine_folder: Path, scratch: Path, heartbeat: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    needed, free = conversion_bytes(engine_folder), shutil.disk_usage(engine_folder).free
    if needed > free:
        raise ConfigError(
            f"{engine_folder.parent} was saved with another number of ranks or ZeRO stage, and converting it takes "
            f"{needed / _GIB:.2f} GiB in {scratch.parent}, where {free / _GIB:.2f} GiB are free; free some space, or "
            "resume with the same number of ranks and engine"
        )
    print(
        f"{engine_folder.parent} was saved with another number of ranks or ZeRO stage; converting it in {scratch} "
        f"({needed / _GIB:.2f} GiB, {free / _GIB:.1f} GiB are free), which is removed afterwards",
        file=sys.stderr,
        flush=True,
    )
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(engine_folder), "--output_folder", str(scratch), "--inject_missing_state"]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    stopped = threading.Event()
    heartbeat_thread = threading.Thread(target=_touch_until_stopped, args=(heartbeat, stopped), daemon=True)
    heartbeat_thread.start()
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env=_make_single_process_environment(), check=False
        )
    finally:
        stopped.set()
        heartbeat_thread.join()
        # DeepSpeed writes the name of the last converted folder to this file.
        (scratch.parent / "latest_universal").unlink(missing_ok=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"DeepSpeed could not convert {engine_folder} to its universal format: {last}")


def _touch_until_stopped(heartbeat: Path, stopped: threading.Event) -> None:
    while True:
        heartbeat.touch()
        if stopped.wait(_HEARTBEAT_S):
            return


def _make_single_process_environment() -> dict[str, str]:
    """Returns the environment without the launcher's variables, since the converter runs as a single process."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("TORCHELASTIC")
    }


@torch.no_grad()
def copy_weights(model: nn.Module, states: ParameterStates) -> None:
    """Copies the trained weights into a model before the engine is built, which then copies or partitions them.

    Parameters on the meta device are skipped: those ranks receive all weights from rank 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.copy_(states.tensor(name, FP32).view_as(parameter))


def set_states(engine: deepspeed.DeepSpeedEngine, states: ParameterStates, world: World) -> None:
    """Sets this rank's share of every state in an engine whose optimizer has been applied at least once."""
    _link_states(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in (FP32, *MOMENTS):
                _set_state(engine, parameter, key, states.tensor(name, key), world)


def _link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Links parameters to their states at ZeRO 1 and 2, where DeepSpeed does so for the first group only."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, engine.basic_optimizer.state)


def _set_state(
    engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, key: str, value: torch.Tensor, world: World
) -> None:
    if hasattr(parameter, "ds_id"):
        # ZeRO-3: set per partition, since the functions for full tensors ignore the padding.
        partition = getattr(parameter, "ds_tensor", None)
        assert isinstance(partition, torch.Tensor)
        size = partition.numel()
        share = value.new_zeros(size)
        piece = value[world.rank * size : (world.rank + 1) * size]
        share[: len(piece)] = piece
        share = share.to(world.device)
        if key == FP32:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)
    elif hasattr(parameter, "_hp_mapping"):
        if key == FP32:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    elif key != FP32:  # without ZeRO the optimizer uses the model's weights, which are set already
        state = engine.basic_optimizer.state[parameter][key]
        state.copy_(value.view_as(state))
