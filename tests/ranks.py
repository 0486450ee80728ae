"""A rank harness: ranks are started once per world size and run every case.

Owns the processes: their start (gloo over loopback), how a case reaches them and its results come back, and that
nothing waits for ever. A case is a plain function of a module that every rank can import; its arguments and result
are pickled. What is proved stands in the tests.
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
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 600.0
"""For the start of all ranks: it may hold the compilation of DeepSpeed's CPU op."""
GRACE_S = 10.0
"""How long the other ranks may go on after one has failed: they mostly wait for it."""


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds its traceback or where it stood."""


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
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            log = self._folder / f"rank_{rank}.log"
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs, str(log)), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
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
            stuck = [f"rank {rank} is stuck after {timeout_s:.0f} s:\n{self._where(rank)}" for rank in silent]
            self.close()
            raise RankError(f"{what}: " + "\n".join(stuck))
        if silent:  # the rest wait for the one that failed
            self.close()
        told = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())]
        waited = f"\nand rank(s) {silent} waited for it" if silent else ""
        raise RankError(f"{what}: " + "\n".join(told) + waited)

    def _answer_of(self, rank: int) -> tuple[bool, Any] | None:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if pipe.poll(0.01):
                answer: tuple[bool, Any] = pipe.recv()
                return answer
        except EOFError:
            process.join(5)
            return False, f"the process died, exit code {process.exitcode}; it said:\n{self._said(rank)}"
        return None

    def _where(self, rank: int) -> str:
        """The stacks of a rank that hangs: it writes them when it is sent SIGUSR2."""
        os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.5)
        return self._said(rank)

    def _said(self, rank: int) -> str:
        log = self._folder / f"rank_{rank}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-60:]) if log.exists() else ""


def _serve(rank: int, size: int, port: int, pipe: Connection, log: str) -> None:
    """The life of a rank: join the group, then answer cases until the pipe closes."""
    output = Path(log).open("a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, file=output, all_threads=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
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

    from train import ops
    from train.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries(on_cpu=True)
    ops.ensure_built()
    import deepspeed

    importlib.import_module("train.run")  # brings all that cases need: seconds that are no case's own

    # A collective that waits longer than any case may take is a hang; the harness tells of it first.
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=600), verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit("this module is imported by tests")
