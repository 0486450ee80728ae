"""DeepSpeed's compiled op is built once, by one process; waiting for it is announced and limited."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from train.engine import deepspeed_ops

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the environment is restored afterwards."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(tmp_path))
    for name in ("TORCH_EXTENSIONS_DIR", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return tmp_path


@pytest.fixture
def builds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the compiler; one entry per build."""
    timeouts: list[float] = []
    monkeypatch.setattr(deepspeed_ops, "_compile", lambda timeout_s, _: timeouts.append(timeout_s))
    return timeouts


def test_built_once(builds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """The first start builds and prints a line; later ones print nothing, and torch's extension folder is set."""
    deepspeed_ops.ensure_built(timeout_s=5)
    assert "compiling" in capsys.readouterr().err
    deepspeed_ops.ensure_built(timeout_s=5)
    assert builds == [5]
    assert capsys.readouterr().err == ""
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(deepspeed_ops.extensions_folder())
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_stale_lock_is_removed(builds: list[float]) -> None:
    """The lock file of a killed build is removed before the next build, which would wait for it forever."""
    lock = deepspeed_ops.extensions_folder() / deepspeed_ops._OP / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    deepspeed_ops.ensure_built(timeout_s=5)
    assert not lock.exists()
    assert len(builds) == 1


def test_each_environment_has_its_own(builds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles again where the paths of its headers differ: an environment elsewhere builds into its own folder,
    once, and the first one's stays as it is."""
    assert not deepspeed_ops.is_built()
    deepspeed_ops.ensure_built(timeout_s=5)
    assert deepspeed_ops.is_built()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "prefix", "/another/environment")
        assert not deepspeed_ops.is_built()
        deepspeed_ops.ensure_built(timeout_s=5)
        assert deepspeed_ops.is_built()
    deepspeed_ops.ensure_built(timeout_s=5)
    assert len(builds) == 2


@contextmanager
def another_process(folder: Path, lives_s: float, finishes: bool) -> Iterator[None]:
    """A process that holds the build's lock for a while, and then has built the op or has died."""
    marker = folder / f"{deepspeed_ops._OP}.built"
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        f"print('held', flush=True); time.sleep({lives_s})\n" + (f"open({str(marker)!r}, 'w')" if finishes else "")
    )
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", script, str(folder / "build.flock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def test_second_process_waits(builds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """While another process builds, this one prints that it waits, and then uses the result."""
    with another_process(deepspeed_ops.extensions_folder(), 1.0, finishes=True):
        deepspeed_ops.ensure_built(timeout_s=30)
    assert builds == []
    assert "waiting for another process" in capsys.readouterr().err


def test_a_dead_builder_is_replaced(builds: list[float]) -> None:
    """The lock is released when its process dies, and the waiting process builds."""
    with another_process(deepspeed_ops.extensions_folder(), 0.5, finishes=False):
        deepspeed_ops.ensure_built(timeout_s=30)
    assert len(builds) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_compiler_that_outlives_its_parent_is_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A killed start leaves its compiler running, and two compilers would overwrite each other's files; after SIGTERM
    the compiler is ended too."""
    trace = cache / "trace"
    build = (
        f"import time; f = open({str(trace)!r}, 'a'); print('in', file=f, flush=True); time.sleep(1); "
        "print('out', file=f)"
    )
    first = f"import train.engine.deepspeed_ops as o; o._BUILD = {build!r}; o.ensure_built()"
    if number == signal.SIGTERM:
        first = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); {first}"
    with subprocess.Popen([sys.executable, "-c", first], cwd=ROOT, start_new_session=True) as process:
        deadline = time.monotonic() + 30
        while not trace.exists() or not trace.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() != 0
    monkeypatch.setattr(deepspeed_ops, "_BUILD", build)
    deepspeed_ops.ensure_built(timeout_s=60)
    expected = {signal.SIGKILL: ["in", "out", "in", "out"], signal.SIGTERM: ["in", "in", "out"]}
    assert trace.read_text().split() == expected[number]


def test_waiting_is_limited(builds: list[float]) -> None:
    """A build that takes too long in another process is an error that names its lock file."""
    started = time.monotonic()
    with (
        another_process(deepspeed_ops.extensions_folder(), 60.0, finishes=True),
        pytest.raises(
            deepspeed_ops.OpBuildError, match=r"another process has been compiling .* for 1 s; see .*build\.flock"
        ),
    ):
        deepspeed_ops.ensure_built(timeout_s=1.0, verbose=False)
    assert time.monotonic() - started < 10
    assert builds == []


def test_a_failed_build_is_reported_and_repeated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the compiler's last lines, nothing counts as built, and the lock is free."""
    monkeypatch.setattr(
        deepspeed_ops, "_BUILD", "import sys; print('fatal error: Python.h: no such file'); sys.exit(1)"
    )
    for _ in range(2):
        with pytest.raises(deepspeed_ops.OpBuildError, match=r"(?s)C\+\+ compiler and Python's headers.*Python\.h"):
            deepspeed_ops.ensure_built(timeout_s=60, verbose=False)
    assert not list(deepspeed_ops.extensions_folder().glob("*.built"))
    with (deepspeed_ops.extensions_folder() / "build.flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_endless_build_is_killed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that hangs is killed with its child processes."""
    monkeypatch.setattr(
        deepspeed_ops,
        "_BUILD",
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']);"
        f"open({str(cache / 'child')!r}, 'w').write(str(p.pid)); time.sleep(60)",
    )
    with pytest.raises(deepspeed_ops.OpBuildError, match="did not compile within 2 s"):
        deepspeed_ops.ensure_built(timeout_s=2.0, verbose=False)
    time.sleep(0.2)
    stat = Path("/proc") / (cache / "child").read_text() / "stat"
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
