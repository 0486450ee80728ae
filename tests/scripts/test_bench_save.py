"""Owns the proof that the bench of saving runs and writes what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_save_bench(tmp_path: Path) -> None:
    """Each way of saving has a row, and its number is in the results; nothing is left of the checkpoints."""
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "scripts/bench/save.py", "--millions", "8", "--repetitions", "1"]
    command += ["--folder", str(tmp_path / "disk"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = ("DeepSpeed's own save", "ours: the stall", "ours, waited for", "a step", "a step meanwhile")
    assert [row for row in rows if f"\n{row} " not in done.stdout] == []
    results = json.loads((tmp_path / "save.json").read_text())["results"]
    assert results["num_parameters"] == 2 * 2048**2
    assert results["gib"] > 16 * results["num_parameters"] / 2**30 * 0.99, "weights, their fp32 copy, two moments"
    assert results["named_s"] >= results["stall_s"] > 0
    assert results["waited_s"] > 0
    assert not list((tmp_path / "disk").iterdir())
