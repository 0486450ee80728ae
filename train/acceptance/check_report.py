"""The results of checks, the report file, the verdict, and the "Verified on" table, which is made from reports.

This module imports the standard library only.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

FORMAT = 1
Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """The report of one check or measurement. A measurement has passed if its numbers could be measured.

    Attributes:
        name: of the phase.
        compared: sentence that says what is compared or measured.
        status: passed, failed, or not run.
        seconds: duration.
        summary: the main numbers as text.
        numbers: all numbers as plain values.
        tolerances: the largest accepted value of each compared number.
        why: reason for the tolerances.
        reason: why it failed or was not run, with the end of the log.
    """

    name: str
    compared: str
    status: Status
    seconds: float = 0.0
    summary: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    why: str = ""
    reason: str = ""

    @property
    def line(self) -> str:
        """The check as one line for the terminal."""
        text = self.summary if self.status == "passed" else _get_first_line(self.reason)
        return f"{self.status:<8} {self.name:<18} {self.seconds:6.1f} s   {text}"


@dataclass(frozen=True)
class PhaseResult:
    """The result of a phase; see `Check`. `problem` says why the check has failed; empty if it has passed."""

    summary: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    why: str = ""
    problem: str = ""


def format_verdict(checks: Sequence[Check], devices: Mapping[str, int], num_nodes: int, *, quick: bool) -> str:
    """Returns the last line of the program's output.

    Args:
        devices: number of ranks by device name.
    """
    num_ranks = sum(devices.values())
    per_node = f"{num_nodes} x " if num_nodes > 1 else ""
    names = ", ".join(
        f"{per_node}{count // num_nodes if num_nodes > 1 and len(devices) == 1 else count} {name}"
        for name, count in devices.items()
    )
    where = f"{names} ({num_ranks} rank{'s' * (num_ranks != 1)}{', quick' * quick})"
    failed = [check.name for check in checks if check.status == "failed"]
    missing = [check.name for check in checks if check.status == "not run"]
    if failed:
        return f"accept: FAILED: {len(failed)} of {len(checks)} checks ({', '.join(failed)}) on {where}"
    if missing or not checks:
        return f"accept: INCOMPLETE: {len(missing)} of {len(checks)} checks not run ({', '.join(missing)}) on {where}"
    return f"accept: PASSED on {where}, {len(checks)} checks"


def has_passed(checks: Sequence[Check]) -> bool:
    """Whether there are checks and all of them have passed."""
    return bool(checks) and all(check.status == "passed" for check in checks)


def write_report(
    path: Path, checks: Sequence[Check], metadata: Mapping[str, Any], replacements: Mapping[str, str]
) -> None:
    """Writes the report.

    Args:
        metadata: verdict, ranks, devices, versions and the like.
        replacements: texts to replace everywhere (paths, host names); the longest are replaced first.
    """
    content = {
        "accept": FORMAT,
        **metadata,
        "passed": has_passed(checks),
        "checks": [asdict(check) for check in checks],
    }
    path.write_text(json.dumps(replace_texts(content, replacements), indent=1) + "\n", encoding="utf-8")


def replace_texts(value: Any, replacements: Mapping[str, str]) -> Any:
    """Returns a plain value with texts replaced in all strings, dictionary keys included."""
    if isinstance(value, str):
        for text in sorted(replacements, key=len, reverse=True):
            # Not within words: a host may be called "vm".
            value = replacements[text].join(re.split(rf"(?<![\w-]){re.escape(text)}(?![\w-])", value))
        return value
    if isinstance(value, Mapping):
        return {replace_texts(key, replacements): replace_texts(item, replacements) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_texts(item, replacements) for item in value]
    return value


# ------------------------------------------------------------------------------------- the "Verified on" table


def list_report_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the given files, and the JSON files of the given folders sorted by name.

    Raises:
        ValueError: there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"there are no reports (*.json) in {', '.join(map(str, paths))}")
    return files


def format_verified_table(files: Sequence[Path]) -> str:
    """Returns a Markdown table with one row for each report or single-GPU bench result.

    Raises:
        ValueError: a file is neither; the message names it.
    """
    header = ("verified on", "date", "software", "checks", "what was covered", "report")
    rows = [_make_row(file) for file in files]
    return tabulate(rows, header, "github", disable_numparse=True)


def _make_row(file: Path) -> tuple[str, ...]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("accept") == FORMAT:
            return _make_report_row(report, file.name)
        if report.get("bench") and report["machine"].get("device"):
            return _make_bench_row(report, file.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a report of train.accept: {type(error).__name__}: {error}") from error
    raise ValueError(f"{file} is neither a report of train.accept (format {FORMAT}) nor a bench result of a GPU")


def _make_report_row(report: Mapping[str, Any], name: str) -> tuple[str, ...]:
    counts = Counter(check["status"] for check in report["checks"])
    outcome = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "not run") if counts[status])
    num_nodes = len(report["nodes"])
    devices = ", ".join(f"{count} x {device}" for device, count in report["devices"].items())
    where = f"{devices}, {num_nodes} node{'s' * (num_nodes != 1)}, {report['launcher']}"
    covered = ", ".join(check["name"] for check in report["checks"] if check["status"] == "passed")
    if report["ranks"] == 1:
        covered += " (one rank: nothing between ranks)"
    versions = report["versions"]
    software = f"torch {versions['torch']}, deepspeed {versions['deepspeed']}, commit {versions['code']}"
    return where, report["when"][:10], software, outcome, covered, name


def _make_bench_row(result: Mapping[str, Any], name: str) -> tuple[str, ...]:
    competitors = "; ".join(result["results"]["competitors"])
    machine = result["machine"]
    covered = f"step bench on one GPU ({competitors}); nothing between ranks"
    software = f"torch {machine['torch']}, deepspeed {machine['deepspeed']}"
    return f"1 x {machine['device']}", result["when"][:10], software, "no checks", covered, name


def _get_first_line(text: str) -> str:
    return text.splitlines()[0][:160] if text else ""
