"""The free memory of this host, as far as this process may use it."""

from pathlib import Path

MAX_COPY_SHARE = 0.7
"""Share of a host's free memory that copies of a checkpoint may take; workers and files being written need the rest."""


def available_bytes(root: Path = Path("/")) -> int:
    """Returns the free memory in bytes: the host's, or less if a control group (of a Slurm job or container) limits it.

    Args:
        root: of the file system that contains proc/ and sys/.
    """
    available = [
        int(line.split()[1]) * 1024 for line in _read_lines(root / "proc/meminfo") if line.startswith("MemAvailable:")
    ]
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = _GROUP_FILES[controllers]
        for folder in (top / group.strip("/"), *(top / group.strip("/")).parents):
            if all((folder / name).is_file() for name in names):
                limit, used, stat = ((folder / name).read_text() for name in names)
                cached = dict(entry.split() for entry in stat.splitlines())
                if limit.strip() != "max":
                    available.append(int(limit) - int(used) + int(cached.get(_CACHED[controllers], 0)))
            if folder == top:
                break
    return max(0, min(available, default=0))


_GROUP_FILES = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
_CACHED = {"": "inactive_file", "memory": "total_inactive_file"}
"""Cached file pages, which count as used but which the kernel can reclaim."""


def _read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
