"""Which process this is among those that a launcher started, read from its environment variables.

torchrun and the deepspeed launcher set RANK and WORLD_SIZE; Open MPI, MPICH and Intel MPI, and Slurm's srun have
variables of their own. Variables that contradict each other are refused: they are left over from another shell or job.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from train.config.schema import ConfigError

_MPI = (  # rank, size, local rank, local size: Open MPI; MPICH and Intel MPI; Cray's PALS
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
_FIRST_PORT, _NUM_PORTS = 15000, 15000  # below the ports that Linux gives to clients


@dataclass(frozen=True)
class Launch:
    """The position of this process, before any process group exists.

    Attributes:
        rank, local_rank, size: of this process.
        variables: environment variables it was read from, as NAME=value, for messages.
        launcher_pid: process id of the launcher that started this rank; None without a launcher. It is read early,
            because the parent of a process whose launcher has ended is another process.
        ranks_per_node: ranks on this host; 0 if the launcher does not say it.
    """

    rank: int
    local_rank: int
    size: int
    variables: tuple[str, ...] = field(default=(), compare=False)
    launcher_pid: int | None = field(default=None, compare=False)
    ranks_per_node: int = field(default=0, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} by {' '.join(self.variables) or 'no launcher'}"


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Reads rank and size from the environment: torchrun's and deepspeed's names, then MPI's, then those of srun.

    A batch script and a shell of `salloc` have Slurm's variables too; only a task of `srun` has a step's.

    Raises:
        ConfigError: variables are missing, are no numbers, or contradict each other.
    """
    env = os.environ if env is None else env
    launch = _read_position(env)
    return replace(launch, launcher_pid=os.getppid()) if is_started_by_launcher(env) else launch


def _read_position(env: Mapping[str, str]) -> Launch:
    _refuse_restarts(env)
    slurm = _slurm_launch(env)
    if slurm is not None and (env.get("PMI_RANK"), env.get("PMI_SIZE")) == (str(slurm.rank), str(slurm.size)):
        others = [slurm]  # srun --mpi=pmi2 sets PMI's variables too, and no local rank among them
    else:
        others = [launch for launch in (_mpi_launch(env), slurm) if launch is not None]
    if "RANK" in env:
        given = _launch_of(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not given.ranks_per_node:  # the deepspeed launcher's name, or the script of an srun task set RANK
            same = [other.ranks_per_node for other in others if (other.rank, other.size) == (given.rank, given.size)]
            given = replace(given, ranks_per_node=_number(env, "LOCAL_SIZE", same[0] if same else 0))
        # torchrun and deepspeed may themselves be tasks of srun or mpirun: then their variables hold.
        if not (_is_torchrun(env) or "CROSS_RANK" in env):
            for other in others:
                if other.size > 1 and (other.rank, other.size) != (given.rank, given.size):
                    _refuse_contradiction(given, other)
        return given
    size = _number(env, "WORLD_SIZE", 1)
    if others:
        if "WORLD_SIZE" in env and size != others[0].size:
            _refuse_contradiction(Launch(0, 0, size, (f"WORLD_SIZE={size}",)), others[0])
        return others[0]
    if size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size} is set and RANK is not: start the ranks by torchrun, deepspeed, srun or mpirun, or "
            "`unset WORLD_SIZE` for a run of one process"
        )
    return Launch(0, 0, 1, ranks_per_node=1)


def meeting_point(launch: Launch, env: Mapping[str, str]) -> tuple[str, int]:
    """The address and the port of rank 0, where ranks meet.

    Raises:
        ConfigError: MPI started ranks on several hosts, and MASTER_ADDR does not say where rank 0 is.
    """
    if launch.size == 1 and not _is_torchrun(env):  # whatever an older job has left in MASTER_PORT
        return "127.0.0.1", free_port()
    address = env.get("MASTER_ADDR") or slurm_head(env)
    port = _number(env, "MASTER_PORT", 0)
    if address is None:
        hosts = [names for names in _MPI if names[0] in env and _number(env, names[3], launch.size) < launch.size]
        if hosts:
            raise ConfigError(
                f"{launch}: these ranks are on several hosts, and MASTER_ADDR is not set; name the host of rank 0 and "
                "a free port of it: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..."
            )
        address = "127.0.0.1"
    return address, port or _shared_port(env)


def check_port(launch: Launch, env: Mapping[str, str]) -> None:
    """Refuses at once, on rank 0, a MASTER_PORT that another program listens on.

    Raises:
        ConfigError: with the port.
    """
    if not launch.is_main or launch.size == 1 or _is_torchrun(env):  # torchrun's agent listens there itself
        return
    port = int(env["MASTER_PORT"])
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"MASTER_PORT={port} cannot be opened on {socket.gethostname()} ({error.strerror}): another job of "
                "this host may use it; set MASTER_PORT to another number, the same for all ranks"
            ) from None


def is_started_by_launcher(env: Mapping[str, str]) -> bool:
    """Whether this process is a rank of a launcher, so that its parent process is that launcher's."""
    return "RANK" in env or any(names[0] in env for names in _MPI) or _slurm_launch(env) is not None


def free_port() -> int:
    """A free port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def slurm_head(env: Mapping[str, str]) -> str | None:
    """The host of rank 0 of a Slurm step, the same in all its tasks; None outside of a step.

    It is the first of the step's nodes. If its name cannot be resolved (containers, networks without DNS), it is the
    address where srun was started, which is that node's if a batch script has started it.
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
    """The first host of Slurm's node list, gpu007 of `gpu[007-009,12],x1`. Parsed here: containers have no scontrol."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _refuse_restarts(env: Mapping[str, str]) -> None:
    """torchrun's restarts repeat what must not be repeated: mistakes (exit code 2) and requested stops (75).

    With --standalone they also hang at the first one, since the restarted ranks meet at the old store.
    """
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts not in ("", "0"):
        raise ConfigError(
            f"torchrun --max-restarts={restarts}: start it with 0, which is the default; a run that was interrupted "
            "continues when the same command is run again (Slurm: scripts/slurm/train.sbatch does that)"
        )


def _mpi_launch(env: Mapping[str, str]) -> Launch | None:
    for rank, size, local_rank, local_size in _MPI:
        if rank in env and size in env and local_rank in env:
            return _launch_of(env, rank, size, local_rank, local_size)
    for rank, size, _, local_size in _MPI:
        if rank in env and _number(env, size, 1) > 1:
            return _launch_of(env, rank, size, "LOCAL_RANK", local_size)
    return None


def _slurm_launch(env: Mapping[str, str]) -> Launch | None:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    launch = _launch_of(env, "SLURM_PROCID", size, "SLURM_LOCALID")
    return replace(launch, ranks_per_node=_slurm_tasks_on_node(env))


def _slurm_tasks_on_node(env: Mapping[str, str]) -> int:
    """The tasks of this node, from Slurm's list `8(x3),4` of all nodes; 0 if there is none."""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(nodes or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 0


def _launch_of(
    env: Mapping[str, str], rank_name: str, size_name: str, local_name: str, local_size_name: str = ""
) -> Launch:
    rank, size, local_rank = _number(env, rank_name, 0), _number(env, size_name, 1), _number(env, local_name, 0)
    variables = tuple(f"{name}={env[name]}" for name in (rank_name, size_name, local_name) if name in env)
    if rank_name != "RANK" and size > 1 and local_name not in env:
        raise ConfigError(
            f"{' '.join(variables)}: this launcher does not say which rank of its host this is; set LOCAL_RANK, or "
            "start the ranks by torchrun, deepspeed or srun"
        )
    if rank >= size:
        raise ConfigError(
            f"{' '.join(variables)}: ranks count from 0 to the size less one; these variables are left over from "
            f"another job, or {size_name} is missing: unset them, or start by torchrun, deepspeed, srun or mpirun"
        )
    return Launch(rank, local_rank, size, variables, ranks_per_node=_number(env, local_size_name, 0))


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise ConfigError(f"{name}={value}: this environment variable is a whole number; unset it, or correct it")
    return int(value)


def _refuse_contradiction(given: Launch, other: Launch) -> None:
    raise ConfigError(
        f"{' '.join(given.variables)} contradicts {' '.join(other.variables)}: one of them is left over from another "
        f"shell or job; for the {other.size} ranks of the second, `unset RANK LOCAL_RANK WORLD_SIZE`"
    )


def _is_torchrun(env: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in env


def _shared_port(env: Mapping[str, str]) -> int:
    """A port that the ranks of this job agree on, and two jobs on one node, or two steps of a job, do not share.

    Every task of a Slurm array has a job id of its own.
    """
    if "SLURM_STEP_ID" in env:
        return _FIRST_PORT + (_number(env, "SLURM_JOB_ID", 0) + 1009 * _number(env, "SLURM_STEP_ID", 0)) % _NUM_PORTS
    # The ranks of one host: MPI's name of the job, else the process that started them all.
    job = env.get("PMIX_NAMESPACE") or str(os.getppid())
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS
