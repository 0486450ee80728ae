"""Tests of disk failures: a full disk, a read-only one, one that disappears. The run ends with one sentence or
continues, and the same command then gives the result of an uninterrupted run.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ended, run_to_the_end
from tests.train import fault_runs
from tests.train.cases import with_stage
from train.checkpoint import saver as checkpoint
from train.config.schema import RunConfig, SaveConfig


@pytest.fixture(scope="module")
def long(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run of 19 steps on one rank that saves every 8 steps."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = replace(tiny_parts, root=str(root), name="whole", save=SaveConfig(every=8, keep=1))
    config = with_stage(replace(config, data=replace(config.data, workers=1)), epochs=6.0)
    [ended] = run_to_the_end(1, fault_runs.run_as_it_is, config, folder=root, timeout_s=240)
    assert ended.exit_code == 0, ended.output
    return config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no file system can be mounted here: apt-get install mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()} (run as root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def assert_goes_on(config: RunConfig, long: RunConfig, folder: Path) -> None:
    """The same command succeeds with the tensors and losses of the uninterrupted run and leaves nothing unfinished."""
    [ended] = run_to_the_end(1, fault_runs.run_as_it_is, config, folder=folder, timeout_s=240)
    assert ended.exit_code == 0, ended.output
    assert fault_runs.result_hash(config) == fault_runs.result_hash(long)
    for actual, expected in zip(fault_runs.metrics(config), fault_runs.metrics(long), strict=True):
        assert actual["train/loss"] == expected["train/loss"]
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000019"]
    assert fault_runs.read_exit_report(config) == {"code": 0, "reason": "finished", "step": 18}


@pytest.mark.full
@pytest.mark.parametrize("leave", [0.0, 0.5], ids=["no_room", "half_the_room"])
def test_full_disk_at_a_save(long: RunConfig, small_disk: Path, tmp_path: Path, leave: float) -> None:
    """The run ends with a sentence that has the free space and the newest checkpoint, which is valid."""
    config = replace(long, root=str(small_disk), name="full")
    args = (config, "save", 1, leave)
    [ended] = run_to_the_end(1, fault_runs.run_and_fill_the_disk, *args, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    place = config.run_dir / "checkpoints" / "step_000008"
    printed = (
        rf"error: rank 0 .*step_000016 could not be saved: .* are free\); the newest complete checkpoint is {place}\."
    )
    assert re.search(printed, ended.output), ended.output
    assert checkpoint.list_complete(place.parent) == [place]
    (small_disk / "filler").unlink()
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_full_disk_in_the_middle_of_a_line(long: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    """Without space for metrics and logs, the run ends with one sentence; the same command repairs the incomplete
    line."""
    config = replace(long, root=str(small_disk), name="full")
    args = (config, "agree", 9, 0.0)
    [ended] = run_to_the_end(1, fault_runs.run_and_fill_the_disk, *args, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    printed = (
        r"error: rank 0 .* failed in step \d+, .*: OSError: .*No space left on device \(free some space, or choose a"
    )
    assert re.search(printed, ended.output), ended.output
    written = (config.run_dir / "metrics.jsonl").read_text()
    assert not written.endswith("}\n"), "the disk was full at the end of a line"
    (small_disk / "filler").unlink()
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_disk_that_cannot_be_written(long: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    """Both a first start and a later one end with one sentence that has the file and the fix."""
    config = replace(long, root=str(small_disk), name="fixed")
    first = replace(config, max_steps=3)
    for is_first in (True, False):
        ended = remounted(small_disk, first if is_first else config, tmp_path)
        assert ended.exit_code == 2, ended.output
        assert re.search(r"error: root=.*/fixed.* cannot be written: Read-only file system", ended.output), ended.output
        if is_first:
            [ended] = run_to_the_end(1, fault_runs.run_as_it_is, first, folder=tmp_path, timeout_s=240)
            assert ended.exit_code == 0, ended.output
    assert_goes_on(config, long, tmp_path)


def remounted(disk: Path, config: RunConfig, folder: Path) -> Ended:
    """Runs while the disk is read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        [ended] = run_to_the_end(1, fault_runs.run_as_it_is, config, folder=folder, timeout_s=240)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    return ended


@pytest.mark.full
@pytest.mark.parametrize("comes_back", [False, True], ids=["stays_away", "comes_back"])
def test_store_that_vanishes(long: RunConfig, tmp_path: Path, comes_back: bool) -> None:
    """When images can no longer be read, the run names the sample and ends, and it resumes when they are back; with
    `data.read_retries` it waits for them."""
    stores = tmp_path / "stores"
    shutil.copytree(long.data.store_root, stores)
    data = replace(long.data, store_root=str(stores), read_retries=5 if comes_back else 0)
    config = replace(long, root=str(tmp_path / "outputs"), name="away", data=data)
    args = (config, "tiny_pictures", 1.0 if comes_back else None)
    [ended] = run_to_the_end(1, fault_runs.run_without_store, *args, folder=tmp_path, timeout_s=240)
    if comes_back:
        assert ended.exit_code == 0, ended.output
        assert "retrying in" in (config.run_dir / "log" / "rank_000.log").read_text()
    else:
        assert ended.exit_code == 1, ended.output
        printed = fault_runs.read_exit_report(config)["reason"]
        assert re.search(r"sample '\d+' of source tiny_pictures could not be read from its store: .*Stale", printed), (
            printed
        )
        assert "waiting for its data" in printed
        (stores / "away").rename(stores / "tiny_pictures")
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_reading_process_that_is_killed(long: RunConfig, tmp_path: Path) -> None:
    """A loader worker that dies ends the run with the cause; the same command resumes."""
    config = replace(long, root=str(tmp_path / "outputs"), name="worker")
    [ended] = run_to_the_end(1, fault_runs.run_and_kill_a_worker, config, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    printed = fault_runs.read_exit_report(config)["reason"]
    assert re.search(r"rank 0 .* failed in step \d+, .*DataLoader worker .*(Killed|exited unexpectedly)", printed), (
        printed
    )
    assert_goes_on(config, long, tmp_path)
