"""Ranks, addresses and ports from what launchers leave in the environment."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import which

import pytest

from train.config.schema import ConfigError
from train.distributed.launch import (
    Launch,
    check_port,
    first_host,
    free_port,
    is_started_by_launcher,
    meeting_point,
    read_launch,
    slurm_head,
)

ROOT = Path(__file__).resolve().parents[3]
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,elsewhere",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}
"""What srun gives a task."""
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
"""What a batch script, and a shell of salloc, have: no step."""
TORCHRUN = {
    "RANK": "2",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "3",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_MAX_RESTARTS": "0",
}
DEEPSPEED = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "CROSS_RANK": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 0, 1)),
        (STEP, Launch(11, 3, 16)),
        (BATCH, Launch(0, 0, 1)),
        (TORCHRUN, Launch(2, 0, 3)),
        (STEP | TORCHRUN, Launch(2, 0, 3)),
        (STEP | DEEPSPEED, Launch(2, 0, 3)),
        (OPEN_MPI, Launch(3, 1, 4)),
        # mpirun inside of an allocation: its daemon is the task of srun, and the ranks inherit the daemon's variables.
        (STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, Launch(3, 1, 4)),
        (MPICH, Launch(1, 1, 2)),
        (PALS, Launch(5, 1, 8)),
        # srun --mpi=pmi2 sets PMI's variables, without a local rank.
        (STEP | {"PMI_RANK": "11", "PMI_SIZE": "16"}, Launch(11, 3, 16)),
        (STEP | {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"}, Launch(11, 3, 16)),
        ({"WORLD_SIZE": "1"}, Launch(0, 0, 1)),
    ],
)
def test_ranks_from_the_environment(environment: Mapping[str, str], expected: Launch) -> None:
    """A program in a batch script, outside of srun, is alone: it must not wait for ranks that nobody starts."""
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, 3),
        (DEEPSPEED | {"LOCAL_SIZE": "2"}, 2),
        (OPEN_MPI, 2),
        (MPICH, 2),
        (PALS, 4),
        (STEP, 0),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "6(x2),4", "SLURM_NODEID": "2"}, 4),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        # A script of an srun task that sets RANK by itself.
        (STEP | {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 0),
    ],
)
def test_ranks_of_a_node_from_the_environment(environment: Mapping[str, str], expected: int) -> None:
    """As each launcher says it; 0 where it does not."""
    assert read_launch(environment).ranks_per_node == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts=3"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK=two"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK=-1"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "SLURM_PROCID=11"),
        (STEP | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_RANK=3"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "LOCAL_RANK"),
    ],
)
def test_stale_and_contradictory_variables_are_refused(environment: Mapping[str, str], named: str) -> None:
    """The message names the variables; nobody trains alone, or waits, in their place."""
    with pytest.raises(ConfigError, match=named):
        read_launch(environment)


def test_meeting_point() -> None:
    """One process ignores what an older job left; MPI's ranks meet on their host, on several they need an address."""
    address, port = meeting_point(Launch(0, 0, 1), {"MASTER_ADDR": "gone", "MASTER_PORT": "1"})
    assert (address, port == 1) == ("127.0.0.1", False)
    assert meeting_point(Launch(1, 1, 2), MPICH)[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        meeting_point(read_launch(OPEN_MPI), OPEN_MPI)
    named = OPEN_MPI | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert meeting_point(read_launch(named), named) == ("head", 29500)
    assert meeting_point(read_launch(STEP), STEP)[0] == "localhost"


def test_jobs_and_steps_have_ports_of_their_own() -> None:
    """Jobs that may share a node (their ids are near each other, as an array's are), and steps of one job."""
    launch = read_launch(STEP)
    ports = {meeting_point(launch, STEP | {"SLURM_JOB_ID": str(job)})[1] for job in range(99_990, 100_990)}
    assert len(ports) == 1000
    assert all(15000 <= port < 30000 for port in ports)
    assert len({meeting_point(launch, STEP | {"SLURM_STEP_ID": str(step)})[1] for step in range(10)}) == 10


def test_port_in_use_is_reported_at_once() -> None:
    """By rank 0, before any rank waits; torchrun's own store is no mistake."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}"):
            check_port(Launch(0, 0, 2), {"MASTER_PORT": port})
        check_port(Launch(1, 1, 2), {"MASTER_PORT": port})
        check_port(Launch(0, 0, 2), {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"})
    check_port(Launch(0, 0, 2), {"MASTER_PORT": str(free_port())})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, False), (BATCH, False), (STEP, True), (TORCHRUN, True), (OPEN_MPI, True), (MPICH, True)],
)
def test_is_started_by_launcher(environment: Mapping[str, str], expected: bool) -> None:
    """A run of one process has a shell as its parent, which may end before it."""
    assert is_started_by_launcher(environment) is expected


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"])
def test_ranks_of_a_real_mpirun(mpirun: str, tmp_path: Path) -> None:
    """Two ranks with one meeting point."""
    if which(mpirun) is None:
        pytest.skip(f"{mpirun} is not installed: apt-get install openmpi-bin mpich")
    program = (
        "import os; from train.distributed.launch import *; l = read_launch(); place = meeting_point(l, os.environ);"
        f"open(f'{tmp_path}/{{l.rank}}', 'w').write(f'{{l.local_rank}} {{l.size}} {{place}}')"
    )
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("SLURM_")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--oversubscribe"] if "openmpi" in mpirun else []
    command = [mpirun, *options, "-np", "2", sys.executable, "-c", program]
    subprocess.run(command, env=environment, capture_output=True, check=True, cwd=ROOT)
    first, second = ((tmp_path / str(rank)).read_text().split(maxsplit=2) for rank in range(2))
    assert (first[:2], second[:2]) == (["0", "2"], ["1", "2"])
    assert first[2] == second[2]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("a,b", "a"),
        ("gpu[007-009,12],x1", "gpu007"),
        ("rack[1-2]node[3,4]", "rack1node3"),
        ("gpu-[3,5-7].cluster", "gpu-3.cluster"),
    ],
)
def test_first_host_of_a_nodelist(nodes: str, first: str) -> None:
    """Slurm's shortened lists begin with the node of rank 0."""
    assert first_host(nodes) == first


def test_the_head_is_the_first_node_of_the_step() -> None:
    """Not the host where srun was started, which may be a login node; that one only where the name says nothing."""
    assert slurm_head({}) is None
    assert slurm_head(STEP) == "localhost"
    assert slurm_head(STEP | {"SLURM_STEP_NODELIST": "no-such-host-[1-2].invalid"}) == "10.0.0.9"
