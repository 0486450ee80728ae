"""The benchmark of `input.py stores` runs, and reports memory that grows with the number of records."""

from collections.abc import Callable
from typing import Any

import pytest

Bench = Callable[[str], Any]


@pytest.fixture
def stores(bench: Bench) -> Any:
    """The module behind `input.py stores`."""
    return bench("input_path.stores")


def test_rate(bench: Bench, stores: Any) -> None:
    """Both sizes, each kind of work; preparing is never faster than reading."""
    assets = bench("input_path.real_images").ASSETS
    if not (assets / "skimage/photos").is_dir() or not (assets / "sklearn").is_dir():
        pytest.skip("no photographs here; fetch them: python scripts/quickstart/assets.py")
    results = stores.measure_rate(num_images=3, rounds=1)
    assert list(results) == ["0.3 MP", "2 MP"]
    for result in results.values():
        rates = {name: row["samples_per_cpu_s"] for name, row in result["rows"].items()}
        assert rates["read"] > rates["decode"] >= rates["prepare, 1 process"]
    assert "2 MP, prepare, 2 processes" in stores.rate_table(results)


@pytest.mark.full
def test_memory(stores: Any) -> None:
    """Each number of records in processes of its own; the table has a row for each."""
    results = stores.measure_memory([1200, 2400])
    assert [row.split()[0] for row in stores.memory_table(results).splitlines()[2:]] == ["1,200", "2,400"]
    assert stores.missed_goals({"memory": results}) == []


def test_growth_misses_the_goal(stores: Any) -> None:
    """The goal is missed where a process takes more for more records."""
    rows = {"10": {"program_mib": 200.0, "worker_mib": 90.0}, "1000": {"program_mib": 300.0, "worker_mib": 91.0}}
    assert stores.missed_goals({"memory": rows}) == ["program_mib grew by 100 MiB"]
    assert stores.missed_goals({}) == []
