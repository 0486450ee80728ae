"""Reads the folder of a run: numbers, configuration, data, starts, end, evaluation. Needs no torch.

What is damaged becomes a sentence in `Run.remarks`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from train.config.schema import ConfigError
from train.observability.suite_results import read_suite_results

_Values = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One stage of one run.

    Attributes:
        path: its folder.
        label: its name among others, name and stage.
        config: config.yaml as plain values; `config_text` is the file's text.
        metrics: the lines of metrics.jsonl, by step.
        data, end, evaluation, plan: data.json, exit.json, evaluation.json, plan.json; empty where there is none.
        starts, left_out, answers: lines of starts.jsonl, non_finite.jsonl, evaluation.answers.jsonl.
        live_answers: lines of answers.jsonl that have a step.
        suites: results tables of `train.evaluate --suite`, of the weights in the export.
        saved: run_state.json of the newest checkpoint; empty where there is none.
        exported: config.json of the export; empty where there is none.
        num_logs: how many ranks have a log.
        remarks: sentences about what could not be read.
    """

    path: Path
    label: str
    config: _Values
    config_text: str
    metrics: list[_Values]
    data: _Values = field(default_factory=dict)
    end: _Values = field(default_factory=dict)
    evaluation: _Values = field(default_factory=dict)
    plan: _Values = field(default_factory=dict)
    starts: list[_Values] = field(default_factory=list)
    left_out: list[_Values] = field(default_factory=list)
    answers: list[_Values] = field(default_factory=list)
    live_answers: list[_Values] = field(default_factory=list)
    suites: list[_Values] = field(default_factory=list)
    saved: _Values = field(default_factory=dict)
    exported: _Values = field(default_factory=dict)
    num_logs: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def stage(self) -> _Values:
        """The stage's part of the configuration."""
        return self.config.get("stage") or {}

    @property
    def last_start(self) -> _Values:
        """The newest line of starts.jsonl; empty where there is none."""
        return self.starts[-1] if self.starts else {}

    @property
    def versions(self) -> dict[str, str]:
        """Of the last start, else of the newest checkpoint."""
        return self.last_start.get("versions") or self.saved.get("versions") or {}

    @property
    def num_ranks(self) -> int | None:
        """Of the last start, else of the newest checkpoint, else as many as have a log."""
        layout = self.saved.get("layout") or {}
        return self.last_start.get("ranks") or layout.get("num_ranks") or self.num_logs or None


def read_run(folder: Path, label: str = "") -> Run:
    """The run in a folder that holds a config.yaml; of a step that was logged twice, the last line counts."""
    remarks: list[str] = []
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    lines = _read_lines(folder / "metrics.jsonl", remarks)
    steps = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    live = _read_lines(folder / "answers.jsonl", remarks)
    checkpoints = sorted(path for path in folder.glob("checkpoints/step_*") if path.name[len("step_") :].isdigit())
    return Run(
        path=folder,
        label=label,
        config=_read_config(text, folder, remarks),
        config_text=text,
        metrics=[steps[step] for step in sorted(steps)],
        data=_read_values(folder / "data.json", remarks),
        end=_read_values(folder / "exit.json", remarks),
        evaluation=_read_values(folder / "evaluation.json", remarks),
        plan=_read_values(folder / "plan.json", remarks),
        starts=_read_lines(folder / "starts.jsonl", remarks),
        left_out=_read_lines(folder / "non_finite.jsonl", remarks),
        answers=_read_lines(folder / "evaluation.answers.jsonl", remarks),
        live_answers=[line for line in live if isinstance(line.get("step"), int)],
        suites=read_suite_results(folder, remarks),
        saved=_read_values(checkpoints[-1] / "run_state.json", remarks) if checkpoints else {},
        exported=_read_values(folder / "export" / "config.json", remarks),
        num_logs=len(list(folder.glob("log/rank_*.log"))),
        remarks=tuple(remarks),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in this order.

    Raises:
        ConfigError: a folder is not a run's, is named twice, or holds no finished step.
    """
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ConfigError(f"{folders[number]} is named twice; name each run once")
    runs = []
    for folder, label in zip(folders, _labels(resolved), strict=True):
        if not (folder / "config.yaml").is_file():
            inside = sorted(
                str(p.parent.relative_to(folder)) for d in ("*", "*/*") for p in folder.glob(d + "/config.yaml")
            )
            hint = f"; inside it there are {', '.join(inside[:8])}" if inside else ""
            what = "is not the folder of a stage: it holds no config.yaml"
            if not folder.is_dir():
                what = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{folder} {what}{hint}; name a folder such as outputs/quickstart/finetune")
        runs.append(read_run(folder, label))
        if not runs[-1].metrics:
            remarks = f" ({'; '.join(runs[-1].remarks)})" if runs[-1].remarks else ""
            raise ConfigError(
                f"{folder} has no finished step: its metrics.jsonl is missing or empty{remarks}; see exit.json and "
                "log/ for how far the run came"
            )
    return runs


def _read_config(text: str, folder: Path, remarks: list[str]) -> _Values:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        values = str(error).splitlines()[0]
    if isinstance(values, dict):
        return values
    remarks.append(f"{folder / 'config.yaml'} cannot be read ({values}); its keys are not compared")
    return {}


def _read_values(path: Path, remarks: list[str]) -> _Values:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        values = error
    if isinstance(values, dict):
        return values
    reason = values if isinstance(values, Exception) else "not an object"
    remarks.append(f"{path.name} is damaged and left out ({reason})")
    return {}


def _read_lines(path: Path, remarks: list[str]) -> list[_Values]:
    """The lines that are JSON objects; the number of the others becomes a remark."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    values, num_damaged = [], 0
    for line in filter(str.strip, text.split("\n")):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            num_damaged += 1
    if num_damaged:
        remarks.append(f"{path.name}: {num_damaged} damaged line{'s' if num_damaged > 1 else ''} left out")
    return values


def _labels(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that make them unique, at least name and stage."""
    for num in range(2, max(2, *(len(folder.parts) for folder in folders)) + 1):
        labels = ["/".join(folder.parts[-num:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels
