"""Tests of child runs: exit codes, time limits, kills, and the environment of a child."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.acceptance.child_runs import make_child_environment, run_children
from train.acceptance.phase_context import Device, NotRun, PhaseContext
from train.acceptance.ranks import PhaseError, Ranks, destroy_group, join_ranks, read_launcher_name

LONG = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Returns one rank, as without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    yield join_ranks(60.0)
    destroy_group()


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    """Waits until a killed process has ended."""
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_succeeds(ranks: Ranks, tmp_path: Path) -> None:
    """Exit code 0 is a success, and the output is in the log."""
    ended = run_children(ranks, [sys.executable, "-c", "print(1)"], num_ranks=1, limit_s=60, logs=tmp_path)
    assert ended.succeeded
    assert ended.codes == [0]
    assert (tmp_path / "rank_000.log").read_text() == "1\n"


def test_failed_child_is_reported_with_the_end_of_its_log(ranks: Ranks, tmp_path: Path) -> None:
    """The exit code and the end of the log are reported."""
    command = [sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"]
    ended = run_children(ranks, command, num_ranks=1, limit_s=60, logs=tmp_path)
    assert not ended.succeeded
    assert (ended.codes, ended.timed_out, ended.tail) == ([3], False, "no such thing\n")


def test_hanging_child_is_killed_with_its_descendants(ranks: Ranks, tmp_path: Path) -> None:
    """After the time limit, neither the child nor a process that it started is left."""
    ended = run_children(ranks, [sys.executable, "-c", LONG], num_ranks=1, limit_s=2, logs=tmp_path)
    assert (ended.timed_out, ended.killed, ended.codes) == (True, False, [-9])
    assert ended.seconds < 20
    wait_until_gone(int((tmp_path / "rank_000.log").read_text()))


def test_run_ended_by_the_deadline_is_not_run(ranks: Ranks, tmp_path: Path) -> None:
    """A run that the deadline ends is reported as not run; one that exceeds its own limit has failed."""
    server = ["http.server", "0", "--bind", "127.0.0.1"]
    bench = PhaseContext(ranks, Device("CPU"), tmp_path, timeout_s=60, deadline_s=time.monotonic() + 2)
    with pytest.raises(NotRun):
        bench.run("server", server, 1, limit_s=60)
    bench.deadline_s += 600
    assert bench.describe_failure(bench.run("server", server, 1, limit_s=1), "server")


def test_child_is_killed_on_request(ranks: Ranks, tmp_path: Path) -> None:
    """A requested kill is neither a timeout nor a success."""
    log = tmp_path / "rank_000.log"
    ended = run_children(
        ranks,
        [sys.executable, "-c", LONG],
        num_ranks=1,
        limit_s=60,
        logs=tmp_path,
        kill_when=lambda: log.exists() and log.stat().st_size > 0,
    )
    assert (ended.timed_out, ended.killed, ended.succeeded) == (False, True, False)
    wait_until_gone(int(log.read_text()))


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """When a launcher ends its ranks with SIGTERM, the processes that they started end too."""
    log = tmp_path / "log"
    parent = (
        "import os, sys; from train.acceptance.child_runs import Child; "
        f"log = open({str(log)!r}, 'wb'); "
        f"Child([sys.executable, '-c', {LONG!r}], dict(os.environ), log.fileno()).close()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text().strip():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 128 + 15
    wait_until_gone(int(log.read_text()))


def test_environment_of_a_child() -> None:
    """A child has its own rank, number of ranks and rendezvous, none of the launcher's variables, and otherwise the
    same environment."""
    launcher = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_RANK": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_GPUS_ON_NODE": "2",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    env = make_child_environment(launcher, rank=1, local_rank=1, size=2, local_size=2, address="node1", port=4711)
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "4711"}
    assert {key: env[key] for key in expected} == expected
    assert {"SLURM_GPUS_ON_NODE", "NCCL_SOCKET_IFNAME"} <= env.keys()
    assert not {"TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "SLURM_STEP_ID", "SLURM_PROCID"} & env.keys()


def test_an_error_of_the_main_rank_is_every_ranks(ranks: Ranks) -> None:
    """The result of an action on rank 0 is a value or an error, the same on every rank."""
    with pytest.raises(PhaseError, match="ZeroDivisionError"):
        ranks.on_main(lambda: 1 // 0)
    assert ranks.on_main(os.getpid) == os.getpid()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"RANK": "0", "CROSS_RANK": "0"}, "deepspeed"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "srun"),
        ({}, "none"),
    ],
)
def test_launcher_is_recognised(env: dict[str, str], expected: str) -> None:
    """Each launcher is recognized by variables that only it sets."""
    assert read_launcher_name(env) == expected
