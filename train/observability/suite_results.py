"""Reads the results tables that `train.evaluate --suite` writes beside a run's export. Needs no torch.

A file has the columns by name; each has a state (done, submission, failed or skipped), the values, and the published
ones. The report and the model card show it as rows of a table.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUITE_HEAD = ("column", "result", "published", "difference", "questions", "")
_HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_HASHED_BYTES = 2**20


@dataclass(frozen=True)
class SuiteRow:
    """One column of the results table, as texts; empty where there is no value."""

    title: str
    result: str
    published: str
    difference: str
    questions: str
    remark: str

    def cells(self) -> tuple[str, ...]:
        """The texts in the order of SUITE_HEAD."""
        return (self.title, self.result, self.published, self.difference, self.questions, self.remark)


def weights_fingerprint(folder: Path) -> str:
    """Returns a hash of a model's directory, by which results are known to be of these weights.

    It covers names, sizes, and the first and the last MiB of every file of weights, configuration and tokenizer, so
    that a model of any size takes less than a second.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _HASHED_SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            if size > _HASHED_BYTES:
                file.seek(max(_HASHED_BYTES, size - _HASHED_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def read_suite_results(run_dir: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """Returns the results tables of a run, `suite_*.json`, that are of the weights in its export.

    Args:
        remarks: gets a sentence about each file that cannot be read or is of other weights.
    """
    found = []
    files = sorted(run_dir.glob("suite_*.json"))
    fingerprint = weights_fingerprint(run_dir / "export") if files and (run_dir / "export").is_dir() else None
    for path in files:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            remarks.append(f"{path.name} is damaged and left out ({error})")
            continue
        if not isinstance(values, dict) or not isinstance(values.get("columns"), dict):
            remarks.append(f"{path.name} is damaged and left out (it has no columns)")
        elif values.get("weights") != fingerprint:
            remarks.append(f"{path.name} is left out: it is of other weights than those in export/")
        else:
            found.append(values)
    return found


def suite_rows(results: dict[str, Any]) -> list[SuiteRow]:
    """Returns the rows of a results table, in the order of the suite."""
    return [_make_row(column) for column in results["columns"].values()]


def _make_row(column: dict[str, Any]) -> SuiteRow:
    values, published = column.get("values") or [], column.get("published") or []
    difference = [value - reference for value, reference in zip(values, published, strict=False)]
    num = column.get("num_questions")
    return SuiteRow(
        title=str(column.get("title")),
        result=_join(values, ".1f"),
        published=_join(published, "g"),
        difference=_join(difference, "+.1f"),
        questions="" if num is None else f"{num:,}",
        remark="; ".join(filter(None, (_describe_state(column), column.get("note")))),
    )


def _join(values: Sequence[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def _describe_state(column: dict[str, Any]) -> str:
    """Says what limits a result, or why there is none."""
    state = column.get("state")
    if state == "done":
        parts = [f"the first {column['limit']} questions only" if column.get("limit") else ""]
        parts.append(f"judge: {column['judge']}" if column.get("judge") else "")
        parts.append(f"scored by {column['scored_by']}" if column.get("scored_by") else "")
        return "; ".join(filter(None, parts))
    if state == "submission":
        return f"to be scored by {column.get('server')}: {column.get('file')}"
    return f"{state}: {column.get('reason')}"
