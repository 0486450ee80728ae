"""DeepSpeed's compiled CPU op, built once, by one process, into a folder of ours.

DeepSpeed compiles its shared-memory collectives at the first start (over a minute on two cores). A kill in the middle
leaves torch's lock file behind, and every later start would wait for it for ever, in silence. Here an operating
system lock, which dies with its process, says who builds; whoever holds it may throw a stale lock file away.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from llava_next.kernels.cpu.compile import cache_root

_OP = "deepspeed_shm_comm"
_BUILD = (
    "from deepspeed.accelerator import get_accelerator;"
    "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


class OpBuildError(RuntimeError):
    """The op could not be compiled; the message holds the compiler's last words."""


def ensure_built(timeout_s: float = 900.0, *, say: bool = True) -> None:
    """Builds the op if it is not there, and points torch to it. Waits while another process builds.

    Args:
        timeout_s: for the build, or for the other process.
        say: print one line when there is something to wait for.

    Raises:
        OpBuildError: the compiler failed or took too long.
    """
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja lies beside the interpreter, which need not be on the PATH when the environment was not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    marker = folder / f"{_OP}.built"
    if marker.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "build.flock", timeout_s, say) as lock:
        if marker.exists():
            return
        if say:
            print(
                "compiling DeepSpeed's CPU collectives, once (about a minute) ...",
                file=sys.stderr,
                flush=True,
            )
        for stale in folder.rglob("lock"):
            stale.unlink()
        _compile(timeout_s, lock)
        marker.touch()


def extensions_folder() -> Path:
    """The folder of compiled ops for these versions of torch, DeepSpeed and Python."""
    key = f"{version('torch')} {version('deepspeed')} {sys.version}"
    return cache_root() / "ops" / sha256(key.encode()).hexdigest()[:16]


def _compile(timeout_s: float, lock: int) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _BUILD]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a time-out ends the compilers too
        # Killed, we leave it compiling; the lock then lives as long as it does, and the next start waits.
        pass_fds=(lock,),
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        process.communicate()
        raise OpBuildError(f"DeepSpeed's CPU op did not compile within {timeout_s:.0f} s") from None
    except BaseException:
        _kill_session(process.pid)
        raise
    if process.returncode:
        last = "\n".join(output.strip().splitlines()[-15:])
        raise OpBuildError(f"DeepSpeed's CPU op did not compile; it needs a C++ compiler and Python's headers:\n{last}")


def _kill_session(session: int) -> None:
    """All processes of a session: ninja gives each of its compilers a process group of its own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _locked(path: Path, timeout_s: float, say: bool) -> Iterator[int]:
    """Holds the lock; gives its descriptor, which holds it too wherever it is inherited."""
    with path.open("w") as file:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if say and not told:
                    print(
                        "waiting for another process that compiles DeepSpeed's CPU op",
                        file=sys.stderr,
                        flush=True,
                    )
                    told = True
                if time.monotonic() - started > timeout_s:
                    raise OpBuildError(
                        f"another process has been compiling DeepSpeed's CPU op for {timeout_s:.0f} s; see {path}"
                    ) from None
                time.sleep(0.2)
        yield file.fileno()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `_compile`, which takes its compilers along
    ensure_built()
