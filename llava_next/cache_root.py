"""The folder of files that can be made again: fetched models, environments, compiled operators.

`scripts/cache_root.sh` has the same rule for shell scripts.
"""

import os
import stat
import tempfile
from pathlib import Path

from llava_next.config import ModelError
from llava_next.file_access import is_writable, write_problem


def cache_root() -> Path:
    """Returns $LLAVA_NEXT_CACHE, else $XDG_CACHE_HOME/llava_next, else ~/.cache/llava_next. Empty variables are unset.

    Raises:
        ModelError: neither variable is set, and this user has no home directory.
    """
    named, user_cache = os.environ.get("LLAVA_NEXT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    if user_cache:
        return Path(user_cache) / "llava_next"
    try:
        return Path("~/.cache/llava_next").expanduser()
    except RuntimeError as error:
        raise ModelError(
            f"HOME is not set and user {os.getuid()} has no home directory; set LLAVA_NEXT_CACHE to a folder for files "
            "that can be made again"
        ) from error


def writable_cache_root() -> tuple[Path, str]:
    """Returns a cache folder that this process can write: `cache_root`, else a temporary one of this user and machine.

    Returns:
        The folder, which need not exist, and why it is not `cache_root`, with the fix; empty if it is.
    """
    try:
        root = cache_root()
    except ModelError as error:
        return temporary_cache(), str(error)
    if is_writable(root):
        return root, ""
    return temporary_cache(), f"the cache folder {root} cannot be written; set LLAVA_NEXT_CACHE to one that can"


def temporary_cache() -> Path:
    """Returns a folder in the machine's temporary folder that belongs to this user alone. It is made if necessary.

    Raises:
        ModelError: it cannot be made, or another user has made it and could change its content.
    """
    path = Path(tempfile.gettempdir()) / f"llava_next_{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{write_problem(path, error)}; set LLAVA_NEXT_CACHE or TMPDIR") from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ModelError(f"{path} can be changed by another user; set LLAVA_NEXT_CACHE to a folder of your own")
    return path


def redirect_kernel_cache() -> None:
    """Sets TRITON_CACHE_DIR where the home directory cannot be written: Triton would fail when it compiles a kernel."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - without a home directory it stays "~"
    if not (home.is_absolute() and is_writable(home)):
        os.environ.setdefault("TRITON_CACHE_DIR", str(temporary_cache() / "triton"))
