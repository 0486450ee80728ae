"""One run at a time in a folder: on one host by flock, on two by a heartbeat."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from train.supervision import run_lock
from train.supervision.run_lock import RunActiveError, RunLock


def hold(run_dir: Path, ready: "multiprocessing.synchronize.Event", *, as_rank: int) -> None:  # type: ignore[name-defined]
    """Another process that has the folder until it is killed."""
    lock = RunLock(run_dir)
    lock.acquire() if as_rank == 0 else lock.join()
    ready.set()
    time.sleep(600)


def started(run_dir: Path, *, as_rank: int = 0) -> multiprocessing.Process:
    """The other process, once it has the folder."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(run_dir, ready), kwargs={"as_rank": as_rank}, daemon=True)
    process.start()
    assert ready.wait(60)
    return process  # type: ignore[return-value]


def test_second_run_is_refused(tmp_path: Path) -> None:
    """With host, process id and start; after the first has ended, or was killed, the folder is free."""
    process = started(tmp_path)
    with pytest.raises(RunActiveError, match=rf"host .*, pid {process.pid}, since 20"):
        RunLock(tmp_path).acquire()
    process.kill()
    process.join()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release(is_main=True)
    RunLock(tmp_path).acquire()


def test_surviving_rank_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has died and another rank has not: the next start waits for its end, and then begins."""
    first = started(tmp_path)
    other = started(tmp_path, as_rank=1)
    first.kill()
    first.join()
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_ENDING_S", 0.5)
        with pytest.raises(RunActiveError):
            RunLock(tmp_path).acquire()
    threading.Timer(0.5, other.kill).start()
    started_s = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - started_s > 0.3


def of_another_host(run_dir: Path) -> Path:
    """The file of a run on a host whose locks are not seen here."""
    path = run_dir / "run.lock"
    path.write_text(json.dumps({"host": "another", "pid": os.getpid(), "since": "2026-11-30T00:00:00+00:00"}))
    return path


def test_run_of_another_host(tmp_path: Path) -> None:
    """Its heartbeat says whether it is alive: an old one at once, a recent one after it was watched for a while."""
    path = of_another_host(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunActiveError, match="host another"):
        RunLock(tmp_path, heartbeat_s=0.5).acquire()
    stop.set()
    thread.join()
    started_s = time.monotonic()
    lock = RunLock(tmp_path, heartbeat_s=0.2)
    lock.acquire()
    assert 0.3 < time.monotonic() - started_s < 10
    lock.release(is_main=True)
    os.utime(of_another_host(tmp_path), (0, 0))
    started_s = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - started_s < 5


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat decides, and on one host the process id: one that has ended is not waited for."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = RunLock(tmp_path)
    first.acquire()
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            first.touch()

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunActiveError):
        RunLock(tmp_path, heartbeat_s=0.5).acquire()
    stop.set()
    thread.join()
    ended = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    ended.start()
    ended.join()
    first.path.write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    RunLock(tmp_path, heartbeat_s=60).acquire()


def test_start_between_the_two_locks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exclusive lock is given up before the shared one is taken; a start that came in between has the folder."""
    real = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        if kind & fcntl.LOCK_SH:
            raise BlockingIOError
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunActiveError):
        RunLock(tmp_path).acquire()
