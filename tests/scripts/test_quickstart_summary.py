"""The quickstart's check can fail, and says why."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart" / "summary.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_summary", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _accuracy(**changes: Any) -> dict[str, Any]:
    good = {
        "num_questions": 600,
        "num_pictures": 300,
        "right_picture": 0.6,
        "other_picture": 0.3,
        "commonest_answer": 0.2,
        "commonest": "no",
        "difference": 0.3,
        "interval": [0.25, 0.35],
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_questions": 499}, "499 questions"),
        ({"difference": 0.149, "right_picture": 0.449}, "+14.9%"),
        ({"commonest_answer": 0.6}, "not better than always answering 'no'"),
    ],
)
def test_a_model_that_does_not_look_fails(changes: dict[str, Any], words: str) -> None:
    """Too few questions, too small a difference, or a constant answer as good: each is a fault of its own."""
    (fault,) = _load().find_faults(_accuracy(**changes))
    assert words in fault


def test_a_model_that_looks_passes() -> None:
    """At the margins themselves there is no fault."""
    accuracy = _accuracy(num_questions=500, difference=0.15, right_picture=0.45, commonest_answer=0.44)
    assert _load().find_faults(accuracy) == []


@pytest.mark.parametrize(("difference", "code"), [(0.3, 0), (0.1, 1)])
def test_the_program_writes_its_summary_either_way(tmp_path: Path, difference: float, code: int) -> None:
    """summary.json is written, with the faults in it, and the exit code follows them."""
    row = {"train/loss": 2.0, "train/samples": 16.0, "perf/step_s": 0.5}
    for stage in ("align", "finetune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    evaluation = {"all": _accuracy(difference=difference), "by_source": {}, "generated": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "steps.tsv").write_text("Stage 1\t12\tpython\n")
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] is (code == 0)
    assert summary["seconds"] == {"Stage 1": 12.0}
    assert summary["stages"]["align"]["steps"] == 1
