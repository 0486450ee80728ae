"""What a check found, the report file, the table in the terminal, the verdict, and the "Verified on" table.

Standard library only. The report is the one source of the "Verified on" table: no number of it is typed.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One check, or one measurement: then it has passed where the number could be taken.

    Attributes:
        name: of the phase.
        compared: what with what, in one sentence.
        status: passed, failed, or not run.
        summary: the main numbers, for the table.
        numbers: plain values.
        tolerances: what each compared number may be at most.
        why: the reason for the tolerances.
        reason: why it failed or did not run, with the end of the log.
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
        """For the terminal."""
        text = self.summary if self.status == "passed" else _first_line(self.reason)
        return f"{self.status:<8} {self.name:<18} {self.seconds:6.1f} s   {text}"


@dataclass(frozen=True)
class Finding:
    """What a phase returns; `problem` says why the check has failed, and is empty where it has passed. See `Check`."""

    summary: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    why: str = ""
    problem: str = ""


def verdict(checks: Sequence[Check], devices: Mapping[str, int], num_nodes: int, *, quick: bool) -> str:
    """The last line of the program.

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


def passed(checks: Sequence[Check]) -> bool:
    """Whether there are checks, and all have run and passed."""
    return bool(checks) and all(check.status == "passed" for check in checks)


def write_report(path: Path, checks: Sequence[Check], about: Mapping[str, Any], hidden: Mapping[str, str]) -> None:
    """Writes the report.

    Args:
        about: the verdict, the ranks, devices, versions and so on.
        hidden: texts that are replaced wherever they occur, the longest first (paths, host names).
    """
    content = {"accept": FORMAT, **about, "passed": passed(checks), "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(replaced(content, hidden), indent=1) + "\n", encoding="utf-8")


def replaced(value: Any, hidden: Mapping[str, str]) -> Any:
    """A plain value in which some words and paths are replaced in every text, dictionary keys included."""
    if isinstance(value, str):
        for text in sorted(hidden, key=len, reverse=True):
            # Whole ones only: a host may be called "vm".
            value = hidden[text].join(re.split(rf"(?<![\w-]){re.escape(text)}(?![\w-])", value))
        return value
    if isinstance(value, Mapping):
        return {replaced(key, hidden): replaced(item, hidden) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(item, hidden) for item in value]
    return value


# ------------------------------------------------------------------------------------- the "Verified on" table


def report_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the JSON files of folders, sorted by name."""
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def verified_table(files: Sequence[Path]) -> str:
    """A Markdown table, one row for each report or bench result of one GPU.

    Raises:
        ValueError: a file that is neither; the message names it.
    """
    header = ("verified on", "date", "software", "checks", "what was covered", "report")
    rows = [_row(file) for file in files]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def _row(file: Path) -> tuple[str, ...]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("accept") == FORMAT:
            return _report_row(report, file.name)
        if report.get("bench") and report["machine"].get("device"):
            return _bench_row(report, file.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of train.accept: {type(error).__name__}: {error}") from error
    raise ValueError(f"{file} is no report of train.accept (format {FORMAT}) and no bench result of a GPU")


def _report_row(report: Mapping[str, Any], name: str) -> tuple[str, ...]:
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


def _bench_row(result: Mapping[str, Any], name: str) -> tuple[str, ...]:
    competitors = "; ".join(result["results"]["competitors"])
    machine = result["machine"]
    covered = f"step bench on one GPU ({competitors}); nothing between ranks"
    software = f"torch {machine['torch']}, deepspeed {machine['deepspeed']}"
    return f"1 x {machine['device']}", result["when"][:10], software, "no checks", covered, name


def _first_line(text: str) -> str:
    return text.splitlines()[0][:160] if text else ""
