"""Saves that are written in the background, for ranks to run. The assertions are in the tests."""

import errno
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from tests.train.cases import Parts, built, weights
from train.config.schema import RunConfig


@contextmanager
def held_writes() -> Iterator[threading.Event]:
    """Threads that write a checkpoint wait for the event that it yields, before their first byte."""
    from train.checkpoint.atomic_folder import HashedFile

    write, released = HashedFile.write, threading.Event()

    def held(self: HashedFile, data: Any) -> int:
        released.wait()
        return write(self, data)

    with patch.object(HashedFile, "write", held):
        try:
            yield released
        finally:
            released.set()


def save_both_ways(config: RunConfig) -> dict[str, Any]:
    """Trains a step, saves while training waits (`blocking`) and in the background (`background`), and trains a second
    step before any byte of the latter is written.

    Returns:
        The sentence of the start, the bytes of the rank's files as expected and as planned, whether the second step
        changed a weight, and whether the memory of a second save is that of the first.
    """
    from train.checkpoint.checkpoint_size import checkpoint_bytes
    from train.checkpoint.saver import Saver

    with built(config) as parts:
        train_step(parts, 0)
        blocking = Saver(config.run_dir / "blocking", parts.world, config.save)
        save(parts, blocking, 1)
        blocking.wait()
        saver = Saver(config.run_dir / "background", parts.world, config.save)
        sentence = saver.write_in_background(parts.engine)
        before = weights(parts)
        with held_writes() as released:
            save(parts, saver, 1)
            first = addresses(saver)
            assert not saver.is_ready_to_commit or not first  # a rank without files is ready
            train_step(parts, 1)
            after = weights(parts)
            released.set()
            saver.wait()
        save(parts, saver, 2)
        second = addresses(saver)
        saver.wait()
        return {
            "sentence": sentence,
            "planned": checkpoint_bytes(parts.engine, parts.world.rank, parts.world.size),
            "changed": any(not np.array_equal(before[name], after[name]) for name in before),
            "reused": first == second,
        }


def train_step(parts: Parts, step: int) -> None:
    """Trains one step as the trainer does."""
    from train.engine.optimizer import set_rates

    set_rates(parts.engine.optimizer.param_groups, 1.0)
    plan = parts.planner.plan(step)
    from train.data.loader import make_batches

    batches = make_batches(
        parts.planner, parts.mixture, parts.processor, range(step, step + 1), parts.config.data, pin_memory=False
    )
    for _ in plan.rows:
        total, *_ = parts.engine(next(batches))
        parts.engine.backward(total / plan.divisor)
    parts.engine.step()


def save(parts: Parts, saver: Any, step: int) -> None:
    """Writes a checkpoint of that step; it is not waited for."""
    from train.checkpoint.resume import make_run_state
    from train.config.compose import to_yaml

    state = make_run_state(step, parts.table.fingerprint, parts.config, parts.world, parts.engine, parts.frozen)
    saver.write(parts.engine, state, to_yaml(parts.config))


def addresses(saver: Any) -> list[int]:
    """The addresses of the copied tensors, in order."""
    copies = saver._copying.copies.values()
    return [tensor.data_ptr() for copy in copies for tensor in copy._tensors if tensor.numel()]


def save_with_full_disk(config: RunConfig, rank: int) -> str:
    """A save whose thread on one rank finds the disk full; returns the error that this rank raises."""
    from train.checkpoint.atomic_folder import HashedFile
    from train.checkpoint.saver import SaveError, Saver

    with built(config) as parts:
        saver = Saver(config.run_dir / "checkpoints", parts.world, config.save)
        saver.write_in_background(parts.engine)
        save(parts, saver, 1)
        saver.wait()
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with patch.object(HashedFile, "finish", side_effect=full) if parts.world.rank == rank else held_writes() as it:
            if parts.world.rank != rank:
                it.set()
            save(parts, saver, 2)
            try:
                saver.wait()
            except SaveError as error:
                return str(error)
    return ""


def save_with_other_deepspeed(config: RunConfig, change: str) -> tuple[str, str]:
    """A run with a DeepSpeed that writes one kind of file itself, or whose engines have another interface.

    Returns:
        The sentence of the start, and the name of the checkpoint engine that saves.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    from train.checkpoint.saver import Saver

    def write_by_itself(self: Any, save_path: str, tag: str) -> None:
        torch.save({}, self._get_zero_ckpt_name(save_path, tag))

    def call_other_method(self: Any, *_: Any, **__: Any) -> None:
        self.checkpoint_engine.write_shards({})

    name, other = {
        "own file": ("_save_zero_checkpoint", write_by_itself),
        "other interface": ("_save_checkpoint", call_other_method),
    }[change]
    with built(config) as parts, patch.object(DeepSpeedEngine, name, other):
        saver = Saver(config.run_dir / "checkpoints", parts.world, config.save)
        sentence = saver.write_in_background(parts.engine)
        names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
        assert names == []
        return sentence, type(parts.engine.checkpoint_engine).__name__


def run_with_slow_write(config: RunConfig, rank: int, seconds: float) -> int:
    """The whole program; one rank's thread sleeps for so long before each piece of its files after the first ones."""
    from train.__main__ import execute
    from train.checkpoint.atomic_folder import HashedFile

    if int(os.environ["RANK"]) != rank:
        return execute(config)
    write, calls = HashedFile.write, [0]

    def slow(self: HashedFile, data: Any) -> int:
        calls[0] += 1
        if calls[0] > 5:
            time.sleep(seconds)
        return write(self, data)

    with patch.object(HashedFile, "write", slow):
        return execute(config)


# ---------------------------------------------------------------------------------- kills during a write

STEP_PHASES = ("data", "forward", "backward", "agree", "update")


@dataclass(frozen=True)
class WriteKill:
    """A kill while a checkpoint is being written.

    Attributes:
        target: a rank, or all at the same time.
        save: number of the save since the start, from 1.
        share: of the pieces of the rank's files that have been written by then.
        phase: that the rank's main thread has begun, in a step after the save.
        number: of that phase since the save, from 0.
    """

    target: int | Literal["all"]
    save: int
    share: float
    phase: str
    number: int

    @property
    def rank(self) -> int:
        """The rank that reaches the point and kills."""
        return self.target if isinstance(self.target, int) else 0


def draw_write_kills(seed: int, count: int) -> list[WriteKill]:
    """Returns kills at random places of a file and of a step."""
    draw = random.Random(seed)
    return [
        WriteKill(
            draw.choice((0, 1, "all")), draw.randint(1, 2), draw.random(), draw.choice(STEP_PHASES), draw.randint(0, 1)
        )
        for _ in range(count)
    ]


def run_with_kill_in_a_write(config: RunConfig, kill: WriteKill | None, folder: str) -> int:
    """Runs the program with a kill; returns the exit code.

    Args:
        config: of the run; it saves at most every second step.
        kill: the thread that writes stops at its place until the main thread is at its own. None: no process is killed,
            and `pieces_RANK` in `folder` gets the number of pieces of a checkpoint.
        folder: for process ids; `killed` in it gets the step that was running and the checkpoint that was written.
    """
    from train.__main__ import execute
    from train.checkpoint.atomic_folder import HashedFile
    from train.supervision.rank_progress import Progress

    rank, shared = int(os.environ["RANK"]), Path(folder)
    (shared / f"pid_{rank}").write_text(str(os.getpid()))
    write, enter, pieces = HashedFile.write, Progress.enter, Counter[str]()
    place = int(kill.share * int((shared / f"pieces_{rank}").read_text())) if kill is not None else -1
    reached, phases, saves = threading.Event(), 0, 0

    def stopping_write(self: HashedFile, data: Any) -> int:
        checkpoint = Path(self.name).parents[1].name
        if kill is not None and len({*pieces, checkpoint}) == kill.save and pieces[checkpoint] == place:
            reached.set()
            time.sleep(3600)
        pieces[checkpoint] += 1
        return write(self, data)

    def watched_enter(self: Progress, phase: str, step: int, micro_step: int = 0) -> None:
        nonlocal phases, saves
        enter(self, phase, step, micro_step)
        saves += phase == "save"
        if kill is None or saves != kill.save or phase != kill.phase:
            return
        phases += 1
        if phases > kill.number:
            assert reached.wait(60)
            (shared / "killed").write_text(json.dumps({"step": step, "written": max(pieces, default="")}))
            if kill.target == "all":
                for path in shared.glob("pid_*"):
                    if path.name != f"pid_{rank}":
                        with suppress(ProcessLookupError):
                            os.kill(int(path.read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    if kill is None or kill.rank == rank:
        patch.object(HashedFile, "write", stopping_write).start()
        patch.object(Progress, "enter", watched_enter).start()
    code = execute(config)
    if kill is None:
        (shared / f"pieces_{rank}").write_text(str(pieces[min(pieces)]))
    return code


# -------------------------------------------------------------------------------------------- comparisons


def contents(folder: Path) -> dict[str, Any]:
    """The content of each of DeepSpeed's files of a checkpoint, by name."""
    return {
        path.relative_to(folder).as_posix(): torch.load(path, weights_only=False)
        for path in sorted(folder.rglob("*.pt"))
    }


def differences(actual: Any, expected: Any, at: str = "") -> list[str]:
    """Where two nested objects differ; tensors are compared bit for bit."""
    if isinstance(expected, torch.Tensor):
        same = (
            type(actual) is type(expected)
            and (actual.dtype, actual.shape, actual.requires_grad)
            == (expected.dtype, expected.shape, expected.requires_grad)
            and torch.equal(*(each.detach().reshape(-1).view(torch.uint8) for each in (actual, expected)))
        )
        return [] if same else [at]
    if type(actual) is not type(expected):
        return [at]
    if isinstance(expected, dict):
        if list(actual) != list(expected):
            return [at]
        return [text for key in expected for text in differences(actual[key], expected[key], f"{at}/{key}")]
    if isinstance(expected, list | tuple):
        if len(actual) != len(expected):
            return [at]
        pairs = enumerate(zip(actual, expected, strict=True))
        return [text for index, pair in pairs for text in differences(*pair, f"{at}/{index}")]
    if hasattr(expected, "__dict__"):
        return differences(vars(actual), vars(expected), at)
    return [] if actual == expected else [at]
