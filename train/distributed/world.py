"""Who this process is: rank, device, process group, and the one small collective of a step.

Reads what torchrun, the deepspeed launcher, Slurm's srun or nobody set in the environment. Nothing here knows the
model or the data.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from train.config.schema import RunConfig
from train.distributed.malloc import keep_freed_memory
from train.distributed.quiet_libraries import muted_stdout

JOIN_TIMEOUT_S = 300
"""How long ranks wait for each other at the start; after that `timeout_s` is the limit."""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Launch:
    """What the launcher says, before any process group exists."""

    rank: int
    local_rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class World:
    """This process among the others.

    `host_group` is a gloo group for small host-side messages, the default group on CPU.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    host_group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch() -> Launch:
    """Rank and size from the environment: torchrun's and deepspeed's names first, then Slurm's, else one process.

    A batch script and a shell of `salloc` have Slurm's variables too; only a task of `srun` has a step's.
    """
    env = os.environ
    if "RANK" in env:
        return Launch(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1)))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        return Launch(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), size)
    return Launch(0, 0, 1)


def start(config: RunConfig, launch: Launch) -> World:
    """Joins the process group, with a finite timeout, and chooses device and precision."""
    if config.deterministic:
        # cuBLAS reads its workspace's size at its first use; torch names the two sizes that are deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = choose_device(config, launch)
    if device.type == "cpu":
        keep_freed_memory()
    set_environment(launch)
    timeout = timedelta(seconds=config.timeout_s)
    # NCCL aborts the process when it times out, with nobody's name: `watchdog.py` is to speak first.
    nccl_timeout = timeout + timedelta(seconds=60)
    if not dist.is_initialized():
        _join(device, launch, min(config.timeout_s, JOIN_TIMEOUT_S))
        # Between steps ranks may wait longer for each other than for the first meeting.
        distributed_c10d._get_default_store().set_timeout(timeout)
        distributed_c10d._set_pg_timeout(nccl_timeout if device.type == "cuda" else timeout)
    # DeepSpeed makes groups of its own and passes them no timeout: they take torch's default, half an hour.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = nccl_timeout  # type: ignore[attr-defined]
    host_group = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    dtype = choose_dtype(config, device)
    return World(launch.rank, launch.local_rank, launch.size, device, dtype, host_group)


def set_environment(launch: Launch) -> None:
    """Sets the variables that torch and DeepSpeed read at a start, where the launcher has not."""
    env = os.environ
    env.setdefault("RANK", str(launch.rank))
    env.setdefault("LOCAL_RANK", str(launch.local_rank))
    env.setdefault("WORLD_SIZE", str(launch.size))
    env.setdefault("MASTER_ADDR", slurm_head(env) or "127.0.0.1")
    env.setdefault("MASTER_PORT", str(slurm_port(env) if launch.size > 1 else free_port()))


def choose_device(config: RunConfig, launch: Launch) -> torch.device:
    """The device of this process: the configuration's, or the GPU where there is one.

    Raises:
        RuntimeError: Slurm gave GPUs that torch does not see, or fewer than there are ranks on this host.
    """
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cpu" and int(os.environ.get("SLURM_GPUS_ON_NODE", 0)):
            raise RuntimeError(
                f"Slurm gave this job GPUs on {socket.gethostname()}, and torch sees none there: look at `nvidia-smi` "
                "and at torch's build on that node, leave it out (--exclude), or start with device=cpu"
            )
    if wanted == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", _gpu_number(launch.local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What the weights are in: the configuration's precision, or bf16 on a GPU and fp32 on a CPU."""
    if config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def _join(device: torch.device, launch: Launch, patience_s: float) -> None:
    """Meets the other ranks. Raises RuntimeError, with the meeting place, when they do not come."""
    import deepspeed

    try:
        with muted_stdout():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=patience_s),
                verbose=False,
            )
    except (dist.DistError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(
            f"{launch.size} ranks did not meet at {place} within {patience_s:.0f} s: start as many, and let every node "
            f"reach that address (MASTER_ADDR; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network) ({error})"
        ) from error


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class StepState:
    """What all ranks know after a step: losses and counts summed over ranks, and whether anybody wants to stop."""

    sums: torch.Tensor
    stop: bool
    sealed: bool
    slowest_s: float


def all_reduce_step_state(world: World, sums: torch.Tensor, *, stop: bool, sealed: bool, seconds: float) -> StepState:
    """The one collective of a step besides the engine's: sums, stop requests and times in one message.

    Args:
        sums: float64 [n] on the host, added up over ranks.
        stop: this rank was asked to stop; one that was is enough.
        sealed: this rank's files of a checkpoint are on the disk; true if they are on every rank.
        seconds: this rank's time in the step's forward and backward passes; the largest is returned.
    """
    slots = torch.zeros(world.size, dtype=torch.float64)
    slots[world.rank] = seconds
    flags = torch.tensor([float(stop), float(sealed)], dtype=torch.float64)
    message = torch.cat([sums.to(torch.float64), flags, slots])
    if world.size > 1:
        dist.all_reduce(message, group=world.host_group)
    num = len(sums)
    num_stop, num_sealed = message[num : num + 2].tolist()
    return StepState(message[:num], num_stop > 0, num_sealed == world.size, float(message[num + 2 :].max()))


def all_gather_objects(world: World, value: _Value) -> list[_Value]:
    """What every rank has brought, in the order of ranks. For small values, at the start or the end of something."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def broadcast_from_main(world: World, action: Callable[[], _Value]) -> _Value:
    """What `action` returns on rank 0, on every rank; what it raises there, all raise.

    For what ranks would otherwise read from a shared folder one by one: a network file system may show each of them
    another state of it.
    """
    value: Any = None
    error: Exception | None = None
    if world.is_main:
        try:
            value = action()
        except Exception as raised:
            error = raised
    told: list[Any] = [(value, error)]
    if world.size > 1:
        dist.broadcast_object_list(told, src=0, group=world.host_group)
    value, error = told[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says so: its CPU allocator has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def barrier(world: World) -> None:
    """Waits for every rank."""
    if world.size > 1:
        dist.barrier(group=world.host_group)


def wait_for(
    is_there: Callable[[], bool], heartbeat: Callable[[], object], *, what: str, patience_s: float = 120.0
) -> None:
    """Waits while another process makes a file, as long as that process shows signs of life.

    Args: is_there: tells whether the file is there. heartbeat: what changes with each sign of life (see
        `heartbeat_mtime`). No clock is asked but this process's own, which never jumps. what: for the error.

    Raises:
        TimeoutError: no sign of life for `patience_s`.
    """
    last, heard_s = heartbeat(), time.monotonic()
    while not is_there():
        beat, now_s = heartbeat(), time.monotonic()
        if beat != last:
            last, heard_s = beat, now_s
        if now_s - heard_s > patience_s:
            raise TimeoutError(f"{what}: the process that makes it gave no sign of life for {patience_s:.0f} s")
        time.sleep(0.2)


def heartbeat_mtime(path: Path) -> int | None:
    """When `path` was last touched, on its file system's clock; None where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _gpu_number(local_rank: int, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own: the local rank's, or the only one (Slurm can bind tasks)."""
    if num_gpus == 1:  # should two ranks mean the same one, the pre-flight tells
        return 0
    if local_rank >= num_gpus:
        raise RuntimeError(  # on this rank alone: it must be heard
            f"{socket.gethostname()} shows {num_gpus} GPUs to local rank {local_rank}, and each rank wants one of its "
            "own; start as many ranks a node as it has GPUs"
        )
    return local_rank


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def slurm_head(env: Mapping[str, str]) -> str | None:
    """The host of rank 0 of a Slurm step, for all its tasks; None outside of one.

    It is the first of the step's nodes. Where their names resolve to nothing (containers, networks without DNS) it is
    the address that srun was started at, which is that node's when a batch script has started it.
    """
    nodes = env.get("SLURM_STEP_NODELIST")
    if not nodes:
        return None
    head = first_host(nodes)
    try:
        socket.getaddrinfo(head, None)
    except OSError:
        return env.get("SLURM_LAUNCH_NODE_IPADDR", head)
    return head


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[007-009,12],x1` begins with gpu007 (containers have no scontrol)."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def slurm_port(env: Mapping[str, str]) -> int:
    """A port that two jobs on one node, or two steps of a job, do not share; below those that Linux gives away.

    Every task of an array has a job id of its own.
    """
    return 15000 + (int(env.get("SLURM_JOB_ID", 0)) + 1009 * int(env.get("SLURM_STEP_ID", 0))) % 15000
