"""Runs a program as child processes of the participating ranks and collects the result.

A child has the environment of the launcher, with another number of ranks and rendezvous port. After the time limit, or
soon after a rank has failed, the remaining processes of the run are killed on every host.
"""

import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.acceptance.ranks import Ranks, find_free_port

GRACE_S = 20.0
"""Time in seconds that the other ranks may continue after one has failed, so that they can report the failure."""
_TAIL_CHARACTERS = 1500
_CHECKOUT = Path(__file__).resolve().parents[2]
# Variables of the launcher that started this process, which do not apply to a child run.
_LAUNCHER_VARIABLES = (
    "TORCHELASTIC_",
    "SLURM_STEP",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "GROUP_",
    "ROLE_",
    "CROSS_",
    "PMI",
    "OMPI_",
)


@dataclass(frozen=True)
class ChildResult:
    """The result of a child run.

    Attributes:
        codes: exit code of each participating rank, negative for a signal.
        seconds: duration of the run.
        timed_out: whether it was still running at its time limit.
        killed: whether it was killed because `kill_when` returned true.
        tail: end of the log of the first rank that failed; empty if none did.
    """

    codes: list[int]
    seconds: float
    timed_out: bool
    killed: bool
    tail: str

    @property
    def succeeded(self) -> bool:
        return not any(self.codes) and not self.timed_out and not self.killed


def make_child_environment(env: Mapping[str, str], *, rank: int, local_rank: int, size: int, local_size: int,
                           address: str, port: int) -> dict[str, str]:  # fmt: skip
    """Returns the environment of one rank of a child run, derived from `env`."""
    inherited = {key: value for key, value in env.items() if not key.startswith(_LAUNCHER_VARIABLES)}
    return inherited | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "LOCAL_SIZE": str(local_size),  # DeepSpeed reads the number of devices of a host without GPUs from it
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(_CHECKOUT), *filter(None, [inherited.get("PYTHONPATH")])]),
    }


def run_children(
    ranks: Ranks,
    command: Sequence[str],
    *,
    num_ranks: int,
    limit_s: float,
    logs: Path,
    kill_when: Callable[[], bool] | None = None,
) -> ChildResult:
    """Runs a command on the first `num_ranks` ranks and waits for it. Every rank must call it.

    Args:
        limit_s: time limit in seconds, after which the command is killed on every rank.
        logs: folder for the output of each rank, `rank_NNN.log`.
        kill_when: polled on rank 0; when it returns true, every rank is killed with SIGKILL.
    """
    port = find_free_port(ranks)
    key = f"child/{port}/{ranks.on_main(time.time_ns)}"
    log = logs / f"rank_{ranks.rank:03d}.log"
    if ranks.is_main:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "command.txt").write_text(f"{shlex.join(command)}\n")  # for running it manually
    code, timed_out, killed, started = 0, False, False, time.monotonic()
    if ranks.rank < num_ranks:
        env = make_child_environment(
            os.environ,
            rank=ranks.rank,
            local_rank=ranks.launch.local_rank,
            size=num_ranks,
            local_size=ranks.count_ranks_on_host(ranks.rank, num_ranks),
            address=ranks.address,
            port=port,
        )
        logs.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            child = Child(command, env, file.fileno())
            code, timed_out, killed = _wait_for_child(ranks, child, key, started + limit_s, kill_when)
    failed = ranks.rank < num_ranks and code != 0
    results = ranks.gather((code, timed_out, killed, _read_tail(log) if failed else ""))[:num_ranks]
    tails = [(code < 0, rank, tail) for rank, (code, _, _, tail) in enumerate(results) if code]
    first = min(tails, default=(False, 0, ""))  # a rank that exited says more than one that was killed
    return ChildResult(
        codes=[result[0] for result in results],
        seconds=time.monotonic() - started,
        timed_out=any(result[1] for result in results),
        killed=any(result[2] for result in results),
        tail=first[2],
    )


class Child:
    """A program in its own session, which is killed when this process receives SIGTERM or SIGINT."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: int) -> None:
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=Path.cwd(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._previous_handlers:
            signal.signal(number, self._exit)

    def _exit(self, number: int, *_: object) -> None:
        self.kill()
        os._exit(128 + number)

    def kill(self) -> None:
        """Kills the program and the processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Waits until the program has ended and returns its exit code."""
        code = self.process.wait()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        return code


def _wait_for_child(
    ranks: Ranks, child: Child, key: str, deadline: float, kill_when: Callable[[], bool] | None
) -> tuple[int, bool, bool]:
    """Returns the exit code, whether the time limit has passed, and whether it was killed because of `kill_when`."""
    timed_out = killed = False
    failed_s = math.inf
    tick_s = 0.02 if kill_when is not None and ranks.is_main else 0.2
    while child.process.poll() is None:
        now_s = time.monotonic()
        if ranks.is_main and kill_when is not None and kill_when():
            ranks.store.set(f"{key}/kill", "1")
        if ranks.store.check([f"{key}/failed"]):
            failed_s = min(failed_s, now_s)
        killed = ranks.store.check([f"{key}/kill"])
        timed_out = now_s > deadline and failed_s == math.inf
        if killed or timed_out or now_s > min(deadline, failed_s + GRACE_S):
            child.kill()
            break
        time.sleep(tick_s)
    code = child.close()
    if code and not killed:
        ranks.store.set(f"{key}/failed", "1")
    return code, timed_out, killed


def _read_tail(log: Path) -> str:
    try:
        return log.read_bytes()[-_TAIL_CHARACTERS:].decode(errors="replace")
    except OSError:
        return ""
