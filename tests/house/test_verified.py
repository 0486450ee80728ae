"""Tests that the "Verified on" table of README.md agrees with the reports, and that the reports are anonymous."""

import json
from pathlib import Path

import pytest

from tests.house.pages import README, ROOT
from train.acceptance.check_report import format_verified_table, list_report_files

FILES = [ROOT / "docs/verified", *(ROOT / f"scripts/bench/results/gpu_{name}.json" for name in ("h100", "h200"))]


def test_table_is_made_from_the_reports() -> None:
    """The table has the lines of the reports, in order."""
    assert f"\n\n{format_verified_table(list_report_files(FILES))}\n\n" in README.read_text()


@pytest.mark.parametrize("file", list_report_files(FILES[:1]), ids=lambda file: file.name)
def test_reports_name_no_machine(file: Path) -> None:
    """Hosts are numbered, paths are removed, and the tested commit is given."""
    report = json.loads(file.read_text())
    assert [node["host"] for node in report["nodes"]] == [f"host{number}" for number in range(len(report["nodes"]))]
    assert "--anonymous" in report["arguments"]
    assert "/tmp" not in file.read_text()
    assert "/home" not in file.read_text()
    assert report["versions"]["code"] not in ("", "unknown")
