"""Owns the proof that the bench of preparing runs, and that it notices memory that grows."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench() -> Iterator[Any]:
    """scripts/bench/prepare.py."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("prepare")
    sys.path.remove(str(BENCH))


def test_rate(bench: Any) -> None:
    """Both sizes, each kind of work; preparing is never faster than reading."""
    if not (bench.ASSETS / "skimage/photos").is_dir() or not (bench.ASSETS / "sklearn").is_dir():
        pytest.skip("no photographs here: python scripts/quickstart/assets.py brings them")
    found = bench.measure_rate(num_pictures=3, rounds=1)
    assert list(found) == ["0.3 MP", "2 MP"]
    for result in found.values():
        rates = {name: row["samples_per_cpu_s"] for name, row in result["rows"].items()}
        assert rates["read"] > rates["decode"] >= rates["prepare, 1 process"]
    assert "2 MP, prepare, 2 processes" in bench.show_rate(found)


@pytest.mark.full
def test_memory(bench: Any) -> None:
    """Each number of records in processes of their own; the table has a row for each."""
    found = bench.measure_memory([1200, 2400])
    assert [row.split()[0] for row in bench.show_memory(found).splitlines()[2:]] == ["1,200", "2,400"]
    assert bench.goals_missed({"memory": found}) == []


def test_growth_is_told(bench: Any) -> None:
    """The goal is missed where a process takes more for more records."""
    rows = {"10": {"program_mib": 200.0, "worker_mib": 90.0}, "1000": {"program_mib": 300.0, "worker_mib": 91.0}}
    assert bench.goals_missed({"memory": rows}) == ["program_mib grew by 100 MiB"]
    assert bench.goals_missed({}) == []
