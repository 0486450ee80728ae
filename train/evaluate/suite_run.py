"""Measures the columns of a results table with lmms-eval, one after the other, and writes one JSON file.

A column that is finished is not measured again; one that failed is. `scripts/lmms_eval.sh` runs each of them in an
environment of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from train.config.schema import ConfigError
from train.evaluate.chat_server import KEY_VARIABLE
from train.evaluate.suite_columns import Column, Suite
from train.evaluate.suite_requirements import JUDGE_KEY, Requirements
from train.observability.suite_results import SUITE_HEAD, suite_rows, weights_fingerprint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "lmms_eval.sh"
_SECRETS = (JUDGE_KEY, KEY_VARIABLE, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values are removed from logs."""
_FINISHED = ("done", "submission")


class ColumnError(RuntimeError):
    """A column could not be measured."""


@dataclass(frozen=True)
class SuiteRun:
    """A model and the table that is measured on it.

    Attributes:
        export: the model's directory in the Hugging Face layout.
        out: the JSON file; logs, answers and submissions of a column are in a folder of its name beside it.
        published: the model to compare with, of `suite.published`; empty for none.
        limit: only the first questions of each column, as many; None for all.
    """

    suite: Suite
    export: Path
    out: Path
    published: str
    limit: int | None

    def open_results(self) -> dict[str, Any]:
        """Returns the results so far, with the columns in the order of the table.

        Raises:
            ConfigError: the file is damaged, or of other weights or another version.
        """
        header = {
            "suite": self.suite.name,
            "title": self.suite.title,
            "model": str(self.export),
            "weights": weights_fingerprint(self.export),
            "lmms_eval": self.suite.lmms_eval,
            "compared_with": self.suite.published[self.published].title if self.published else None,
            "source": self.suite.source,
        }
        columns = self._read_columns(header) if self.out.exists() else {}
        for name, values in columns.items():
            values["published"] = self._published(name)
        return {**header, "columns": columns}

    def _read_columns(self, header: Mapping[str, Any]) -> dict[str, Any]:
        try:
            values = json.loads(self.out.read_text(encoding="utf-8"))
            columns = dict(values["columns"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.out} is not a results table ({error}); name another file with --out") from error
        for key, what in (("suite", "table"), ("weights", "weights"), ("lmms_eval", "version of lmms-eval")):
            if values.get(key) != header[key]:
                raise ConfigError(
                    f"{self.out} has results of another {what} ({values.get(key)}, now {header[key]}); delete it, or "
                    "name another file with --out"
                )
        return columns

    def is_finished(self, values: Mapping[str, Any] | None) -> bool:
        """Whether a column has a result on all questions, or on as many as are asked now."""
        if values is None or values.get("state") not in _FINISHED:
            return False
        return values.get("limit") in (None, self.limit)

    def measure(self, name: str, column: Column, requirements: Requirements) -> dict[str, Any]:
        """Measures a column and returns its entry of the results, with the reason if it failed."""
        started = time.monotonic()
        entry = self.describe(name, column) | {"limit": self.limit, **requirements.describe_data(column)}
        judge = requirements.judge() if column.needs == "judge" else None
        if judge is not None:
            entry["judge"] = judge.model
        try:
            folder = self._run_task(name, column, judge.variables(column) if judge else {})
            entry |= self._read_result(folder, column)
        except ColumnError as error:
            entry |= {"state": "failed", "reason": str(error)}
        return entry | {"seconds": round(time.monotonic() - started)}

    def describe(self, name: str, column: Column) -> dict[str, Any]:
        """Returns the entry of a column without a result."""
        entry = {"title": column.title, "task": column.task, "metrics": list(column.metrics)}
        return entry | {"published": self._published(name), "note": column.note}

    def save(self, results: dict[str, Any]) -> None:
        """Writes the file; it is complete at any time."""
        columns = results["columns"]
        results["columns"] = {name: columns[name] for name in self.suite.columns if name in columns}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.out)

    def folder(self, name: str) -> Path:
        """Where the log, the answers and the submission of a column are."""
        return self.out.with_suffix("") / name

    def _published(self, name: str) -> list[float]:
        model = self.suite.published.get(self.published)
        return list(model.values.get(name, ())) if model else []

    def _run_task(self, name: str, column: Column, variables: Mapping[str, str]) -> Path:
        folder = self.folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [str(SCRIPT), str(self.export), "--tasks", column.task, "--output_path", str(folder.resolve())]
        if self.limit is not None:
            command += ["--limit", str(self.limit)]
        code, text = _run_logged(command, {**os.environ, **variables}, folder / "log.txt")
        if code != 0:
            raise ColumnError(f"{_last_error(text)}; see {folder / 'log.txt'}")
        num_failures = text.count(column.judge_failure) if column.judge_failure else 0
        if num_failures:
            raise ColumnError(
                f"the judge gave no answer {num_failures} times, and lmms-eval counts such answers as wrong or draws "
                f"them; see {folder / 'log.txt'}"
            )
        return folder

    def _read_result(self, folder: Path, column: Column) -> dict[str, Any]:
        (path,) = sorted(folder.rglob("*_results.json"))
        results = json.loads(path.read_text(encoding="utf-8"))
        num = results["n-samples"][column.task]["effective"]
        if column.needs == "submission":
            files = sorted((folder / "submissions").glob("*")) or sorted(folder.rglob("submissions/*"))
            if not files:
                raise ColumnError(f"the task wrote no file for {column.server}; see {folder / 'log.txt'}")
            return {"state": "submission", "file": str(files[0]), "server": column.server, "num_questions": num}
        scores = results["results"][column.task]
        values = [scores.get(f"{metric},none") for metric in column.metrics]
        if not all(isinstance(value, (int, float)) for value in values):
            raise ColumnError(f"the task gave no number for {', '.join(column.metrics)}: {values}; see {path}")
        return {"state": "done", "values": [value * column.scale for value in values], "num_questions": num}


def run_suite(run: SuiteRun, columns: Mapping[str, Column], named: frozenset[str]) -> tuple[dict[str, Any], bool]:
    """Measures the columns that can be, after it has printed which those are.

    Args:
        columns: to measure.
        named: those that the user has named.

    Returns:
        The results, and whether a column failed or none has a result.

    Raises:
        ConfigError: results of other weights are in the file, or this is an installation without scripts/.
    """
    if not SCRIPT.is_file():
        raise ConfigError(f"--suite needs a checkout of this project: {SCRIPT} makes the environment of lmms-eval")
    results = run.open_results()
    requirements = Requirements(named)
    finished = [name for name in columns if run.is_finished(results["columns"].get(name))]
    refusals = {
        name: requirements.find_refusal(name, column) for name, column in columns.items() if name not in finished
    }
    _print_plan(run, columns, refusals, is_offline=requirements.is_offline)
    for name, reason in refusals.items():
        if reason and results["columns"].get(name, {}).get("state") not in _FINISHED:
            results["columns"][name] = run.describe(name, columns[name]) | {"state": "skipped", "reason": reason}
    run.save(results)
    for name in (name for name, reason in refusals.items() if not reason):
        print(f"{name}: measured now; log in {run.folder(name) / 'log.txt'}", flush=True)
        entry = run.measure(name, columns[name], requirements)
        results["columns"][name] = entry
        run.save(results)
        if entry["state"] == "failed":
            print(f"{name}: failed: {entry['reason']}", file=sys.stderr, flush=True)
    states = [results["columns"][name]["state"] for name in columns]
    return results, "failed" in states or not any(state in _FINISHED for state in states)


def enter_scores(run: SuiteRun, scores: Mapping[str, float]) -> dict[str, Any]:
    """Enters the values that servers gave for submitted files, and returns the results.

    Args:
        scores: by column, in the unit of the published values.

    Raises:
        ConfigError: no file of a column was written, or it needs no server.
    """
    results = run.open_results()
    for name, value in scores.items():
        entry = results["columns"].get(name)
        if entry is None or not (entry["state"] == "submission" or "scored_by" in entry):
            raise ConfigError(
                f"--score {name}={value:g}: {run.out} has no file of this column for a server; write it with "
                f"--columns {name}, and enter the value that the server gives for it"
            )
        entry |= {"state": "done", "values": [value], "scored_by": run.suite.columns[name].server}
    run.save(results)
    return results


def format_suite(results: dict[str, Any]) -> str:
    """Returns the results as a table for the terminal."""
    rows = [row.cells() for row in suite_rows(results)]
    align = ("left", "right", "right", "right", "right", "left")
    return tabulate(rows, SUITE_HEAD, "plain", disable_numparse=True, colalign=align)


def _print_plan(run: SuiteRun, columns: Mapping[str, Column], refusals: Mapping[str, str], *, is_offline: bool) -> None:
    compared = run.suite.published[run.published].title if run.published else "no published model (see --published)"
    print(f"{run.suite.title} on {run.export} with lmms-eval {run.suite.lmms_eval}, compared with {compared}")
    if is_offline:
        print("HF_HUB_OFFLINE is set: data sets are read from the hub's cache; terms and revisions are not checked")
    rows = []
    for name, column in columns.items():
        state = "finished, not measured again" if name not in refusals else refusals[name] or "to be measured"
        rows.append((name, column.task, f"skipped: {state}" if refusals.get(name) else state))
    print(tabulate(rows, ("column", "task", ""), "plain", disable_numparse=True), flush=True)


def _run_logged(command: list[str], environment: Mapping[str, str], log: Path) -> tuple[int, str]:
    """Runs a program with its output in a file, without the values of secrets; returns its exit code and the output."""
    secrets = [value for name in _SECRETS if (value := environment.get(name))]
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a signal has to reach the script's children too
    )
    assert process.stdout is not None
    lines = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with log.open("w", encoding="utf-8") as file:
            for raw in process.stdout:
                line = raw.decode("utf-8", "replace")
                for secret in secrets:
                    line = line.replace(secret, "***")
                lines.append(line)
                file.write(line)
                file.flush()
        return process.wait(), "".join(lines)
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_error(text: str) -> str:
    """The last line of an output that names an error, else the last line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in re.split(r"[\r\n]", text)]
    lines = [line for line in lines if line]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1]
