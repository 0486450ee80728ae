"""C++ of this package, compiled once for a machine's instructions, into the user's cache.

Only the compiler is needed, for two or three seconds: the files include the standard library, headers beside them and
nothing else, and are called through ctypes. Owns where what is compiled lies, and that it is whole.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

INSTRUCTIONS: dict[str, tuple[str, ...]] = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""What a compiler is told for each of torch's names of a processor's instructions; for others it takes its default."""

_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
_TIMEOUT_S = 300


class CompileError(RuntimeError):
    """There is no compiler, or it failed; the message holds its last words."""


def cache_root() -> Path:
    """Where this project keeps what can be made again: $LLAVA_NEXT_CACHE, or llava_next in the user's cache."""
    named = os.environ.get("LLAVA_NEXT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llava_next"


def load(source: Path, instructions: str) -> ctypes.CDLL:
    """The library of a C++ file, compiled if need be.

    Processes that start together may each compile it; whichever is done last stays, and they are alike.

    Args:
        source: the file.
        instructions: torch's name for what this processor runs, as `torch.backends.cpu.get_cpu_capability()` says it.

    Raises:
        CompileError: it cannot be compiled here.
    """
    options = (*_OPTIONS, *INSTRUCTIONS.get(instructions, ()))
    read = (source, *sorted(source.parent.glob("*.h")))
    key = sha256(b"".join(path.read_bytes() for path in read) + " ".join(options).encode()).hexdigest()[:16]
    library = cache_root() / "native" / f"{source.stem}-{key}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile(source, options, library)
    except OSError as error:
        raise CompileError(f"{library} cannot be written: {error}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        library.unlink(missing_ok=True)  # or every later start would fail on it
        raise CompileError(f"{library} could not be loaded, and was removed: {error}") from error


def unavailable_reason(library: Callable[[], ctypes.CDLL]) -> str | None:
    """What keeps a library from being loaded in this process; None where it can be. Compiles it, if it never was."""
    try:
        library()
    except CompileError as error:
        return str(error)
    return None


def _compile(source: Path, options: tuple[str, ...], library: Path) -> None:
    compiler = os.environ.get("CXX") or next((name for name in _COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH, and CXX is not set")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [*compiler.split(), *options, str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise CompileError(f"{compiler} did not compile {source.name} within {_TIMEOUT_S} s") from None
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise CompileError(f"{compiler} did not compile {source.name}:\n{last}")
        made.replace(library)
