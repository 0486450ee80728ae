"""One rank of a run of save.py: this project's program, with clocks around its saves.

python -m saving.one_run RUN.json
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from training_step.job import Job
from training_step.materials import run_config

from train.__main__ import execute
from train.config.schema import SaveConfig
from train.distributed.launch import read_launch


@dataclass(frozen=True)
class SavingRun:
    """What is run.

    Attributes:
        job: of the materials; its folder holds them.
        name: of the run.
        every: steps between saves.
        background: False: every save stalls training until DeepSpeed has written it.
        result: path of the `SaveTimes`, as JSON.
    """

    job: Job
    name: str
    every: int
    background: bool
    result: str


@dataclass
class SaveTimes:
    """The measurements of rank 0; one value for each save of the run, in seconds.

    Attributes:
        stall_s: training waited for the save, an earlier one included.
        wait_s: of these, for an earlier save to be written.
        copy_s: of these, for the copies to host memory.
        written_s: from the call to the end of the rank's own files: written, hashed and synced.
        step_s: of each step, without saves.
        save_bytes: size of a checkpoint.
        sentence: of the start.
    """

    stall_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)
    written_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    save_bytes: int = 0
    sentence: str = ""


def main(run: SavingRun) -> int:
    """Runs it and writes the times."""
    from train.checkpoint.background_copy import CopyingEngine
    from train.checkpoint.saver import Saver

    times, copied, called = SaveTimes(), [0.0], [0.0]
    write, wait, enable, write_files = Saver.write, Saver.wait, Saver.write_in_background, Saver._write_files
    copy = CopyingEngine.save

    def timed_write(saver: Saver, *args: Any) -> float:
        copied[0], called[0] = 0.0, time.monotonic()
        seconds = write(saver, *args)
        times.stall_s.append(seconds)
        times.copy_s.append(copied[0])
        return seconds

    def timed_wait(saver: Saver) -> None:
        _timed(times.wait_s, lambda: wait(saver))

    def timed_copy(engine: CopyingEngine, *args: Any) -> None:
        started = time.monotonic()
        copy(engine, *args)
        copied[0] += time.monotonic() - started

    def timed_files(saver: Saver, partial: Path) -> None:
        started = called[0]
        write_files(saver, partial)
        times.written_s.append(time.monotonic() - started)

    def chosen(saver: Saver, engine: Any) -> str:
        times.sentence = enable(saver, engine) if run.background else "each save stalls training, as asked"
        return times.sentence

    config = run_config(Path(run.job.folder), run.job)
    config = replace(config, name=run.name, save=SaveConfig(every=run.every, keep=1))
    with (
        patch.object(Saver, "write", timed_write),
        patch.object(Saver, "wait", timed_wait),
        patch.object(Saver, "write_in_background", chosen),
        patch.object(Saver, "_write_files", timed_files),
        patch.object(CopyingEngine, "save", lambda engine, state_dict, path: timed_copy(engine, state_dict, path)),
    ):
        code = execute(config)
    if read_launch().is_main and code == 0:
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        times.step_s = [line["perf/step_s"] for line in lines]
        files = [path for path in (config.run_dir / "checkpoints").rglob("*") if path.is_file()]
        times.save_bytes = sum(path.stat().st_size for path in files)
        Path(run.result).write_text(json.dumps(asdict(times)))
    return code


def _timed(seconds: list[float], action: Callable[[], None]) -> None:
    started = time.monotonic()
    action()
    seconds.append(time.monotonic() - started)


if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(main(SavingRun(**values | {"job": Job(**values["job"])})))
