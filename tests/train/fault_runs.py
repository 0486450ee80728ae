"""The whole program in forked ranks, with faults.

These functions run the same command repeatedly, inject faults, and check the run folder. `fault_points.py` has the
points at which they interrupt a process, and `faults.py` the faults of single steps. The assertions are in the tests.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.train.fault_points import (
    FILE_OPERATIONS,
    ON_EVERY_RANK,
    at_file_operation,
    at_phase,
    at_sample,
    run_later,
    watch_file_operations,
)
from train.config.schema import RunConfig

# ---------------------------------------------------------------------------------------------------- kills


Target = int | Literal["all", "launcher"]


@dataclass(frozen=True)
class Kill:
    """Which process is killed, and when.

    Attributes:
        target: a rank, all ranks at the same time, or the launcher (torchrun), whose ranks must then end by themselves.
        when: the file operation (one of `FILE_OPERATIONS`) before which it is killed; "start" or "step": during that.
        number: of the operation, counted from 1, or of the step since the start.
        seconds: after the start of the process or of the step.
    """

    target: Target
    when: str
    number: int = 1
    seconds: float = 0.0

    @property
    def rank(self) -> int:
        """The rank that reaches the point and kills."""
        return self.target if isinstance(self.target, int) else 0


def draw_kills(seed: int, step_s: float, start_s: float) -> list[Kill]:
    """Returns twenty kills: two during the start, six in steps, and one or two before each file operation of a save.

    Four are of the launcher; about half of the others are of one rank, the rest of all.
    """
    draw = random.Random(seed)
    points = [*FILE_OPERATIONS, *draw.sample(FILE_OPERATIONS, 2), *["step"] * 6, *["start"] * 2]
    draw.shuffle(points)
    kills = []
    for index, when in enumerate(points):
        ranks: tuple[Target, ...] = (
            (0, 1) if when in (*ON_EVERY_RANK, "step") else ("all",) if when == "start" else (0,)
        )
        target: Target = "launcher" if index % 5 == 4 else draw.choice(("all", "all", *ranks))
        seconds = draw.uniform(0.0, start_s if when == "start" else step_s)
        kills.append(Kill(target, when, draw.randint(1, 4 if when in ("rename", "sync") else 2), seconds))
    return kills


def run_with_kill(config: RunConfig, kill: Kill | None, folder: str) -> int:
    """Runs the program on a validated configuration with a kill; returns the exit code.

    Args:
        config: of the run.
        kill: None: no process is killed, and `measured.json` in `folder` gets the duration of the start in seconds
            and the number of each file operation of rank 0.
        folder: for the ranks' process ids.
    """
    from train.__main__ import execute

    rank, shared, checkpoints = int(os.environ["RANK"]), Path(folder), config.run_dir / "checkpoints"
    (shared / f"pid_{rank}").write_text(str(os.getpid()))

    def kill_target() -> None:
        if kill is not None and kill.target == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            return  # this rank goes on until it sees that its launcher has ended
        if kill is not None and kill.target == "all":
            for path in shared.glob("pid_*"):
                if path.name != f"pid_{rank}":
                    with suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    started, seen, start_s = time.monotonic(), Counter[str](), [0.0]
    if kill is None:
        at_phase("data", 0, lambda: start_s.append(time.monotonic() - started))
        watch_file_operations(checkpoints, lambda operation: seen.update([operation]))
    elif rank == kill.rank:
        if kill.when == "start":
            run_later(kill.seconds, kill_target)
        elif kill.when == "step":
            at_phase("agree", kill.number, lambda: run_later(kill.seconds, kill_target))
        else:
            at_file_operation(checkpoints, kill.when, kill.number, kill_target)
    code = execute(config)
    if rank == 0 and kill is None:
        (shared / "measured.json").write_text(json.dumps({"start_s": start_s[-1], "operations": seen}))
    return code


def run_with_killed_launcher(config: RunConfig, kill: Kill, folder: Path, timeout_s: float) -> int:
    """Starts two ranks by torchrun, which `kill` ends; returns torchrun's exit code after its ranks have ended.

    Raises:
        subprocess.TimeoutExpired: the ranks, which share torchrun's output, have not ended within `timeout_s`.
    """
    (folder / "run.pickle").write_bytes(pickle.dumps((config, kill, str(folder))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.train.fault_runs", str(folder / "run.pickle")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = subprocess.Popen(
        command, env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )
    try:
        launcher.communicate(timeout=timeout_s)  # ends when the last of the ranks has closed the pipe
    finally:
        launcher.kill()
    return launcher.returncode


# --------------------------------------------------------------------------------------------- other faults


def run_as_it_is(config: RunConfig) -> int:
    """Runs the program on a validated configuration; returns the exit code."""
    from train.__main__ import execute

    return execute(config)


def run_and_fill_the_disk(config: RunConfig, phase: str, number: int, leave: float) -> int:
    """Fills the run's disk when the run enters a phase, up to the space for `leave` of a checkpoint."""

    def fill() -> None:
        newest = max((config.run_dir / "checkpoints").glob("step_??????"))
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        with (Path(config.root) / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        with (Path(config.root) / "filler").open("r+b") as file:
            file.truncate(max(0, file.seek(0, os.SEEK_END) - int(leave * size)))

    at_phase(phase, number, fill)
    return run_as_it_is(config)


def run_without_store(config: RunConfig, store: str, back_after_s: float | None) -> int:
    """Removes a store while its images are read, as a network file system may; it returns, or does not."""
    path, away, read = Path(config.data.store_root) / store, Path(config.data.store_root) / "away", os.pread

    def vanish() -> None:
        path.rename(away)
        if back_after_s is not None:
            run_later(back_after_s, lambda: away.rename(path))

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if away in Path(f"/proc/self/fd/{descriptor}").readlink().parents:  # a network's handle would be stale
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(descriptor, length, offset)

    os.pread = pread
    at_sample(20, vanish)
    return run_as_it_is(config)


def run_and_kill_a_worker(config: RunConfig) -> int:
    """Kills a rank's loader worker, as the kernel does when it is out of memory."""
    at_sample(20, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return run_as_it_is(config)


def run_with_jumping_clock(config: RunConfig) -> int:
    """Makes the clock of the host jump by days, forward and back, in every step."""
    clock, days, offsets = time.time, 86_400.0, itertools.cycle((3.0, -5.0, 0.5, 1000.0))
    offset = [0.0]
    time.time = lambda: clock() + offset[0]

    def jump(step: int = 0) -> None:
        offset[0] = next(offsets) * days
        at_phase("forward", 0, jump)

    at_phase("start", 0, jump)
    return run_as_it_is(config)


def run_and_ask_twice(config: RunConfig) -> int:
    """Sends Ctrl-C in the second step, and again while the step is running."""
    from train.supervision.stop_signal import StopSignal

    StopSignal.SAME_REQUEST_S = 0.1

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

    at_phase("forward", 1, ask)
    return run_as_it_is(config)


def run_and_ask_at_start(config: RunConfig, where: str, number: int, ranks: list[int]) -> int:
    """Sends a signal during the start, before the function `where` is called."""
    from train import assemble, run

    module = assemble if hasattr(assemble, where) else run
    function = getattr(module, where)

    def asked(*args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) in ranks:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(module, where, asked)
    return run_as_it_is(config)


def run_on_hosts(config: RunConfig, spaces: list[str], links: list[str], address: str, cut_at: int | None) -> int:
    """The program on hosts of its own: each rank in a network namespace, with a name; the first cuts its link.

    `cut_at`: when it goes forward for this time; None: never. When it did so is in `cut` in the run's folder.
    """
    rank = int(os.environ["RANK"])
    libc = ctypes.CDLL(None, use_errno=True)
    space = os.open(f"/run/netns/{spaces[rank]}", os.O_RDONLY)
    for failed in (libc.setns(space, 0x40000000), libc.unshare(0x04000000)):  # CLONE_NEWNET, CLONE_NEWUTS
        if failed:
            raise OSError(ctypes.get_errno(), "no namespace of its own")
    socket.sethostname(f"node{rank}")
    os.environ |= {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": links[rank]}

    def cut() -> None:
        subprocess.run(["ip", "link", "set", links[rank], "down"], check=True)
        (config.run_dir / "cut").write_text(str(time.time()))

    if rank == 0 and cut_at is not None:
        at_phase("forward", cut_at, cut)
    return run_as_it_is(config)


# ------------------------------------------------------------------------------------------ results


def result_hash(config: RunConfig) -> str:
    """Returns the sha256 over names and bytes of all tensors of the run's result."""
    from safetensors import safe_open

    total = hashlib.sha256()
    files = sorted((config.run_dir / config.stage.result).glob("*.safetensors"))
    assert files
    for path in files:
        with safe_open(path, framework="numpy") as actual:
            for name in sorted(actual.keys()):
                total.update(name.encode() + actual.get_tensor(name).tobytes())
    return total.hexdigest()


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; asserts that every step is there once."""
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return lines


def read_exit_report(config: RunConfig) -> dict[str, Any]:
    """Returns the content of exit.json."""
    values: dict[str, Any] = json.loads((config.run_dir / "exit.json").read_text())
    return values


if __name__ == "__main__":
    run, kill, shared_folder = pickle.loads(Path(sys.argv[1]).read_bytes())
    sys.exit(run_with_kill(run, kill, shared_folder))
