"""Logs a run: metrics.jsonl and answers.jsonl always, and by option the terminal, wandb and TensorBoard.

A run that resumes removes the lines of the steps that will run again, so every step is logged once. Those steps are not
sent to wandb a second time, since wandb keeps what it has received; TensorBoard gets a purge step.
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from train.config.schema import RunConfig
from train.config.wandb_mode import wandb_mode
from train.distributed.launch import Launch
from train.observability.wandb_run import start_wandb
from train.validation.live_answers import Answer

_COLUMNS = (
    ("loss", "train/loss", ".4f"),
    ("lr", "lr", ".1e"),
    ("tokens/s", "perf/tokens_per_s", ",.0f"),
    ("samples/s", "perf/samples_per_s", ".1f"),
    ("MFU", "perf/mfu", ".1%"),
    ("balance", "perf/balance", ".2f"),
    ("GiB", "perf/max_memory_gib", ".1f"),
    ("data wait", "perf/data_wait_s", ".2f"),
)
"""Label, metric and format of each column of a step line; `lr` is the highest learning rate of the parts."""

LEGEND = (
    "step lines: lr is the highest learning rate; MFU is relative to the dense bf16 peak; balance is the mean over the "
    "maximum cost of the ranks; GiB is rank 0's peak memory; data wait is in seconds"
)
"""Explains the columns; logged once at the start of a run."""

_ANSWER_COLUMNS = ("source", "id", "question", "answer", "truth")


def start_logging(launch: Launch, run_dir: Path) -> None:
    """Sends the log lines of every rank to log/rank_NNN.log, and rank 0's warnings to the terminal too."""
    folder = run_dir / "log"
    folder.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(folder / f"rank_{launch.rank:03d}.log")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(to_file)
    if launch.is_main:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(logging.WARNING)
        to_terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_terminal)


class RunLog:
    """Logs the metrics of one run on rank 0; on other ranks it does nothing.

    Args:
        config: of the run.
        is_main: whether this process writes.
        first_step: the step that the run starts or resumes with, from 0.
        num_steps: the step after the last.
    """

    def __init__(self, config: RunConfig, *, is_main: bool, first_step: int, num_steps: int) -> None:
        self._is_main = is_main
        self._every = config.log.every
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not is_main:
            return
        path = config.run_dir / "metrics.jsonl"
        first_unlogged = _drop_lines_from(path, first_step)
        self._file = path.open("a")
        self._answers = config.run_dir / "answers.jsonl"
        _drop_lines_from(self._answers, first_step)
        self._num_steps = num_steps
        self._seconds: list[float] = []
        # A progress bar rewrites its line, which a log file cannot: there only the step lines show the progress.
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=config.stage.name,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
        )
        self._tensorboard = _start_tensorboard(config, first_step)
        self._wandb, self._first_unsent = start_wandb(config, first_unlogged)
        mode = wandb_mode(config.log)
        if mode != config.log.wandb:
            self.info(f"wandb is {mode} because of WANDB_MODE in the environment (log.wandb={config.log.wandb})")
        if self._wandb is not None and self._first_unsent > first_step:
            self.info(f"wandb has steps {first_step} to {self._first_unsent - 1} already; they are not sent again")

    def info(self, text: str) -> None:
        """Writes a message to the terminal and to rank 0's log file."""
        if self._is_main:
            self._bar.write(text, file=sys.stderr)
            logging.getLogger("train").info(text)

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Logs the metrics of one finished step, counted from 0."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{key: _round(value) for key, value in values.items()}}) + "\n")
        self._file.flush()
        shown = {**values, "lr": max((v for k, v in values.items() if k.startswith("lr/")), default=0.0)}
        line = "  ".join(f"{label} {shown[key]:{form}}" for label, key, form in _COLUMNS if key in shown)
        self._seconds = [*self._seconds[-50:], values["perf/step_s"]]
        eta_s = sum(self._seconds) / len(self._seconds) * (self._num_steps - step - 1)
        if step % self._every == 0 or step + 1 == self._num_steps:
            self._bar.write(f"step {step + 1:>5}/{self._num_steps}  {line}  eta {_format_time(eta_s)}", file=sys.stderr)
        self._bar.update(1)
        if self._wandb is not None and step >= self._first_unsent:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)

    def log_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Logs the live answers after a step, counted from 0. Must be called before `log_step` of that step."""
        if self._file is None:
            return
        lines = [
            {"step": step, **{column: getattr(answer, column) for column in _ANSWER_COLUMNS}} for answer in answers
        ]
        with self._answers.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if self._wandb is not None and step >= self._first_unsent:
            import wandb

            table = wandb.Table(columns=["step", *_ANSWER_COLUMNS], data=[list(line.values()) for line in lines])
            self._wandb.log({"answers": table}, step=step)

    def close(self) -> None:
        """Flushes and closes all outputs.

        Raises:
            OSError: the disk is full or fails, unless an earlier error ends the run, which is more specific.
        """
        ends_with_error = sys.exc_info()[0] is not None
        if self._file is not None:
            with suppress(OSError) if ends_with_error else nullcontext():
                self._file.close()
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _format_time(seconds: float) -> str:
    """H:MM:SS, or M:SS below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _round(value: float) -> float | None:
    """Rounds a float to eight significant digits; integers are unchanged, NaN and Inf (not valid JSON) become null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _drop_lines_from(path: Path, first_step: int) -> int:
    """Removes the lines of `first_step` and later steps; returns the first step that the file never had."""
    if not path.exists():
        return first_step
    lines = {line: _parse_step(line) for line in path.read_text().splitlines()}
    partial = path.with_name(path.name + ".partial")  # the file stays intact if this process is killed or the disk full
    partial.write_text("".join(f"{line}\n" for line, step in lines.items() if 0 <= step < first_step))
    partial.replace(path)
    return max([first_step, *(step + 1 for step in lines.values())])


def _parse_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # a line that was cut off when the process was killed


def _start_tensorboard(config: RunConfig, first_step: int) -> Any:
    if not config.log.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first_step)
