"""Tests of interrupted preparations: kills, Ctrl-C, full disks, concurrent programs.

A store is always complete or absent, completed work is kept, and the next run writes byte for byte the store of an
uninterrupted run.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from data_recipes.prepare import __main__ as prepare
from data_recipes.raw.image_pool import ImagePool
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.durable import exclusive_lock
from data_recipes.store.reader import Store
from data_recipes.writing import seen, store_tables
from data_recipes.writing import writer as store_writer
from data_recipes.writing.sample_stream import StreamChangedError
from data_recipes.writing.store_tables import RejectedError
from data_recipes.writing.writer import complete_interrupted, write_store
from tests.data_recipes.prepare.program import BackgroundProgram, arguments, contents, make_slow_workspace, run, started
from tests.data_recipes.raw_folders import llava_record, make_image, make_sample, write_file, write_llava

# Kills and full disks are slow to test; `prepare/test_shared_files.py` has a quick test of an interrupted run.
pytestmark = pytest.mark.full

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)
INPUTS = {"recipe": "r", "raw": "w"}


@pytest.fixture
def small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every ten records."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 10)


def raw_samples(root: Path) -> Iterator[Sample | Reject]:
    """Read 45 records, of which one is invalid and one has an unknown key."""
    if not root.exists():
        write_llava(root, 43, [llava_record(50, score=0.5), llava_record(99, "gone.png")])
    return llava_json.samples(root, "mix.json", "images")


def make(folder: Path, raw: Path, inputs: dict[str, str] = INPUTS) -> Store:
    """Write or resume the store of `raw`."""
    complete_interrupted(folder / "s", inputs)
    if not (folder / "s").exists():
        write_store(folder / "s", SOURCE, raw_samples(raw), inputs=inputs, root=raw)
    return Store.open(folder / "s")


def die(*_: object) -> NoReturn:
    """End the process like SIGKILL: no handlers, no `finally`, no flushing."""
    os._exit(9)


def die_at(number: int, items: Iterator[Sample | Reject]) -> Iterator[Sample | Reject]:
    """Yield the items; the process dies when the item with this number is requested."""
    for at, item in enumerate(items):
        if at == number:
            die()
        yield item


def run_in_child(function: Callable[[], object]) -> int:
    """Run `function` in a forked process and return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("small_checkpoints")
def test_killed_at_any_record(tmp_path: Path) -> None:
    """After repeated kills at later and later records the store is correct, and records before the last checkpoint are
    not loaded again."""
    raw = tmp_path / "raw"
    expected = contents(make(tmp_path / "one", raw).path)
    store = tmp_path / "many" / "s"
    for kill_at, done in ((3, None), (9, None), (20, 10), (24, 10), (39, 30), (44, 30)):
        dying = partial(write_store, store, SOURCE, die_at(kill_at, raw_samples(raw)), inputs=INPUTS, root=raw)
        assert run_in_child(dying) == 9
        assert not store.exists()
        progress = seen.SeenIndex(store.with_name("s.partial") / "seen.sqlite")
        assert (progress.progress() or {}).get("num_records") == done
        progress.close()

    class Counting(ImagePool):
        """Counts the samples whose images it loads."""

        num_loaded = 0

        def load_in_order(self, items):  # type: ignore[no-untyped-def]
            for item in super().load_in_order(items):
                self.num_loaded += 1
                yield item

    pool = Counting()
    write_store(store, SOURCE, raw_samples(raw), pool, inputs=INPUTS, root=raw)
    assert pool.num_loaded == 15
    assert contents(store) == expected


@pytest.mark.parametrize("step", ["sync", "remove_index", "rename", "remove_old"])
@pytest.mark.parametrize("has_old_store", [False, True])
@pytest.mark.usefixtures("small_checkpoints")
def test_killed_while_store_is_published(tmp_path: Path, step: str, has_old_store: bool) -> None:
    """A kill between the last record and the last rename loses neither the new store nor the old one."""
    raw, folder = tmp_path / "raw", tmp_path / "many"
    expected = contents(make(tmp_path / "one", raw).path)
    if has_old_store:
        write_store(folder / "s", SOURCE, [make_sample("old")], inputs={"recipe": "old"})
    steps: dict[str, tuple[object, str, object]] = {
        "sync": (store_tables, "sync_folder", die),
        "remove_index": (seen, "remove_index", die),
        "rename": (store_writer, "replace_folder", die),
        "remove_old": (shutil, "rmtree", lambda path, **_: die() if path.name == "s.old" else None),
    }

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*steps[step])
            write_store(folder / "s", SOURCE, raw_samples(raw), inputs=INPUTS, root=raw)

    assert run_in_child(killed) == 9
    if (folder / "s").exists():
        assert len(Store.open(folder / "s")) in (1, 44)  # the old or the new store
    complete_interrupted(folder / "s", INPUTS)
    if (folder / "s").exists() and len(Store.open(folder / "s")) == 1:
        write_store(folder / "s", SOURCE, raw_samples(raw), inputs=INPUTS, root=raw)
    assert contents(make(folder, raw).path) == expected
    assert [path.name for path in folder.iterdir()] == ["s"]


def test_old_store_is_restored(tmp_path: Path) -> None:
    """After a kill between the two renames, and with a new store that cannot be used, the old store is restored."""
    write_store(tmp_path / "s", SOURCE, [make_sample("old")], inputs=INPUTS)
    (tmp_path / "s").rename(tmp_path / "s.old")
    write_file(tmp_path / "s.partial" / "inputs.json", "{}")
    assert not complete_interrupted(tmp_path / "s", INPUTS)
    assert Store.open(tmp_path / "s").ids() == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.usefixtures("small_checkpoints")
def test_other_inputs_start_over(tmp_path: Path) -> None:
    """Other inputs, or records that changed although the digests did not, start over."""
    raw = tmp_path / "raw"

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path / "s", SOURCE, stopping(raw_samples(raw)), inputs=INPUTS, root=raw)
        assert (tmp_path / "s.partial").is_dir()

    def stopping(items: Iterator[Sample | Reject]) -> Iterator[Sample | Reject]:
        for number, item in enumerate(items):
            if number == 30:
                raise KeyboardInterrupt
            yield item

    interrupted()
    with pytest.raises(StreamChangedError):
        write_store(tmp_path / "s", SOURCE, [make_sample("other")] * 40, inputs=INPUTS, root=raw)
    assert list(tmp_path.iterdir()) == [raw]
    interrupted()
    write_store(tmp_path / "s", SOURCE, [make_sample("other")], inputs={"recipe": "q"}, root=raw)
    assert Store.open(tmp_path / "s").ids() == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "s"]


@pytest.mark.usefixtures("small_checkpoints")
def test_strict_after_interruption(tmp_path: Path) -> None:
    """An invalid record before the last checkpoint is reported too."""
    items: list[Sample | Reject] = [
        make_sample("a", tmp_path / "gone.png"),
        *(make_sample(str(n)) for n in range(20)),
    ]

    def stopping() -> Iterator[Sample | Reject]:
        yield from items
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", SOURCE, stopping(), inputs=INPUTS)
    with pytest.raises(RejectedError, match="picture_missing"):
        write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, strict=True)


# ---------------------------------------------------------------------------------------- the complete program


@contextmanager
def waiting_program(workspace: Path) -> Iterator[BackgroundProgram]:
    """Run the program with two workers until it waits after several checkpoints."""
    write_file(workspace / "raw" / "wait", "")
    with started(workspace, "--source", "slow", "--workers", "2", checkpoint=10) as program:
        wait_until(lambda: (workspace / "raw" / "reached").exists() or not program.is_running())
        assert program.is_running(), program.wait()
        yield program


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, with a time limit."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_group_running(group: int) -> bool:
    """Return whether any process of a group is running; zombies do not count."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_by_signal(tmp_path: Path, number: signal.Signals) -> None:
    """After SIGKILL, SIGTERM or Ctrl-C there is no store, the workers exit, and the next run resumes."""
    workspace = make_slow_workspace(tmp_path)
    with waiting_program(workspace) as program:
        if number == signal.SIGINT:
            os.killpg(program.pid, number)  # a terminal signals the workers too
        else:
            os.kill(program.pid, number)
        code, _, err = program.wait()
        wait_until(lambda: not is_group_running(program.pid))
    assert [path.name for path in (workspace / "stores").iterdir() if path.is_dir()] == ["slow.partial"]
    if number == signal.SIGINT:
        assert (code, err) == (
            130,
            "prepare: interrupted. Completed work is kept; run the same command again to continue.\n",
        )
    else:
        assert code == -number
    (workspace / "raw" / "wait").unlink()
    code, out, err = run(workspace, "--source", "slow", "--workers", "2", checkpoint=10)
    assert code == 0, err
    done = int(out.split("resuming after ")[1].split()[0])
    assert done in (20, 30, 40, 50)  # some of the 60 records were still pending in the workers
    assert [path.name for path in (workspace / "stores").iterdir()] == ["slow"]
    assert run(workspace, "--source", "slow", stores="plain", checkpoint=10)[0] == 0
    assert contents(workspace / "stores" / "slow") == contents(workspace / "plain" / "slow")


def test_two_programs_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second program reports the first, and a store that another program completed is used."""
    workspace = make_slow_workspace(tmp_path)
    with waiting_program(workspace) as program:
        code, _, err = run(workspace, "--source", "slow")
        assert (code, "another process is writing" in err) == (2, True)
        (workspace / "raw" / "wait").unlink()
        code, _, err = program.wait()
        assert code == 0, err
    assert len(Store.open(workspace / "stores" / "slow")) == 100
    (workspace / "stores" / "slow").rename(workspace / "made")

    def complete_by_other_program(*_: object) -> str:
        (workspace / "made").rename(workspace / "stores" / "slow")
        return "space: enough"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "check_space", complete_by_other_program)
        patch.syspath_prepend(workspace)
        assert prepare.main(arguments(workspace, "--source", "slow")) == 0
    assert "slow: already prepared, 100 samples" in capsys.readouterr().out


def test_removed_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file that is removed between opening and locking is not mistaken for the lock."""
    opened: list[int] = []
    lock = fcntl.flock

    def slow_flock(handle: object, how: int) -> None:
        opened.append(1)
        if len(opened) == 1:
            (tmp_path / ".s.lock").unlink()  # the holder releases it at this moment
        lock(handle, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    with exclusive_lock(tmp_path / "s"):
        assert len(opened) == 2
        assert (tmp_path / ".s.lock").exists()
        with pytest.raises(DataError, match="another process"), exclusive_lock(tmp_path / "s"):
            pass
        assert (tmp_path / ".s.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without file locks a warning is printed and the work is done."""

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive_lock(tmp_path / "s"):
        assert "does not support file locks: make sure that no other process writes" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs of 1 MiB, skipped without permission to mount it. The check of the free space is disabled, as if other
    programs had filled the disk."""
    disk = tmp_path / "workspace" / "stores"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(
            "a tmpfs can only be mounted when the tests run as root; the file size limit below is tested instead"
        )
    monkeypatch.setattr(prepare, "check_space", lambda needs, folder: "space: not checked")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def make_big_workspace(workspace: Path) -> Path:
    """`make_slow_workspace` with images of 2.4 MB in total."""
    make_slow_workspace(workspace)
    for number in range(100):
        if number % 4 != 3:
            write_file(workspace / "raw/llava/images" / f"{number:05d}.png", make_image(number, 100, 107))
    return workspace


@pytest.mark.parametrize("workers", ["1", "2"])
def test_full_disk(small_disk: Path, workers: str) -> None:
    """A full disk gives exit code 1 and one message; with more space the same command resumes."""
    workspace = make_big_workspace(small_disk.parent)
    line = ("--source", "slow", "--workers", workers)
    for size_kib in (64, 1024, 2000):
        subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(small_disk)], check=True)
        code, _, err = run(workspace, *line, checkpoint=10)
        assert code == 1, err
        assert len(err.strip().splitlines()) == 1, err
        assert "Completed work is kept" in err
        assert not (small_disk / "slow").exists()
        assert not (small_disk / "slow.partial" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    code, out, err = run(workspace, *line, checkpoint=10)
    assert code == 0, err
    assert "resuming after" in out
    assert run(workspace, *line, stores="plain", checkpoint=10)[0] == 0
    assert contents(small_disk / "slow") == contents(workspace / "plain" / "slow")


@pytest.mark.parametrize("limit", [2_000, 20_000, 40_000, 250_000])
def test_file_size_limit(tmp_path: Path, limit: int) -> None:
    """The same with a limit on file sizes, whichever file exceeds it."""
    raw = tmp_path / "raw"
    items = [*raw_samples(raw), *(make_sample("x" * 300, tmp_path / "gone.png") for _ in range(1000))]
    for number in range(44):
        if number % 4 != 3:
            write_file(raw / "images" / f"{number:05d}.png", make_image(number, 100, 107))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, root=raw)
        except OSError:
            os._exit(0)

    assert run_in_child(limited) == 0
    assert not (tmp_path / "s").exists()
    write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, root=raw)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["num_samples"] == 44
