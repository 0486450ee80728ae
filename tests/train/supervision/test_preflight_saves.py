"""Tests of the pre-flight check of checkpoints: space, write rate and `timeout_s` against what the run will save."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train import cases, preflight_cases
from tests.train.conftest import StartRanks
from train.config.schema import RunConfig, SaveConfig
from train.supervision.preflight_saves import SaveFindings, compare_saves, count_kept, measure_write_rate

GB = 10**9


@pytest.mark.parametrize(
    ("save", "last_step", "expected"),
    [
        (SaveConfig(every=10, keep=2), 100, 3),
        (SaveConfig(every=10, keep=2), 15, 2),  # after 10 and 15
        (SaveConfig(every=50, keep=1), 20, 1),
        (SaveConfig(every=10, keep=1, keep_every=20), 100, 6),  # 20 to 80, 90 and 100
        (SaveConfig(every=10, keep=2, keep_every=20), 100, 6),  # 20 to 60, 80, 90 and 100
    ],
)
def test_checkpoints_at_a_time(save: SaveConfig, last_step: int, expected: int) -> None:
    """The newest ones, the one that is being written, and those that are kept for good; never more than are saved."""
    assert count_kept(save, last_step) == expected


@pytest.mark.parametrize(
    ("rates", "free", "error", "words"),
    [
        ((1, 1), 40, "", ()),
        ((1, 1), 29, "", ("room for 29 GB", "3 checkpoints of 10 GB", "save.keep=2", "root=")),
        ((1, 0.001), 40, "", ("rank 1 (b)", "0.001 GB/s", "its 4 GB", "about 4000 s", "timeout_s=1800")),
        ((0.001, 0.003), 40, "", ("rank 0 (a)", "its 6 GB", "about 6000 s")),
        ((1, 1), 40, "[Errno 30] Read-only file system", ("rank 1 (b): [Errno 30]", "root=")),
    ],
)
def test_what_does_not_fit_is_named(
    run_config: RunConfig, rates: Sequence[float], free: int, error: str, words: Sequence[str]
) -> None:
    """The free space, or the rank that would write too long, with the number and the key."""
    first = SaveFindings("rank 0 (a)", 6 * GB, rates[0] * GB, 100 * GB)
    second = SaveFindings("rank 1 (b)", 4 * GB, rates[1] * GB, free * GB, error)
    config = replace(run_config, timeout_s=1800, save=SaveConfig(every=10, keep=2))
    problem = compare_saves([first, second], 3, config, Path("/runs/checkpoints")).problem
    assert bool(problem) == bool(words)
    for word in words:
        assert word in str(problem)


def test_rank_without_files_has_no_time(run_config: RunConfig) -> None:
    """Without ZeRO only rank 0 writes."""
    findings = [SaveFindings("rank 0 (a)", GB, GB, 9 * GB), SaveFindings("rank 1 (b)", 0, float("inf"), 9 * GB)]
    check = compare_saves(findings, 2, run_config, Path("/runs/checkpoints"))
    assert check.problem is None
    assert check.result == "1 GB each, written in about 1 s; up to 2 at a time, 9 GB free"


def test_write_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is written than a checkpoint has, all of it is synced, and no file is left."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    assert measure_write_rate(tmp_path / "trial", 1000) > 0
    assert synced == [1000]
    assert measure_write_rate(tmp_path / "trial", 0) == float("inf")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        measure_write_rate(tmp_path / "absent" / "trial", 1000)


def test_start_is_refused_on_all_ranks(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """With a real engine on two ranks: both end with the same sentence if the disk is too small, and pass otherwise."""
    config = replace(run_config, engine=cases.zero(3), save=SaveConfig(every=1, keep=5))
    assert start_ranks(2).run(preflight_cases.saves_verdict, config, None) == ["", ""]
    first, second = start_ranks(2).run(preflight_cases.saves_verdict, config, 1000)
    assert first == second
    assert first.startswith("pre-flight, checkpoints: ")
    assert "and 4 checkpoints of " in first  # the run has four steps
