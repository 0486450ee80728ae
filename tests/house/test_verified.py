"""Owns the proof that the page's "Verified on" table is what the reports say, and that they name no machine."""

import json
from pathlib import Path

import pytest

from tests.house.readme import README, ROOT
from train.accept.outcome import report_files, verified_table

FILES = [ROOT / "docs/verified", *(ROOT / f"scripts/bench/results/gpu_{name}.json" for name in ("h100", "h200"))]


def test_table_is_made_from_the_reports() -> None:
    """Every line, and in this order."""
    assert f"\n\n{verified_table(report_files(FILES))}\n\n" in README.read_text()


@pytest.mark.parametrize("file", report_files(FILES[:1]), ids=lambda file: file.name)
def test_reports_name_no_machine(file: Path) -> None:
    """Hosts are numbered, and folders are left out; the commit that was tested is named."""
    report = json.loads(file.read_text())
    assert [node["host"] for node in report["nodes"]] == [f"host{number}" for number in range(len(report["nodes"]))]
    assert "--anonymous" in report["arguments"]
    assert "/tmp" not in file.read_text()
    assert "/home" not in file.read_text()
    assert report["versions"]["code"] not in ("", "unknown")
