"""Owns the proofs about disks that fail: a full one, one that cannot be written, one that goes away. The run ends with
a sentence, or goes on; the same command then ends with the undisturbed run's result, and no step stands twice.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import Ended, run_to_the_end
from tests.train import disasters
from tests.train.cases import with_stage
from train.checkpoint import saver as checkpoint
from train.config.schema import RunConfig, SaveConfig


@pytest.fixture(scope="module")
def long(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 19 steps on one rank that saves every 8; nobody has disturbed it."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = replace(tiny_parts, root=str(root), name="whole", save=SaveConfig(every=8, keep=1))
    config = with_stage(replace(config, data=replace(config.data, workers=1)), epochs=6.0)
    [ended] = run_to_the_end(1, disasters.run_as_it_is, config, folder=root, timeout_s=240)
    assert ended.exit_code == 0, ended.output
    return config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no file system can be mounted here: there is no `mount`")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def assert_goes_on(config: RunConfig, long: RunConfig, folder: Path) -> None:
    """The same command ends well, with the undisturbed run's tensors and losses, and nothing unfinished left."""
    [ended] = run_to_the_end(1, disasters.run_as_it_is, config, folder=folder, timeout_s=240)
    assert ended.exit_code == 0, ended.output
    assert disasters.result_hash(config) == disasters.result_hash(long)
    for ours, theirs in zip(disasters.metrics(config), disasters.metrics(long), strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000019"]
    assert disasters.told(config) == {"code": 0, "reason": "finished", "step": 18}


@pytest.mark.full
@pytest.mark.parametrize("leave", [0.0, 0.5], ids=["no_room", "half_the_room"])
def test_full_disk_at_a_save(long: RunConfig, small_disk: Path, tmp_path: Path, leave: float) -> None:
    """The save ends the run with a sentence that says how much is free and which checkpoint stays; it is sound."""
    config = replace(long, root=str(small_disk), name="full")
    args = (config, "save", 1, leave)
    [ended] = run_to_the_end(1, disasters.run_and_fill_the_disk, *args, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    place = config.run_dir / "checkpoints" / "step_000008"
    said = rf"error: rank 0 .*step_000016 could not be saved: .* are free there\); the newest complete one is {place}\."
    assert re.search(said, ended.output), ended.output
    assert checkpoint.complete(place.parent) == [place]
    (small_disk / "filler").unlink()
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_full_disk_in_the_middle_of_a_line(long: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    """No room for metrics and logs: the run ends with a sentence; what is cut off is mended by the same command."""
    config = replace(long, root=str(small_disk), name="full")
    args = (config, "agree", 9, 0.0)
    [ended] = run_to_the_end(1, disasters.run_and_fill_the_disk, *args, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    said = r"error: rank 0 .* failed in step \d+, .*: OSError: .*No space left on device \(make room, or choose a root"
    assert re.search(said, ended.output), ended.output
    written = (config.run_dir / "metrics.jsonl").read_text()
    assert not written.endswith("}\n"), "the disk was full at the end of a line"
    (small_disk / "filler").unlink()
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_disk_that_cannot_be_written(long: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    """Neither a first start nor a later one gets far: one sentence with the file and the way out."""
    config = replace(long, root=str(small_disk), name="fixed")
    first = replace(config, max_steps=3)
    for is_first in (True, False):
        ended = remounted(small_disk, first if is_first else config, tmp_path)
        assert ended.exit_code == 1, ended.output
        said = (
            r"error: rank 0 .* failed in starting: OSError: .*Read-only file system: '.*/fixed.* \(make room, or choose"
        )
        assert re.search(said, ended.output), ended.output
        if is_first:
            [ended] = run_to_the_end(1, disasters.run_as_it_is, first, folder=tmp_path, timeout_s=240)
            assert ended.exit_code == 0, ended.output
    assert_goes_on(config, long, tmp_path)


def remounted(disk: Path, config: RunConfig, folder: Path) -> Ended:
    """A run while the disk can be read only."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        [ended] = run_to_the_end(1, disasters.run_as_it_is, config, folder=folder, timeout_s=240)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    return ended


@pytest.mark.full
@pytest.mark.parametrize("comes_back", [False, True], ids=["stays_away", "comes_back"])
def test_picture_store_that_vanishes(long: RunConfig, tmp_path: Path, comes_back: bool) -> None:
    """Pictures that can be read no more: the run names the sample and ends, and goes on when they are back; with
    `data.read_retries` it waits for them and is none the worse."""
    stores = tmp_path / "stores"
    shutil.copytree(long.data.store_root, stores)
    data = replace(long.data, store_root=str(stores), read_retries=5 if comes_back else 0)
    config = replace(long, root=str(tmp_path / "outputs"), name="away", data=data)
    args = (config, "tiny_pictures", 1.0 if comes_back else None)
    [ended] = run_to_the_end(1, disasters.run_without_store, *args, folder=tmp_path, timeout_s=240)
    if comes_back:
        assert ended.exit_code == 0, ended.output
        assert "trying again in" in (config.run_dir / "log" / "rank_000.log").read_text()
    else:
        assert ended.exit_code == 1, ended.output
        said = disasters.told(config)["reason"]
        assert re.search(r"sample '\d+' of source tiny_pictures could not be read from its store: .*Stale", said), said
        assert "waiting for its data" in said
        (stores / "away").rename(stores / "tiny_pictures")
    assert_goes_on(config, long, tmp_path)


@pytest.mark.full
def test_reading_process_that_is_killed(long: RunConfig, tmp_path: Path) -> None:
    """A loader's worker that dies ends the run with the cause; the same command goes on."""
    config = replace(long, root=str(tmp_path / "outputs"), name="worker")
    [ended] = run_to_the_end(1, disasters.run_and_kill_a_worker, config, folder=tmp_path, timeout_s=240)
    assert ended.exit_code == 1, ended.output
    said = disasters.told(config)["reason"]
    assert re.search(r"rank 0 .* failed in step \d+, .*DataLoader worker .*(Killed|exited unexpectedly)", said), said
    assert_goes_on(config, long, tmp_path)
