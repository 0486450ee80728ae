"""Describes files that exist and may not be opened, so that they are not reported as missing or damaged."""

import os
import pwd
import stat
from pathlib import Path


def describe_denied(path: Path) -> str:
    """Describe the first file or folder, of `path` and everything in it, that this process may not read.

    Returns:
        A sentence with path, owner, mode and fix, without a final period; empty if there is no such file.
    """
    for folder in reversed(path.absolute().parents):
        if folder.is_dir() and not _is_permitted(folder, os.X_OK):
            return _describe(folder)
    if not _is_permitted(path, os.R_OK):
        return _describe(path)
    for current, folders, names in os.walk(path):
        for entry in [Path(current), *(Path(current, name) for name in (*folders, *names))]:
            if not _is_permitted(entry, os.R_OK | (os.X_OK if entry.is_dir() else 0)):
                return _describe(entry)
    return ""


def describe_error(error: OSError) -> str:
    """Describe an error of the file system; for a denied file, with its owner and the owner's fix."""
    if not isinstance(error, PermissionError) or error.filename is None:
        return str(error)
    path = Path(os.fsdecode(error.filename))
    denied = describe_denied(path) if not path.is_dir() else ""
    return denied or f"{path} cannot be written: {error.strerror} ({_owner_and_mode(_existing(path))})"


def _is_permitted(path: Path, mode: int) -> bool:
    """Whether this process has these permissions for `path`; true if there is no such file."""
    try:
        path.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return os.access(path, mode, effective_ids=True)


def _describe(path: Path) -> str:
    return (
        f"{path} exists but cannot be read: permission denied ({_owner_and_mode(path)}); ask its owner to run "
        f"`chmod -R a+rX {path}`, or run as a user who may read it"
    )


def _existing(path: Path) -> Path:
    return next((each for each in (path, *path.absolute().parents) if os.path.lexists(each)), path)


def _owner_and_mode(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # a link into a folder that cannot be entered
        status = path.lstat()
    user = _user_name(os.geteuid())
    return f"owner {_user_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}; this process runs as {user}"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container without a user database
        return f"uid {uid}"
