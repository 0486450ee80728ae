"""A rank harness: ranks are started once per world size and run every case.

It starts the processes (gloo over loopback), sends them cases, returns their results, and ends ranks that hang. A case
is a plain function of a module that every rank can import; its arguments and result are pickled. The assertions are in
the tests.

All ranks are forks of one process that has imported torch, DeepSpeed and the run, which saves seconds per start.
"""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 600.0
"""Limit for the start of all ranks, which may include the compilation of DeepSpeed's CPU op."""
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCH_FR_BUFFER_SIZE": "5000",  # torch's flight recorder: `cases.recorded_collectives` reads it
}
_PRELOADED = [
    *("train.run", "train.__main__", "deepspeed"),
    *("tests.train.cases", "tests.train.contract_cases", "tests.train.replica_cases", "tests.train.fault_runs"),
    "deepspeed.runtime.zero.muon.original_muon",  # every engine imports it, and it imports torch's compiler
]
GRACE_S = 10.0
"""How long the other ranks may go on after one has failed; they mostly wait for it."""


class RankError(AssertionError):
    """A rank failed, died or hung; the message has its traceback or stack."""


class Ranks:
    """`size` processes in one gloo group, kept alive between cases; started again after a failure.

    Args:
        size: the world.
        folder: for what ranks print, one file each.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks_{size}_", dir=folder))
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> list[Any]:
        """Runs `case(*args)` on every rank at once; returns the results in the order of ranks.

        Raises:
            RankError: a rank raised, died, or did not finish in time. All are ended, and the next case gets new ones.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__qualname__, args))
        return self._collect(f"{case.__module__}.{case.__qualname__}", timeout_s)

    def close(self) -> None:
        """Ends every rank."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = _server()
        port = _free_port()
        for rank in range(self.size):
            parent_end, rank_end = context.Pipe()
            args = (_Position(rank, self.size, port, str(self._folder / f"rank_{rank}.log")), rank_end)
            process = context.Process(target=_serve, args=args, daemon=False)
            process.start()
            rank_end.close()
            self._processes.append(process)
            self._pipes.append(parent_end)
        self._collect("the start of the ranks", START_TIMEOUT_S)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) + len(failures) < self.size:
            for rank in set(range(self.size)) - set(results) - set(failures):
                answer = self._answer_of(rank)
                if answer is None:
                    continue
                succeeded, value = answer
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                break
        silent = sorted(set(range(self.size)) - set(results) - set(failures))
        if not failures and not silent:
            return [results[rank] for rank in range(self.size)]
        if silent and not failures:
            stuck = [f"rank {rank} is stuck after {timeout_s:.0f} s:\n{self._stacks(rank)}" for rank in silent]
            self.close()
            raise RankError(f"{what}: " + "\n".join(stuck))
        if silent:  # the rest wait for the one that failed
            self.close()
        reports = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())]
        waited = f"\nand rank(s) {silent} waited for it" if silent else ""
        raise RankError(f"{what}: " + "\n".join(reports) + waited)

    def _answer_of(self, rank: int) -> tuple[bool, Any] | None:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if pipe.poll(0.01):
                answer: tuple[bool, Any] = pipe.recv()
                return answer
        except EOFError:
            process.join(5)
            return False, f"the process died, exit code {process.exitcode}; its output:\n{self._output(rank)}"
        return None

    def _stacks(self, rank: int) -> str:
        """Returns the stacks of a rank that hangs, which it writes on SIGUSR2."""
        os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.5)
        return self._output(rank)

    def _output(self, rank: int) -> str:
        log = self._folder / f"rank_{rank}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-60:]) if log.exists() else ""


@dataclass(frozen=True)
class Ended:
    """How a process of `run_to_the_end` ended: its exit code (negative: the signal) and its output."""

    exit_code: int
    output: str


def run_to_the_end(
    size: int, case: Callable[..., int], *args: Any, folder: Path, missing: Sequence[int] = (), timeout_s: float
) -> list[Ended]:
    """Runs `case(*args)` on new ranks, whose exit code it returns, until their processes have ended.

    The case joins the process group by itself, as a launched program does.

    Args:
        missing: ranks that need not end by themselves; they are killed when the others have.

    Raises:
        RankError: a rank that should have ended has not; the message has its output and stacks.
    """
    context, port = _server(), _free_port()
    first = context.Process(target=int)  # the server's own imports are not the case's time
    first.start()
    first.join(START_TIMEOUT_S)
    logs = [Path(tempfile.mkdtemp(prefix="rank_", dir=folder)) / "output" for _ in range(size)]
    positions = [_Position(rank, size, port, str(log)) for rank, log in enumerate(logs)]
    processes = [context.Process(target=_run_alone, args=(position, case, args)) for position in positions]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    stuck = []
    for rank, process in enumerate(processes):
        if rank not in missing:
            process.join(max(0.0, deadline - time.monotonic()))
            stuck += [rank] * process.is_alive()
    for rank in stuck:
        os.kill(processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.5)
    for process in processes:
        process.kill()
        process.join()
    if stuck:
        outputs = "\n".join(f"rank {rank}:\n{logs[rank].read_text(errors='replace')}" for rank in stuck)
        raise RankError(f"{case.__qualname__}: not ended after {timeout_s:.0f} s: {outputs}")
    return [
        Ended(process.exitcode, log.read_text(errors="replace")) for process, log in zip(processes, logs, strict=True)
    ]


def _server() -> Any:
    """Returns the context whose processes are forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server keeps the environment of its start: libraries must not create threads before the fork.
    previous = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    forkserver.ensure_running()
    for name, value in previous.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


@dataclass(frozen=True)
class _Position:
    """The position of a rank: its number, where the ranks meet, and the file of its output."""

    rank: int
    size: int
    port: int
    log: str

    def apply(self) -> None:
        """Makes this process that rank."""
        multiprocessing.set_start_method("fork", force=True)  # as in a launched program
        output = Path(self.log).open("a", buffering=1)  # noqa: SIM115 - for as long as the process lives
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.register(signal.SIGUSR2, file=output, all_threads=True)
        os.environ |= _ENVIRONMENT | {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }


def _run_alone(position: _Position, case: Callable[..., int], args: tuple[Any, ...]) -> None:
    position.apply()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that were started by nohup inherit it as ignored
    sys.exit(case(*args))


def _serve(position: _Position, pipe: Connection) -> None:
    """Runs a rank: joins the group, then runs cases until the pipe closes."""
    position.apply()
    try:
        _join_group()
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            module, name, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            case = importlib.import_module(module)
            for attribute in name.split("."):
                case = getattr(case, attribute)
            answer = (True, case(*args))  # type: ignore[operator]
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _join_group() -> None:
    import torch

    from train.distributed.quiet_libraries import quiet_libraries
    from train.engine import deepspeed_ops

    torch.set_num_threads(1)
    quiet_libraries(on_cpu=True)
    deepspeed_ops.ensure_built()
    import deepspeed

    # Longer than any case: the harness reports a hang first.
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=600), verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit("this module is imported by tests")
