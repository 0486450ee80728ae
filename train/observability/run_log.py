"""Where a run's numbers go: metrics.jsonl always, the terminal, wandb and TensorBoard by option; and live answers.

One line a step. Resuming removes the lines of steps that will be run again, so no step stands twice; wandb, which
forgets nothing, is not sent them again; TensorBoard's readers are told from which step on to forget.
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.distributed.world import Launch
from train.validation.live_answers import Answer

_COLUMNS = (
    ("loss", "train/loss", ".4f"),
    ("lr", "lr", ".1e"),
    ("tok/s", "perf/tokens_per_s", ",.0f"),
    ("smp/s", "perf/samples_per_s", ".1f"),
    ("MFU", "perf/mfu", ".1%"),
    ("bal", "perf/balance", ".2f"),
    ("GiB", "perf/max_memory_gib", ".1f"),
    ("wait", "perf/data_wait_s", ".2f"),
)

_SAID = ("source", "id", "question", "answer", "truth")


def start_logging(launch: Launch, run_dir: Path) -> None:
    """Log lines of every rank go to log/rank_NNN.log; warnings of rank 0 to the terminal too."""
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
    """The numbers of one run, on rank 0; elsewhere it does nothing.

    Args:
        config: of the run.
        is_main: whether this process writes.
        first_step, num_steps: where the run goes on, and its length.
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
        first_new = _drop_from(path, first_step)
        self._file = path.open("a")
        self._answers = config.run_dir / "answers.jsonl"
        _drop_from(self._answers, first_step)
        self._num_steps = num_steps
        self._seconds: list[float] = []
        # A bar rewrites its line, which a log file cannot: there the step lines alone tell how far it is.
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
        self._wandb = _start_wandb(config)
        if self._wandb is not None:
            self._first_new = _first_new_to_wandb(config.run_dir, first_new)
            if self._first_new > first_step:
                self.say(f"wandb has steps {first_step} to {self._first_new - 1} already; they are not sent again")

    def say(self, text: str) -> None:
        """A sentence for the person in front of the terminal."""
        if self._is_main:
            self._bar.write(text, file=sys.stderr)
            logging.getLogger("train").info(text)

    def step(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one finished step, counted from 0."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{key: _rounded(value) for key, value in values.items()}}) + "\n")
        self._file.flush()
        shown = {**values, "lr": max((v for k, v in values.items() if k.startswith("lr/")), default=0.0)}
        line = "  ".join(f"{label} {shown[key]:{form}}" for label, key, form in _COLUMNS if key in shown)
        self._seconds = [*self._seconds[-50:], values["perf/step_s"]]
        eta_s = sum(self._seconds) / len(self._seconds) * (self._num_steps - step - 1)
        if step % self._every == 0 or step + 1 == self._num_steps:
            self._bar.write(f"step {step + 1:>5}/{self._num_steps}  {line}  eta {_clock(eta_s)}", file=sys.stderr)
        self._bar.update(1)
        if self._wandb is not None and step >= self._first_new:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """What the model said to its probes after a step, counted from 0; said before the numbers of that step."""
        if self._file is None:
            return
        lines = [{"step": step, **{column: getattr(answer, column) for column in _SAID}} for answer in answers]
        with self._answers.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if self._wandb is not None and step >= self._first_new:
            import wandb

            table = wandb.Table(columns=["step", *_SAID], data=[list(line.values()) for line in lines])
            self._wandb.log({"answers": table}, step=step)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._file is not None:
            self._file.close()
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _rounded(value: float) -> float | None:
    """Counts as they are, else eight digits; null for a NaN or Inf, which JSON does not have."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _drop_from(path: Path, first_step: int) -> int:
    """Drops the lines of steps that will run again; returns the first step that never stood there."""
    if not path.exists():
        return first_step
    lines = {line: _step_of(line) for line in path.read_text().splitlines()}
    partial = path.with_name(path.name + ".partial")  # a kill, or a full disk, leaves the file as it is
    partial.write_text("".join(f"{line}\n" for line, step in lines.items() if 0 <= step < first_step))
    partial.replace(path)
    return max([first_step, *(step + 1 for step in lines.values())])


def _first_new_to_wandb(run_dir: Path, first_new: int) -> int:
    """The first step that wandb was never sent. Kept in a file: lines of a run that was killed twice are long gone."""
    path = run_dir / "wandb" / "sent.json"
    with suppress(OSError, ValueError):
        first_new = max(first_new, int(json.loads(path.read_text())))
    path.write_text(json.dumps(first_new) + "\n")
    return first_new


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # a line cut off by a kill


def _start_tensorboard(config: RunConfig, first_step: int) -> Any:
    if not config.log.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first_step)


def _start_wandb(config: RunConfig) -> Any:
    if config.log.wandb == "off":
        return None
    import wandb

    data = _data(config.run_dir)
    run = wandb.init(
        project=config.log.wandb_project,
        name=f"{config.name}/{config.stage.name}",
        id=f"{config.name}-{config.stage.name}".replace("/", "-"),
        resume="allow",
        mode=config.log.wandb,
        dir=str(config.run_dir),
        config={"yaml": to_yaml(config), "data": data},
    )
    # In the summary, not the history: a start is no step, and wandb takes each step once.
    run.summary["quarantine"] = wandb.Table(
        columns=["source", "left out by", "reason", "samples"], data=_left_out(data)
    )
    return run


def _data(run_dir: Path) -> dict[str, Any]:
    """What data.json says; nothing where there is none."""
    path = run_dir / "data.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _left_out(data: dict[str, Any]) -> list[list[Any]]:
    """Counts by source, by who has left them out, and by reason: both gates of the data."""
    gates = {
        "preparing": {row["source"]: row["rejects"] for row in data.get("mixture", [])},
        "this run": data.get("rejects_by_source", {}),
    }
    return [
        [source, gate, reason, number]
        for gate, sources in gates.items()
        for source, reasons in sources.items()
        for reason, number in reasons.items()
    ]
