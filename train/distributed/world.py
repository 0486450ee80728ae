"""Rank, device and process group of this process, and the one small collective of a step.

The environment variables of torchrun, the deepspeed launcher or Slurm's srun are read; without them there is one rank.
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from train.config.schema import RunConfig
from train.distributed.allocation import check_idle_gpus, count_gpus_on_node
from train.distributed.host_limits import raise_open_files_limit
from train.distributed.launch import Launch, check_port, meeting_point
from train.distributed.quiet_libraries import muted_stdout

_Value = TypeVar("_Value")
_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""torch's name since 2.9, and the older one, which it reads too."""


@dataclass(frozen=True)
class World:
    """This process in the process group.

    `dtype` is that of the weights. `host_group` is a gloo group for small host-side messages, on a CPU the default one.
    `ranks_per_node` is 0 if the launcher does not say it.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    host_group: dist.ProcessGroup | None
    ranks_per_node: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(config: RunConfig, launch: Launch) -> World:
    """Joins the process group, with a finite timeout, and chooses device and precision.

    Raises:
        ConfigError: GPUs of the Slurm job would be idle (`check_idle_gpus`).
        RuntimeError: the ranks did not meet, or a rank has no device (`choose_device`).
    """
    if config.deterministic:
        # cuBLAS reads its workspace size at its first use; torch documents two sizes that are deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    raise_open_files_limit()
    use_expandable_segments(os.environ)
    device = choose_device(config, launch)
    check_idle_gpus(launch.size, device.type, allowed=config.allow_idle_gpus)
    set_environment(launch, device)
    timeout = timedelta(seconds=config.timeout_s)
    # At its timeout NCCL aborts the process and names no rank: `watchdog.py` has to report first.
    nccl_timeout = timeout + timedelta(seconds=60)
    if not dist.is_initialized():
        check_port(launch, os.environ)
        _join(device, launch, min(config.timeout_s, config.join_timeout_s))
        if device.type == "cuda":
            # NCCL connects in the first collective, which no timeout of the line above covers. The watchdog limits it.
            dist.all_reduce(torch.zeros(1, device=device))
            torch.cuda.synchronize(device)
        # Between steps ranks may wait longer for each other than at the start.
        distributed_c10d._get_default_store().set_timeout(timeout)
        distributed_c10d._set_pg_timeout(nccl_timeout if device.type == "cuda" else timeout)
    # DeepSpeed creates groups without a timeout, which get torch's default of half an hour.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = nccl_timeout  # type: ignore[attr-defined]
    host_group = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    dtype = choose_dtype(config, device)
    return World(launch.rank, launch.local_rank, launch.size, device, dtype, host_group, launch.ranks_per_node)


def use_expandable_segments(env: MutableMapping[str, str]) -> None:
    """Lets torch's CUDA allocator extend its segments, so that rows of different lengths do not fragment its memory.

    torch reads the variable at its first allocation on a GPU. A value that the user has set is kept.
    """
    if not _ALLOCATOR_VARIABLES & env.keys():
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def set_environment(launch: Launch, device: torch.device) -> None:
    """Sets the variables that torch and DeepSpeed read at the start.

    LOCAL_RANK is the index of the device among those that this process sees, since DeepSpeed takes it for that: a task
    with one visible GPU has the local rank 3 for its launcher, and `cuda:0`.

    Raises:
        ConfigError: the ranks have no address where they meet, or its port is in use.
    """
    address, port = meeting_point(launch, os.environ)
    local_rank = launch.local_rank if device.index is None else device.index
    os.environ |= {
        "RANK": str(launch.rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(launch.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def choose_device(config: RunConfig, launch: Launch) -> torch.device:
    """The device of this process: the configuration's, or a GPU if there is one.

    Raises:
        RuntimeError: Slurm allocated GPUs that torch does not see, or fewer than there are ranks on this host.
    """
    device_type = config.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        if device_type == "cpu" and count_gpus_on_node():
            raise RuntimeError(
                f"Slurm allocated GPUs on {socket.gethostname()}, and torch sees none there: check `nvidia-smi` and "
                "torch's build on that node, exclude it (--exclude), or start with device=cpu"
            )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", _gpu_index(launch.local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The data type of the weights: the configuration's precision, or bf16 on a GPU and fp32 on a CPU."""
    if config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def _join(device: torch.device, launch: Launch, timeout_s: float) -> None:
    """Creates the default process group. Raises RuntimeError, with address and port, if other ranks do not join."""
    import deepspeed

    try:
        with muted_stdout():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
                verbose=False,
            )
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(
            f"{launch.size} ranks did not meet at {address} within {timeout_s:.0f} s ({launch}, "
            f"{socket.gethostname()}): start that many ranks, and check that every node reaches this address "
            f"(MASTER_ADDR; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network) ({error})"
        ) from error


def destroy() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class StepState:
    """What all ranks know after a step.

    Attributes:
        sums: losses and counts, summed over ranks.
        stop: whether a rank was asked to stop.
        sealed: whether every rank's files of a checkpoint are on the disk.
        slowest_s: the largest time of a rank in forward and backward passes, in seconds.
        local_s: the time of each rank that does not depend on the others, in seconds.
    """

    sums: torch.Tensor
    stop: bool
    sealed: bool
    slowest_s: float
    local_s: tuple[float, ...] = ()


def all_reduce_step_state(
    world: World, sums: torch.Tensor, *, stop: bool, sealed: bool, seconds: float, local_s: float = 0.0
) -> StepState:
    """The one collective of a step besides the engine's: sums, stop requests and times in one message.

    Args:
        sums: float64 [n] on the host, summed over ranks.
        stop: whether this rank was asked to stop; true on all ranks if it is true on one.
        sealed: whether this rank's files of a checkpoint are on the disk; true if it is true on all ranks.
        seconds: this rank's time in the step's forward and backward passes; the largest is returned.
        local_s: this rank's time that does not depend on the other ranks, in seconds.
    """
    slots = torch.zeros(2, world.size, dtype=torch.float64)
    slots[0, world.rank], slots[1, world.rank] = seconds, local_s
    flags = torch.tensor([float(stop), float(sealed)], dtype=torch.float64)
    message = torch.cat([sums.to(torch.float64), flags, slots.flatten()])
    if world.size > 1:
        dist.all_reduce(message, group=world.host_group)
    num = len(sums)
    num_stop, num_sealed = message[num : num + 2].tolist()
    all_s, all_local_s = message[num + 2 :].view(2, world.size).tolist()
    return StepState(message[:num], num_stop > 0, num_sealed == world.size, max(all_s), tuple(all_local_s))


def all_gather_objects(world: World, value: _Value) -> list[_Value]:
    """The values of all ranks, in the order of ranks. For small values that are exchanged seldom."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def broadcast_from_main(world: World, action: Callable[[], _Value]) -> _Value:
    """Runs `action` on rank 0; every rank returns its result, or raises its exception.

    For reading a shared folder: a network file system may show each rank another state of it.
    """
    value: Any = None
    error: Exception | None = None
    if world.is_main:
        try:
            value = action()
        except Exception as raised:
            error = raised
    message: list[Any] = [(value, error)]
    if world.size > 1:
        dist.broadcast_object_list(message, src=0, group=world.host_group)
    value, error = message[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory is exhausted; torch's CPU allocator has no exception type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def barrier(world: World) -> None:
    """Waits for every rank."""
    if world.size > 1:
        dist.barrier(group=world.host_group)


def wait_for(
    is_there: Callable[[], bool], heartbeat: Callable[[], object], *, what: str, patience_s: float = 120.0
) -> None:
    """Waits while another process creates a file, as long as that process's heartbeat changes.

    Only this process's monotonic clock is read, so clocks of two hosts may differ.

    Args:
        is_there: returns whether the file exists.
        heartbeat: returns a value that changes while the other process is alive (see `heartbeat_mtime`).
        what: the name of the file in the error.

    Raises:
        TimeoutError: the heartbeat has not changed for `patience_s`.
    """
    last, changed_s = heartbeat(), time.monotonic()
    while not is_there():
        beat, now_s = heartbeat(), time.monotonic()
        if beat != last:
            last, changed_s = beat, now_s
        if now_s - changed_s > patience_s:
            raise TimeoutError(f"{what}: the process that creates it gave no sign of life for {patience_s:.0f} s")
        time.sleep(0.2)


def heartbeat_mtime(path: Path) -> int | None:
    """The modification time of `path` in ns, by its file system's clock; None if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _gpu_index(local_rank: int, num_gpus: int) -> int:
    """The index of this process's GPU: the local rank, or 0 if it sees only one (Slurm can bind GPUs to tasks)."""
    if num_gpus == 1:  # the pre-flight detects two ranks on one GPU
        return 0
    if local_rank >= num_gpus:
        raise RuntimeError(  # this rank alone raises, so every rank prints such an error
            f"{socket.gethostname()} shows {num_gpus} GPUs to local rank {local_rank}, and each rank needs its own; "
            "start as many ranks per node as it has GPUs"
        )
    return local_rank
