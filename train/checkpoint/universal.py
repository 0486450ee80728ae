"""The optimizer's state parameter by parameter, from a checkpoint of any number of ranks and any ZeRO stage.

DeepSpeed's own converter (`ds_to_universal`) makes the files of its universal format; what it has no way for, ZeRO 0,
is read as it is. Its loader is not used: at ZeRO-3 it gives every group the first group's rate, and all groups one
counter of steps. Instead each rank sets its share through DeepSpeed's public functions for it.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
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
from torch import nn

from train.config.schema import ConfigError
from train.distributed.world import World, heartbeat_mtime, wait_for

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
_GIB = 2**30
_BEAT_S = 2.0


class ParameterStates:
    """`fp32`, `exp_avg` and `exp_avg_sq` of each trained parameter. Files are mapped, not read whole.

    Args:
        folder: of the universal format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "zero"

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """One state of a parameter, flat, float32.

        Raises:
            FileNotFoundError: the checkpoint has no such parameter.
        """
        found = torch.load(self._folder / name / f"{key}.pt", map_location="cpu", mmap=True, weights_only=True)
        tensor = found["param"] if isinstance(found, dict) else found
        assert isinstance(tensor, torch.Tensor)
        return tensor.flatten()


class WholeStates(ParameterStates):
    """The same from the one file of a ZeRO-0 checkpoint.

    Args:
        file: DeepSpeed's, with torch's own AdamW state in it.
        names: the trained parameters in the order of the optimizer's groups.
    """

    def __init__(self, file: Path, names: list[str]) -> None:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        self._weights, self._states = found["module"], found["optimizer"]["state"]
        self._numbers = {name: number for number, name in enumerate(names)}

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """See `ParameterStates`."""
        found = self._weights[name] if key == FP32 else self._states[self._numbers[name]][key]
        assert isinstance(found, torch.Tensor)
        return found.flatten()


@contextmanager
def parameter_states(
    engine_folder: Path, scratch: Path, world: World, zero_stage: int, names: list[str]
) -> Iterator[ParameterStates]:
    """The states of a checkpoint, for as long as the block lasts. Every rank must enter it.

    Args:
        engine_folder: DeepSpeed's files.
        scratch: the folder to convert into; it is removed at the end.
        zero_stage: that they were written at.
        names: the trained parameters in the order of the optimizer's groups.

    Raises:
        ConfigError: the disk has too little room to convert.
        RuntimeError: DeepSpeed's converter failed.
    """
    if zero_stage == 0:
        yield WholeStates(engine_folder / "mp_rank_00_model_states.pt", names)
        return
    done, alive = scratch / "converted", scratch.with_suffix(".alive")
    try:
        if world.is_main:
            _convert(engine_folder, scratch, alive)
            done.touch()
        else:
            wait_for(done.exists, lambda: heartbeat_mtime(alive), what=f"conversion of {engine_folder.parent}")
        yield ParameterStates(scratch)
    finally:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            alive.unlink(missing_ok=True)


def conversion_bytes(engine_folder: Path) -> int:
    """What a conversion needs on the disk: the states once in pieces and once joined, and a copy of the rest."""
    sizes = {path.name: path.stat().st_size for path in engine_folder.iterdir() if path.is_file()}
    return sum(size * (2 if name.endswith("optim_states.pt") else 1) for name, size in sizes.items())


def _convert(engine_folder: Path, scratch: Path, alive: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    needed, free = conversion_bytes(engine_folder), shutil.disk_usage(engine_folder).free
    if needed > free:
        raise ConfigError(
            f"{engine_folder.parent} was saved by another number of ranks or at another ZeRO stage, and converting it "
            f"takes {needed / _GIB:.2f} GiB in {scratch.parent}, where {free / _GIB:.2f} GiB are free; make room, or "
            "start as many ranks with the same engine"
        )
    print(
        f"{engine_folder.parent}: saved by another number of ranks or at another ZeRO stage; converting it in "
        f"{scratch} ({needed / _GIB:.2f} GiB, {free / _GIB:.1f} GiB are free), which is removed afterwards",
        file=sys.stderr,
        flush=True,
    )
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(engine_folder), "--output_folder", str(scratch), "--inject_missing_state"]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(alive, over), daemon=True)
    beating.start()
    try:
        told = subprocess.run(command, capture_output=True, text=True, env=_alone(), check=False)
    finally:
        over.set()
        beating.join()
        # DeepSpeed notes there which folder it has made last.
        (scratch.parent / "latest_universal").unlink(missing_ok=True)
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"DeepSpeed could not convert {engine_folder} to its universal format: {last}")


def _beat(alive: Path, over: threading.Event) -> None:
    while True:
        alive.touch()
        if over.wait(_BEAT_S):
            return


def _alone() -> dict[str, str]:
    """The environment without the launcher's words: the converter is one process of its own."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("TORCHELASTIC")
    }


@torch.no_grad()
def copy_weights(model: nn.Module, states: ParameterStates) -> None:
    """Writes the trained weights into a model that no engine has yet, so that an engine makes its copies of them. Ranks
    whose parameters have no memory yet get them from rank 0, as they get all others."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.copy_(states.tensor(name, FP32).view_as(parameter))


def set_states(engine: deepspeed.DeepSpeedEngine, states: ParameterStates, world: World) -> None:
    """Writes this rank's share of every state into an engine whose optimizer has been applied once."""
    _link_states(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in (FP32, *MOMENTS):
                _set(engine, parameter, key, states.tensor(name, key), world)


def _link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """At ZeRO 1 and 2 DeepSpeed links parameters to their states after the first group's update, and to no others."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, engine.basic_optimizer.state)


def _set(
    engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, key: str, value: torch.Tensor, world: World
) -> None:
    if hasattr(parameter, "ds_id"):  # ZeRO-3: by hand, since the functions for whole tensors forget the padding
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
    elif key != FP32:  # without ZeRO the weights are the optimizer's own, and are there already
        state = engine.basic_optimizer.state[parameter][key]
        state.copy_(value.view_as(state))
