"""The benchmarks of `input.py` run: `stores` reports memory that grows, `archives` stores that differ."""

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
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


@pytest.mark.full
def test_archives(bench: Bench, tmp_path: Path) -> None:
    """The forms give one store; a tar.gz needs a copy."""
    module = bench("input_path.archives")
    results = module.measure(60, 16, ["files", "tar.gz"], tmp_path)
    assert results["files"]["fingerprint"] == results["tar.gz"]["fingerprint"]
    assert results["files"]["cache_mib"] == 0 < results["tar.gz"]["cache_mib"]
    assert [row.split()[0] for row in module.results_table(results).splitlines()[2:]] == ["files", "tar.gz"]


def test_raw_folders_of_the_forms(bench: Bench, tmp_path: Path) -> None:
    """Each form has the same images by the same names, and records in one order."""
    module = bench("input_path.archives")
    for form in module.FORMS:
        module.write_raw(tmp_path / form, form, 5, 16)
    files = tmp_path / "files" / "raw" / "bench"
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*.jpg"))
    assert len({path.read_bytes() for path in files.rglob("*.jpg")}) == 5
    with zipfile.ZipFile(tmp_path / "zip/raw/bench/images.zip") as packed:
        assert sorted(packed.namelist()) == names
    with tarfile.open(tmp_path / "tar.gz/raw/bench/images.tar.gz") as archive:
        assert sorted(archive.getnames()) == names
    assert len({(tmp_path / form / "raw/bench/bench.json").read_text() for form in module.FORMS}) == 1
