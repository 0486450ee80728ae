"""Child runs: every participating rank starts one real program as its child, and all wait for the outcome.

A child has its launcher's variables, with another number of ranks and a meeting point of its own. Every child run has a
time limit; when it is over, or soon after a rank has failed, what is left of the run is killed on every host.
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

from train.accept.ranks import Ranks, fresh_port

GRACE_S = 20.0
"""How long the other ranks may go on after one has failed: the trainer reports who is late within this time."""
_TAIL_CHARACTERS = 1500
_CHECKOUT = Path(__file__).resolve().parents[2]
# Of the launcher that started this process: a child has no agent, and other ranks.
_HIDDEN = ("TORCHELASTIC_", "SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "GROUP_", "ROLE_", "CROSS_", "PMI", "OMPI_")


@dataclass(frozen=True)
class Ended:
    """How a child run ended.

    Attributes:
        codes: exit code of each participating rank, negative for a signal.
        timed_out: it was still running at its time limit.
        killed: it was killed because `kill_when` returned true.
        tail: the end of the log of the first rank that failed; empty where none did.
    """

    codes: list[int]
    seconds: float
    timed_out: bool
    killed: bool
    tail: str

    @property
    def succeeded(self) -> bool:
        return not any(self.codes) and not self.timed_out and not self.killed


def child_environment(env: Mapping[str, str], *, rank: int, local_rank: int, size: int, local_size: int, address: str,
                      port: int) -> dict[str, str]:  # fmt: skip
    """The environment of one rank of a child run, from that of this process."""
    kept = {key: value for key, value in env.items() if not key.startswith(_HIDDEN)}
    return kept | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "LOCAL_SIZE": str(local_size),  # DeepSpeed's name: how many devices a host without GPUs has
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(_CHECKOUT), *filter(None, [kept.get("PYTHONPATH")])]),
    }


def run_children(
    ranks: Ranks,
    command: Sequence[str],
    *,
    num_ranks: int,
    limit_s: float,
    logs: Path,
    kill_when: Callable[[], bool] | None = None,
) -> Ended:
    """Runs a command on the first `num_ranks` ranks, to its end. Every rank must call it.

    Args:
        limit_s: after this time it is killed on every rank.
        logs: folder for what each rank prints, `rank_NNN.log`.
        kill_when: asked on rank 0 again and again; once it is true, every rank is killed by SIGKILL.
    """
    port = fresh_port(ranks)
    key = f"child/{port}/{ranks.on_main(time.time_ns)}"
    log = logs / f"rank_{ranks.rank:03d}.log"
    if ranks.is_main:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "command.txt").write_text(f"{shlex.join(command)}\n")  # to start it by hand
    code, timed_out, killed, started = 0, False, False, time.monotonic()
    if ranks.rank < num_ranks:
        env = child_environment(
            os.environ,
            rank=ranks.rank,
            local_rank=ranks.launch.local_rank,
            size=num_ranks,
            local_size=ranks.ranks_on_host(ranks.rank, num_ranks),
            address=ranks.address,
            port=port,
        )
        logs.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            child = Child(command, env, file.fileno())
            code, timed_out, killed = _wait(ranks, child, key, started + limit_s, kill_when)
    failed = ranks.rank < num_ranks and code != 0
    found = ranks.gather((code, timed_out, killed, _tail(log) if failed else ""))[:num_ranks]
    tails = [(code < 0, rank, tail) for rank, (code, _, _, tail) in enumerate(found) if code]
    first = min(tails, default=(False, 0, ""))  # a rank that ended by itself explains more than one that was killed
    return Ended(
        codes=[each[0] for each in found],
        seconds=time.monotonic() - started,
        timed_out=any(each[1] for each in found),
        killed=any(each[2] for each in found),
        tail=first[2],
    )


class Child:
    """A started program in a session of its own, which ends with this process's SIGTERM and SIGINT."""

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
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._before:
            signal.signal(number, self._leave)

    def _leave(self, number: int, *_: object) -> None:
        self.kill()
        os._exit(128 + number)

    def kill(self) -> None:
        """Kills it and the processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Waits for its end; returns the exit code."""
        code = self.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return code


def _wait(
    ranks: Ranks, child: Child, key: str, deadline: float, kill_when: Callable[[], bool] | None
) -> tuple[int, bool, bool]:
    """(exit code, whether the time limit was over, whether it was killed on request)."""
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


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-_TAIL_CHARACTERS:].decode(errors="replace")
    except OSError:
        return ""
