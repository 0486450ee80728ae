"""A run's folder as its programs left it: numbers, configuration, data, starts, end, evaluation. Needs no torch.

Owns finding and reading the files. What is damaged or missing is told in `Run.remarks`, never passed over in silence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from train.config.schema import ConfigError


@dataclass(frozen=True)
class Run:
    """One stage of one run.

    Attributes:
        path: its folder.
        label: tells it from the others on the page.
        config: config.yaml as plain values; `config_text` as it stands there.
        metrics: the lines of metrics.jsonl, by step.
        data, end, evaluation, plan: data.json, exit.json, evaluation.json, plan.json; empty where there is none.
        starts, left_out, answers: lines of starts.jsonl, non_finite.jsonl, evaluation.answers.jsonl.
        live_answers: lines of answers.jsonl that have a step.
        saved: run_state.json of the newest checkpoint; empty where there is none.
        num_logs: how many ranks have a log.
        remarks: sentences about what could not be read.
    """

    path: Path
    label: str
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    live_answers: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    num_logs: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def stage(self) -> dict[str, Any]:
        """The stage's part of the configuration."""
        return self.config.get("stage") or {}

    @property
    def last_start(self) -> dict[str, Any]:
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


def read_runs(places: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in this order.

    Raises:
        ConfigError: a folder is no run's, is named twice, or holds no finished step.
    """
    found = [place.resolve() for place in places]
    for number, place in enumerate(found):
        if place in found[:number]:
            raise ConfigError(f"{places[number]} is named twice; a run is compared with others")
    return [_read(place, label) for place, label in zip(places, _labels(places), strict=True)]


def _read(place: Path, label: str) -> Run:
    if not (place / "config.yaml").is_file():
        inside = (
            sorted(path.parent.relative_to(place) for path in place.glob("*/config.yaml")) if place.is_dir() else []
        )
        inside += sorted(path.parent.relative_to(place) for path in place.glob("*/*/config.yaml"))
        told = f"; inside it there are {', '.join(map(str, inside[:8]))}" if inside else ""
        what = "is not the folder of a stage: it holds no config.yaml" if place.is_dir() else "is not there"
        raise ConfigError(f"{place} {what}{told}; name a folder such as outputs/quickstart/finetune")
    remarks: list[str] = []
    text = (place / "config.yaml").read_text(encoding="utf-8", errors="replace")
    metrics = _by_step(_read_lines(place / "metrics.jsonl", remarks))
    if not metrics:
        raise ConfigError(
            f"{place} has no finished step yet: its metrics.jsonl is not there or holds none{_told(remarks)}; "
            "exit.json and log/ say how far the run came"
        )
    return Run(
        path=place,
        label=label,
        config=_read_config(text, place, remarks),
        config_text=text,
        metrics=metrics,
        data=_read_values(place / "data.json", remarks),
        end=_read_values(place / "exit.json", remarks),
        evaluation=_read_values(place / "evaluation.json", remarks),
        plan=_read_values(place / "plan.json", remarks),
        starts=_read_lines(place / "starts.jsonl", remarks),
        left_out=_read_lines(place / "non_finite.jsonl", remarks),
        answers=_read_lines(place / "evaluation.answers.jsonl", remarks),
        live_answers=[
            line for line in _read_lines(place / "answers.jsonl", remarks) if isinstance(line.get("step"), int)
        ],
        saved=_newest_state(place / "checkpoints", remarks),
        num_logs=len(list((place / "log").glob("rank_*.log"))),
        remarks=tuple(remarks),
    )


def _read_config(text: str, place: Path, remarks: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        values = str(error).splitlines()[0]
    if isinstance(values, dict):
        return values
    remarks.append(f"{place / 'config.yaml'} cannot be read ({values}); its keys are not compared")
    return {}


def _read_values(path: Path, remarks: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        values = error
    if isinstance(values, dict):
        return values
    remarks.append(f"{path.name} is damaged and left out ({values if isinstance(values, Exception) else 'no object'})")
    return {}


def _read_lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects; how many others there are becomes a remark."""
    if not path.is_file():
        return []
    found, num_damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict):
            found.append(values)
        else:
            num_damaged += 1
    if num_damaged:
        remarks.append(f"{path.name}: {num_damaged} damaged line{'s' if num_damaged > 1 else ''} left out")
    return found


def _by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have a step, in its order; of a step that stands twice the last."""
    steps = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    return [steps[step] for step in sorted(steps)]


def _newest_state(folder: Path, remarks: list[str]) -> dict[str, Any]:
    places = sorted(place for place in folder.glob("step_*") if place.name.removeprefix("step_").isdigit())
    return _read_values(places[-1] / "run_state.json", remarks) if places else {}


def _labels(places: Sequence[Path]) -> list[str]:
    """As few of the last folders of each path as tell all of them apart, at least name and stage."""
    parts = [place.resolve().parts for place in places]
    for num in range(2, max(map(len, parts)) + 1):
        labels = ["/".join(one[-num:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(place) for place in places]


def _told(remarks: Sequence[str]) -> str:
    return f" ({'; '.join(remarks)})" if remarks else ""
