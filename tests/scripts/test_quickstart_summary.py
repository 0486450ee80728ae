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
        "num_questions": 320,
        "num_pictures": 320,
        "right_picture": 0.8,
        "other_picture": 0.2,
        "commonest_answer": 0.2,
        "commonest": "A",
        "difference": 0.6,
        "interval": [0.55, 0.65],
        "base_view": 0.3,
        "base_view_difference": 0.5,
        "base_view_interval": [0.45, 0.55],
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_questions": 299}, "299 questions"),
        ({"difference": 0.199}, "+19.9% over another image"),
        ({"base_view_difference": 0.299}, "+29.9% over the base view alone"),
    ],
)
def test_a_model_that_does_not_read_the_tiles_fails(changes: dict[str, Any], words: str) -> None:
    """Too few questions, or too small a difference to either control: each is a fault of its own."""
    (fault,) = _load().find_faults(_accuracy(**changes))
    assert words in fault


def test_a_model_that_reads_the_tiles_passes() -> None:
    """At the margins themselves there is no fault."""
    assert _load().find_faults(_accuracy(num_questions=300, difference=0.2, base_view_difference=0.3)) == []


@pytest.mark.parametrize(("difference", "code"), [(0.6, 0), (0.1, 1)])
def test_the_program_writes_its_summary_either_way(tmp_path: Path, difference: float, code: int) -> None:
    """summary.json is written, with the faults in it, and the exit code follows them. The report's path is printed
    first, and a source at zero has its row; a model that vLLM serves has the command."""
    row = {"train/loss": 2.0, "train/samples": 16.0, "perf/step_s": 0.5}
    for stage in ("align", "finetune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    by_source = {"quickstart_letters": _accuracy(difference=difference), "chartqa": _accuracy(right_picture=0.0)}
    evaluation = {"all": _accuracy(), "by_source": by_source, "generated": []}
    (tmp_path / "finetune" / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "steps.tsv").write_text("Stage 1\t12\tpython\n")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *(["--served"] if code == 0 else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[0] == f"Report: {tmp_path / 'report.html'}"
    (charts,) = [line.split() for line in done.stdout.splitlines() if line.startswith("chartqa")]
    assert charts[1:3] == ["320", "0.0%"]
    assert ("vllm serve" in done.stdout) is (code == 0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] is (code == 0)
    assert summary["seconds"] == {"Stage 1": 12.0}
    assert summary["stages"]["align"]["steps"] == 1
