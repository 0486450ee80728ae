"""Builds DeepSpeed's compiled CPU op once, in one process, in the cache folder of this project.

DeepSpeed compiles its shared-memory collectives at the first start (over a minute on two cores). If that is killed,
torch's lock file remains, and every later start waits for it forever without a message. Here the builder holds an
operating system lock, which is released when its process ends, so its holder may remove a stale lock file.
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

from llava_next.cache_root import writable_cache_root

_OP = "deepspeed_shm_comm"
_BUILD = (
    "from deepspeed.accelerator import get_accelerator;"
    "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


class OpBuildError(RuntimeError):
    """The op could not be compiled; the message has the last lines of the compiler's output."""


def ensure_built(timeout_s: float = 900.0, *, verbose: bool = True) -> None:
    """Builds the op unless it is built, and sets torch's extension folder. Waits while another process builds.

    Args:
        timeout_s: limit in seconds for the build, or for the other process.
        verbose: print one line if there is something to wait for.

    Raises:
        OpBuildError: the compiler failed or took too long.
    """
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja is in the interpreter's folder, which is not on the PATH if the environment was not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if is_built():
        return
    folder.mkdir(parents=True, exist_ok=True)
    reason = writable_cache_root()[1]
    if reason and verbose:
        print(f"DeepSpeed's CPU op is compiled in {folder}: {reason}", file=sys.stderr, flush=True)
    with _locked(folder / "build.flock", timeout_s, verbose) as lock:
        if is_built():
            return
        if verbose:
            print(
                "compiling DeepSpeed's CPU collectives, once (about a minute) ...",
                file=sys.stderr,
                flush=True,
            )
        for stale in folder.rglob("lock"):
            stale.unlink()
        _compile(timeout_s, lock)
        _marker().touch()


def is_built() -> bool:
    """Whether the op is there, so that `ensure_built` has nothing to do."""
    return _marker().exists()


def _marker() -> Path:
    return extensions_folder() / f"{_OP}.built"


def extensions_folder() -> Path:
    """The folder of compiled ops for these versions of torch, DeepSpeed and Python, in this environment.

    The environment is part of it, because torch compiles an op again when the paths of its headers have changed: two
    environments of the same versions would undo each other's work at every start, outside of the lock.
    """
    key = f"{version('torch')} {version('deepspeed')} {sys.version} {sys.prefix}"
    return writable_cache_root()[0] / "ops" / sha256(key.encode()).hexdigest()[:16]


def _compile(timeout_s: float, lock: int) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _BUILD]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a timeout ends the compilers too
        # If this process is killed, the build goes on and keeps the lock, and the next start waits for it.
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
        last_lines = "\n".join(output.strip().splitlines()[-15:])
        raise OpBuildError(
            f"DeepSpeed's CPU op did not compile; install a C++ compiler and Python's headers:\n{last_lines}"
        )


def _kill_session(session: int) -> None:
    """Kills all processes of a session: ninja starts each compiler in its own process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _locked(path: Path, timeout_s: float, verbose: bool) -> Iterator[int]:
    """Holds the lock inside the block; yields its file descriptor, which holds it in a child process too."""
    with path.open("w") as file:
        started, is_announced = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if verbose and not is_announced:
                    print(
                        "waiting for another process that compiles DeepSpeed's CPU op",
                        file=sys.stderr,
                        flush=True,
                    )
                    is_announced = True
                if time.monotonic() - started > timeout_s:
                    raise OpBuildError(
                        f"another process has been compiling DeepSpeed's CPU op for {timeout_s:.0f} s; see {path}"
                    ) from None
                time.sleep(0.2)
        yield file.fileno()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `_compile`, which then kills its compilers
    ensure_built()
