"""Ranks, addresses and ports are read from the variables that launchers set."""

from collections.abc import Mapping

import pytest

from train.distributed.world import Launch, first_host, read_launch, slurm_head, slurm_port

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,elsewhere",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}
"""Variables of a task of srun."""
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
"""Variables of a batch script and of a shell of salloc: there is no step."""
TORCHRUN = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 0, 1)),
        (STEP, Launch(11, 3, 16)),
        (BATCH, Launch(0, 0, 1)),
        (TORCHRUN, Launch(2, 0, 3)),
        (STEP | TORCHRUN, Launch(2, 0, 3)),
    ],
    ids=["alone", "srun", "batch script", "torchrun", "torchrun under srun"],
)
def test_ranks_from_the_environment(
    environment: Mapping[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in a batch script, outside of srun, is the only rank: it must not wait for others."""
    for name in {*STEP, *BATCH, *TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == expected


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
    """Slurm's compressed lists begin with the node of rank 0."""
    assert first_host(nodes) == first


def test_the_head_is_the_first_node_of_the_step() -> None:
    """Not the host where srun was started, which may be a login node, unless the node's name cannot be resolved."""
    assert slurm_head({}) is None
    assert slurm_head(STEP) == "localhost"
    assert slurm_head(STEP | {"SLURM_STEP_NODELIST": "no-such-host-[1-2].invalid"}) == "10.0.0.9"


def test_jobs_and_steps_have_ports_of_their_own() -> None:
    """Jobs that may share a node (their ids are near each other, as an array's are), and steps of one job."""
    ports = {slurm_port({"SLURM_JOB_ID": str(job)}) for job in range(99_990, 100_990)}
    assert len(ports) == 1000
    assert all(15000 <= port < 30000 for port in ports)
    assert len({slurm_port({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(step)}) for step in range(10)}) == 10
