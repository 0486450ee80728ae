"""Owns the proofs about starts that end in the middle: kills, Ctrl-C, full disks, two programs at once.

Whatever happens, a store is whole or absent, what was done is kept, and the next start makes the store, byte for byte,
that an undisturbed one makes.
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
from data_recipes.raw.image_pool import PicturePool
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.durable import only_one
from data_recipes.store.reader import Store
from data_recipes.writing import seen, store_tables
from data_recipes.writing import writer as store_writer
from data_recipes.writing.sample_stream import StreamChangedError
from data_recipes.writing.store_tables import RejectedError
from data_recipes.writing.writer import finish_interrupted, write_store
from tests.data_recipes.prepare.program import Started, arguments, contents, make_slow_place, run, started
from tests.data_recipes.raw_folders import conversation, llava_record, picture, put, write_llava

# Kills and full disks; `prepare/test_parts.py` has an interrupted start for the quick tier.
pytestmark = pytest.mark.full

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)
INPUTS = {"recipe": "r", "raw": "w"}


@pytest.fixture
def small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten records from one checkpoint to the next."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 10)


def raw_samples(root: Path) -> Iterator[Sample | Reject]:
    """45 records, one of them bad."""
    if not root.exists():
        write_llava(root, 44, [llava_record(99, "gone.png")])
    return llava_json.samples(root, "mix.json", "images")


def make(folder: Path, raw: Path, inputs: dict[str, str] = INPUTS) -> Store:
    """The store of `raw`, made or gone on with."""
    finish_interrupted(folder / "s", inputs)
    if not (folder / "s").exists():
        write_store(folder / "s", SOURCE, raw_samples(raw), inputs=inputs, root=raw)
    return Store.open(folder / "s")


def die(*_: object) -> NoReturn:
    """What SIGKILL does: no handler, no `finally`, nothing flushed."""
    os._exit(9)


def dying_at(number: int, items: Iterator[Sample | Reject]) -> Iterator[Sample | Reject]:
    """The items; the process dies when it asks for that one."""
    for at, item in enumerate(items):
        if at == number:
            die()
        yield item


def in_a_child(function: Callable[[], object]) -> int:
    """Exit code of a forked process that runs `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("small_checkpoints")
def test_killed_at_any_record(tmp_path: Path) -> None:
    """Killed again and again, each time a little later, it ends as if nothing had happened; every start goes on at the
    last checkpoint before the kill, and never reads a picture before it again."""
    raw = tmp_path / "raw"
    expected = contents(make(tmp_path / "one", raw).path)
    store = tmp_path / "many" / "s"
    for kill_at, done in ((3, None), (9, None), (20, 10), (24, 10), (39, 30), (44, 30)):
        dying = partial(write_store, store, SOURCE, dying_at(kill_at, raw_samples(raw)), inputs=INPUTS, root=raw)
        assert in_a_child(dying) == 9
        assert not store.exists()
        progress = seen.SeenIndex(store.with_name("s.partial") / "seen.sqlite")
        assert (progress.progress() or {}).get("num_records") == done
        progress.close()

    class Counting(PicturePool):
        """Counts the samples whose pictures it loads."""

        num_asked = 0

        def load_in_order(self, items):  # type: ignore[no-untyped-def]
            for item in super().load_in_order(items):
                self.num_asked += 1
                yield item

    pool = Counting()
    write_store(store, SOURCE, raw_samples(raw), pool, inputs=INPUTS, root=raw)
    assert pool.num_asked == 15
    assert contents(store) == expected


@pytest.mark.parametrize("step", ["sync", "remove_index", "rename", "remove_old"])
@pytest.mark.parametrize("had_one", [False, True])
@pytest.mark.usefixtures("small_checkpoints")
def test_killed_while_it_is_put_into_its_place(tmp_path: Path, step: str, had_one: bool) -> None:
    """Between the last record and the last rename there is no moment at which a kill costs more than those steps, or
    leaves the place empty for good."""
    raw, folder = tmp_path / "raw", tmp_path / "many"
    expected = contents(make(tmp_path / "one", raw).path)
    if had_one:
        write_store(folder / "s", SOURCE, [conversation("old")], inputs={"recipe": "old"})
    steps: dict[str, tuple[object, str, object]] = {
        "sync": (store_tables, "sync", die),
        "remove_index": (seen, "remove_index", die),
        "rename": (store_writer, "swap_in", die),
        "remove_old": (shutil, "rmtree", lambda path, **_: die() if path.name == "s.old" else None),
    }

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*steps[step])
            write_store(folder / "s", SOURCE, raw_samples(raw), inputs=INPUTS, root=raw)

    assert in_a_child(killed) == 9
    if (folder / "s").exists():
        assert len(Store.open(folder / "s")) in (1, 44)  # the old one, or the new one
    finish_interrupted(folder / "s", INPUTS)
    if (folder / "s").exists() and len(Store.open(folder / "s")) == 1:
        write_store(folder / "s", SOURCE, raw_samples(raw), inputs=INPUTS, root=raw)
    assert contents(make(folder, raw).path) == expected
    assert [path.name for path in folder.iterdir()] == ["s"]


def test_the_old_store_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of the swap, with a new store that is not wanted any more: the old one is there
    again."""
    write_store(tmp_path / "s", SOURCE, [conversation("old")], inputs=INPUTS)
    (tmp_path / "s").rename(tmp_path / "s.old")
    put(tmp_path / "s.partial" / "inputs.json", "{}")
    assert not finish_interrupted(tmp_path / "s", INPUTS)
    assert Store.open(tmp_path / "s").ids() == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.usefixtures("small_checkpoints")
def test_what_is_left_of_other_inputs_is_not_used(tmp_path: Path) -> None:
    """Another YAML, or other raw files, begin anew; so do records that changed although the digests did not."""
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
        write_store(tmp_path / "s", SOURCE, [conversation("other")] * 40, inputs=INPUTS, root=raw)
    assert list(tmp_path.iterdir()) == [raw]
    interrupted()
    write_store(tmp_path / "s", SOURCE, [conversation("other")], inputs={"recipe": "q"}, root=raw)
    assert Store.open(tmp_path / "s").ids() == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "s"]


@pytest.mark.usefixtures("small_checkpoints")
def test_strict_meets_the_first_bad_record_again(tmp_path: Path) -> None:
    """A bad record behind the checkpoint of an earlier start is not passed over."""
    items: list[Sample | Reject] = [
        conversation("a", tmp_path / "gone.png"),
        *(conversation(str(n)) for n in range(20)),
    ]

    def stopping() -> Iterator[Sample | Reject]:
        yield from items
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", SOURCE, stopping(), inputs=INPUTS)
    with pytest.raises(RejectedError, match="picture_missing"):
        write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, strict=True)


# --------------------------------------------------------------------------------- the program, as it is started


@contextmanager
def waiting_program(place: Path) -> Iterator[Started]:
    """The program in the middle of its source, behind some checkpoints, with two workers."""
    put(place / "raw" / "wait", "")
    with started(place, "--source", "slow", "--workers", "2", checkpoint=10) as program:
        wait_until(lambda: (place / "raw" / "reached").exists() or not program.is_running())
        assert program.is_running(), program.end()
        yield program


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds; a machine may be busy, but not for ever."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group_lives(group: int) -> bool:
    """Is any process of the group left? (A dead one that nobody waits for does not count.)"""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    """By a kill, by a scheduler, by Ctrl-C: no store, its workers leave with it, and the next start goes on."""
    place = make_slow_place(tmp_path)
    with waiting_program(place) as program:
        if number == signal.SIGINT:
            os.killpg(program.pid, number)  # as a terminal does: to the workers too
        else:
            os.kill(program.pid, number)
        code, _, err = program.end()
        wait_until(lambda: not group_lives(program.pid))
    assert [path.name for path in (place / "stores").iterdir() if path.is_dir()] == ["slow.partial"]
    if number == signal.SIGINT:
        assert (code, err) == (130, "prepare: stopped. What was done is kept: the same command goes on from there.\n")
    else:
        assert code == -number
    (place / "raw" / "wait").unlink()
    code, out, err = run(place, "--source", "slow", "--workers", "2", checkpoint=10)
    assert code == 0, err
    done = int(out.split("goes on after the ")[1].split()[0])
    assert done in (20, 30, 40, 50)  # of the 60 that its reader had given, some were still with the workers
    assert [path.name for path in (place / "stores").iterdir()] == ["slow"]
    assert run(place, "--source", "slow", stores="plain", checkpoint=10)[0] == 0
    assert contents(place / "stores" / "slow") == contents(place / "plain" / "slow")


def test_two_programs_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is told, and disturbs nothing; one that had looked before the first was done finds the store made."""
    place = make_slow_place(tmp_path)
    with waiting_program(place) as program:
        code, _, err = run(place, "--source", "slow")
        assert (code, "another prepare is writing" in err) == (2, True)
        (place / "raw" / "wait").unlink()
        code, _, err = program.end()
        assert code == 0, err
    assert len(Store.open(place / "stores" / "slow")) == 100
    (place / "stores" / "slow").rename(place / "made")

    def made_by_another(*_: object) -> str:
        (place / "made").rename(place / "stores" / "slow")
        return "space: enough"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "check_space", made_by_another)
        patch.syspath_prepend(place)
        assert prepare.main(arguments(place, "--source", "slow")) == 0
    assert "slow: already prepared, 100 samples" in capsys.readouterr().out


def test_a_lock_that_was_removed_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its holder removed it, locked after: then it is another file's turn, or two programs would both
    hold a lock."""
    opened: list[int] = []
    lock = fcntl.flock

    def slow_flock(handle: object, how: int) -> None:
        opened.append(1)
        if len(opened) == 1:
            (tmp_path / ".s.lock").unlink()  # its holder is done at this very moment
        lock(handle, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    with only_one(tmp_path / "s"):
        assert len(opened) == 2
        assert (tmp_path / ".s.lock").exists()
        with pytest.raises(DataError, match="another prepare"), only_one(tmp_path / "s"):
            pass
        assert (tmp_path / ".s.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some cluster file systems have none: the work is done, and the sentence says what to take care of."""

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_one(tmp_path / "s"):
        assert "has no file locks: make sure that no other prepare writes" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of its own in memory, 1 MiB; skipped where nobody lets us mount one. `prepare` does not look at
    its room, as if others had filled it since."""
    disk = tmp_path / "place" / "stores"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root: the file size limit below stands for it")
    monkeypatch.setattr(prepare, "check_space", lambda needs, folder: "space: not looked at")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def big_place(place: Path) -> Path:
    """`make_slow_place` with pictures of 2.4 MB in all."""
    make_slow_place(place)
    for number in range(100):
        if number % 4 != 3:
            put(place / "raw/llava/images" / f"{number:05d}.png", picture(number, 100, 107))
    return place


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills(small_disk: Path, workers: str) -> None:
    """One sentence and exit code 1, and nothing that looks like a store; with more room the same command goes on."""
    place = big_place(small_disk.parent)
    line = ("--source", "slow", "--workers", workers)
    for size_kib in (64, 1024, 2000):
        subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(small_disk)], check=True)
        code, _, err = run(place, *line, checkpoint=10)
        assert code == 1, err
        assert len(err.strip().splitlines()) == 1, err
        assert "What was done is kept" in err
        assert not (small_disk / "slow").exists()
        assert not (small_disk / "slow.partial" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    code, out, err = run(place, *line, checkpoint=10)
    assert code == 0, err
    assert "goes on after the" in out
    assert run(place, *line, stores="plain", checkpoint=10)[0] == 0
    assert contents(small_disk / "slow") == contents(place / "plain" / "slow")


@pytest.mark.parametrize("limit", [2_000, 20_000, 40_000, 250_000])
def test_a_file_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    """The same under a limit on files' sizes, whichever file meets it: the index, the tables, the quarantine."""
    raw = tmp_path / "raw"
    items = [*raw_samples(raw), *(conversation("x" * 300, tmp_path / "gone.png") for _ in range(1000))]
    for number in range(44):
        if number % 4 != 3:
            put(raw / "images" / f"{number:05d}.png", picture(number, 100, 107))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, root=raw)
        except OSError:
            os._exit(0)

    assert in_a_child(limited) == 0
    assert not (tmp_path / "s").exists()
    write_store(tmp_path / "s", SOURCE, items, inputs=INPUTS, root=raw)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["num_samples"] == 44
