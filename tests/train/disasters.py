"""The whole program in forked ranks, with faults.

These functions run the same command repeatedly, inject faults, and check the run folder; `moments.py` selects the
moments, and `faults.py` has the faults of single steps. The assertions are in the tests.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.moments import ACTS, OF_EVERY_RANK, at_act, at_phase, at_sample, later, watch_acts
from train.config.schema import RunConfig

# ---------------------------------------------------------------------------------------------------- kills


@dataclass(frozen=True)
class Blow:
    """When a process is killed, and with whom.

    Attributes:
        rank: that is struck; None: all of them, at the same moment.
        act: before which of `ACTS`; "start": in the start of the process; "step": in a step.
        number: how often it has done so before, this time included; of steps since its start.
        seconds: after the start, or after the step was begun.
    """

    rank: int | None
    act: str
    number: int = 1
    seconds: float = 0.0


def blows(seed: int, step_s: float, start_s: float) -> list[Blow]:
    """Returns twenty moments: two starts, six steps, and every file operation of a save, some twice; half affect one
    rank, half all."""
    draw = random.Random(seed)
    acts = [*ACTS, *draw.sample(ACTS, 2), *["step"] * 6, *["start"] * 2]
    draw.shuffle(acts)
    actual = []
    for act in acts:
        ranks = (None, None, 0, 1) if act in (*OF_EVERY_RANK, "step") else (None, None if act == "start" else 0)
        seconds = draw.uniform(0.0, start_s if act == "start" else step_s)
        actual.append(Blow(draw.choice(ranks), act, draw.randint(1, 4 if act in ("rename", "sync") else 2), seconds))
    return actual


def run_struck(config: RunConfig, blow: Blow | None, folder: str) -> int:
    """The program from its checked configuration on, struck by `blow`; returns the exit code.

    Args:
        folder: for the ranks' process ids. Without a blow, `measured.json` there says how many seconds the start took,
            and which acts the first rank has seen.
    """
    from train.__main__ import execute

    rank, places, checkpoints = int(os.environ["RANK"]), Path(folder), config.run_dir / "checkpoints"
    (places / f"pid_{rank}").write_text(str(os.getpid()))

    def strike() -> None:
        if blow is None or blow.rank is None:
            for path in places.glob("pid_*"):
                if path.name != f"pid_{rank}":
                    with suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    started, seen, took = time.monotonic(), Counter[str](), [0.0]
    if blow is None:
        at_phase("data", 0, lambda: took.append(time.monotonic() - started))
        watch_acts(checkpoints, lambda act: seen.update([act]))
    elif rank == (blow.rank or 0):
        if blow.act == "start":
            later(blow.seconds, strike)
        elif blow.act == "step":
            at_phase("agree", blow.number, lambda: later(blow.seconds, strike))
        else:
            at_act(checkpoints, blow.act, blow.number, strike)
    code = execute(config)
    if rank == 0 and blow is None:
        (places / "measured.json").write_text(json.dumps({"start_s": took[-1], "acts": seen}))
    return code


# --------------------------------------------------------------------------------------------- other trouble


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
    place, away, read = Path(config.data.store_root) / store, Path(config.data.store_root) / "away", os.pread

    def vanish() -> None:
        place.rename(away)
        if back_after_s is not None:
            later(back_after_s, lambda: away.rename(place))

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


# ------------------------------------------------------------------------------------------ what must be there


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


def told(config: RunConfig) -> dict[str, Any]:
    """Returns the content of exit.json."""
    values: dict[str, Any] = json.loads((config.run_dir / "exit.json").read_text())
    return values
