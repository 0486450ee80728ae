"""Permissions of files: those of written files follow the umask, and an unreadable file is described as such."""

import errno
import os
import pwd
import stat
from pathlib import Path

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def follow_umask(path: Path) -> None:
    """Gives a file the permissions of a newly created one. safetensors 0.8 and later write files with mode 0600.

    The permissions are those of a new file beside it, because reading the umask changes it for all threads.
    """
    probe = path.with_name(f".{path.name}.mode")
    probe.unlink(missing_ok=True)
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def permission_problem(path: Path, *, depth: int = 1) -> str:
    """Describes why this process may not read `path` or something in it.

    Args:
        path: a file or directory; it need not exist.
        depth: levels of a directory's content that are examined.

    Returns:
        A sentence with path, owner, mode and fix, without a final period; empty if permissions are not the problem.
    """
    for directory in reversed(path.absolute().parents):
        if directory.is_dir() and not _is_permitted(directory, os.X_OK):
            return _describe(directory, "entered")
    return _problem_below(path, depth)


def _problem_below(path: Path, depth: int) -> str:
    if not _is_permitted(path, os.R_OK):
        return _describe(path, "read")
    if not path.is_dir():
        return ""
    if not _is_permitted(path, os.X_OK):
        return _describe(path, "entered")
    if depth == 0:
        return ""
    return next(filter(None, (_problem_below(entry, depth - 1) for entry in sorted(path.iterdir()))), "")


def write_problem(path: Path, error: OSError) -> str:
    """Describes why `path` cannot be written: the error, and the owner and mode of the directory that refuses it.

    Args:
        path: a file or directory that need not exist.
        error: what the attempt raised.
    """
    reason = error.strerror or str(error)
    existing = next((each for each in (path, *path.absolute().parents) if os.path.lexists(each)), path)
    if error.errno in _READ_ONLY and existing.exists():
        return f"{path} cannot be written: {reason} ({_owner_and_mode(existing)})"
    return f"{path} cannot be written: {reason}"


def is_writable(path: Path) -> bool:
    """Whether this process could make or change files in a directory, which need not exist. Nothing is written."""
    for each in (path, *path.absolute().parents):
        if os.path.lexists(each):
            return each.is_dir() and os.access(each, os.W_OK | os.X_OK, effective_ids=True)
    return False


def _is_permitted(path: Path, mode: int) -> bool:
    """Whether this process has these permissions for `path`; true if there is no such file."""
    try:
        path.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return os.access(path, mode, effective_ids=True)


def _describe(path: Path, verb: str) -> str:
    return (
        f"{path} exists but cannot be {verb}: permission denied ({_owner_and_mode(path)}); ask its owner to run "
        f"`chmod -R a+rX {path}`, or run as a user who may read it"
    )


def _owner_and_mode(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # a link into a directory that cannot be entered
        status = path.lstat()
    return f"owner {_user_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}; this process runs as " + (
        _user_name(os.geteuid())
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container without a user database
        return f"uid {uid}"
