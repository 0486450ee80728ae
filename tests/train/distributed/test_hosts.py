"""Launchers over several hosts: two agents that share only an address, with one rank each, give the result of one agent
with two ranks.
"""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.launch import Program, finish
from train.config.schema import RunConfig

BIN = Path(sys.executable).parent
OPTIONS = ("stage.init_from=null", "max_steps=2", "save.every=0")


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agents(launcher: str, folder: Path) -> list[list[str]]:
    """The launcher's command lines on two hosts, here two names of this machine."""
    port = free_port()
    if launcher == "torchrun":
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        return [
            [
                str(BIN / "torchrun"),
                "--nnodes",
                "2",
                "--node-rank",
                str(k),
                "--nproc-per-node",
                "1",
                *meeting,
                "-m",
                "train",
            ]
            for k in range(2)
        ]
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    start = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh"]
    return [[*start, "--node_rank", str(k), *meeting, "--module", "train"] for k in range(2)]


@pytest.fixture
def ssh_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """An ssh server on the loopback interface, which pdsh enters without a password."""
    server, missing = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin"), shutil.which("pdsh") is None
    if server is None or missing:
        pytest.skip("there is no ssh server or no pdsh here (Debian: apt-get install openssh-server pdsh)")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path / 'host'}\nPidFile {tmp_path / 'pid'}\n"
        f"AuthorizedKeysFile {tmp_path / 'user.pub'}\nStrictModes no\nUsePAM no\n"
    )
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # where it locks itself in
    process = subprocess.Popen([server, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)
    options = f"-i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile={tmp_path / 'known'}"
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", options)
    yield port
    process.terminate()
    process.wait()


@pytest.mark.full
def test_a_hostfile_over_ssh_is_one_world(tiny_parts: RunConfig, tmp_path: Path, ssh_port: int) -> None:
    """The deepspeed launcher, started on one host, starts the other's rank through pdsh."""
    program = Program(tiny_parts, tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    agent = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--ssh_port", str(ssh_port), "--no_ssh_check"]
    code, output = finish(
        program.start("deepspeed", "name=ssh", *OPTIONS, agent=[*agent, *meeting, "--module", "train"]), 600
    )
    assert code == 0, output
    assert "on 2 rank(s)" in output
    assert len(program.metrics("ssh")) == 2


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_hosts_are_one_world(tiny_parts: RunConfig, tmp_path: Path, launcher: str) -> None:
    """The same command line on each host: one run of two ranks, with the losses of one host's two ranks, and the exit
    code 0 from the host of rank 0."""
    program = Program(tiny_parts, tmp_path)
    started: list[subprocess.Popen[str]] = [
        program.start(launcher, f"name={launcher}", *OPTIONS, agent=agent) for agent in agents(launcher, tmp_path)
    ]
    ended = [finish(process, 600) for process in started]
    assert ended[0][0] == 0, ended
    assert "on 2 rank(s)" in "".join(output for _, output in ended)
    code, output = program.run("torchrun", "name=one_host", *OPTIONS)
    assert code == 0, output
    losses = [[line["train/loss"] for line in program.metrics(name)] for name in (launcher, "one_host")]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
