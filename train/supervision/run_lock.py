"""One run at a time in a run's folder.

Every rank holds a shared `flock` on `run.lock` while it lives; a start needs an exclusive one first, on rank 0.
Where the file system has no locks, or locks one host only, the age of a heartbeat decides: the owner touches the file.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train.config.schema import ConfigError

HEARTBEAT_S = 10.0
"""The owner touches the file at least this often; three times as long without a touch means that it is gone."""
_ENDING_S = 20.0  # ranks whose first has died are given so long to end
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunActiveError(ConfigError):
    """Another run is active in the folder. Nothing of that run was touched."""


class RunLock:
    """The lock of a run's folder.

    Args:
        run_dir: an existing folder.
        heartbeat_s: the longest time between two calls of `touch` while a run is active, in seconds.
    """

    def __init__(self, run_dir: Path, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.path = run_dir / "run.lock"
        self._heartbeat_s = heartbeat_s
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the folder for this run, on rank 0.

        Raises:
            RunActiveError: another run is active here, with its host, process id and start.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline_s = time.monotonic() + _ENDING_S
            while (has_lock := _lock(descriptor, fcntl.LOCK_EX)) is False:
                owner = self._owner()
                if time.monotonic() > deadline_s or not _is_dead(owner):
                    raise self._active(owner)
                time.sleep(0.2)  # the first rank has died, and the others are about to
            owner = self._owner()
            if owner and (has_lock is None or owner.get("host") != socket.gethostname()) and self._is_alive(owner):
                raise self._active(owner)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            about = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, about + b"\n", 0)
            # The exclusive lock is given up before the shared one is taken: a start at the same moment may be between.
            if _lock(descriptor, fcntl.LOCK_SH) is False:
                raise self._active(self._owner())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def join(self) -> None:
        """Holds the folder on another rank too, which may outlive rank 0."""
        with suppress(OSError):
            self._descriptor = os.open(self.path, os.O_RDWR)
            _lock(self._descriptor, fcntl.LOCK_SH)

    def touch(self) -> None:
        """Shows that this run is alive, to starts on hosts that do not see its lock."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.utime(self._descriptor)

    def release(self, *, is_main: bool) -> None:
        """Gives the folder back; a next start need not wait for a heartbeat."""
        if self._descriptor is None:
            return
        if is_main:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        """Whether the owner, whose lock is not seen here, still touches the file."""
        if _is_dead(owner):
            return False
        limit_s = 3 * self._heartbeat_s
        before_ns = self.path.stat().st_mtime_ns
        if self._now_of_file_system_ns() - before_ns > limit_s * 1e9:
            return False
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if self.path.stat().st_mtime_ns != before_ns:
                return True
            time.sleep(self._heartbeat_s / 20)
        return False

    def _now_of_file_system_ns(self) -> int:
        """The time by the clock of the file system, which may be another than this host's."""
        probe = self.path.with_suffix(f".{os.getpid()}")
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _active(self, owner: dict[str, Any]) -> RunActiveError:
        about = ", ".join(f"{key} {owner[key]}" for key in ("host", "pid", "since") if key in owner) or "just started"
        return RunActiveError(
            f"another run is active in {self.path.parent} ({about}): wait for its end, stop it, or choose another name="
        )


def _lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was obtained; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended: a process of this host that is no longer there."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
