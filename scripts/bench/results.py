"""What every bench here ends with: a table for the reader, and a JSON file that says where its numbers come from.

Owns the form of scripts/bench/results/*.json and the facts about the machine. Standard library only, so that any
environment can import it. What the numbers mean is each bench's.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "numpy", "pillow")


def machine_facts(**more: Any) -> dict[str, Any]:
    """Processor, its widest vectors, cores that this process may use, memory, versions; `more` adds what only the
    bench knows."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "vectors": next((name for name in ("avx512f", "avx2") if name in flags), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **versions,
        **more,
    }


def memory_mib(key: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MiB (VmHWM: the most that was resident); 0 where the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def save(
    name: str, command: Sequence[str], machine: Mapping[str, Any], results: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Writes folder/name.json and returns its path. `results` holds plain values only; of the command, where its output
    went is left out: a path of that machine."""
    words = list(command)
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    content = {"bench": name, "command": " ".join(words), "when": when, "machine": machine, "results": results}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table: the first column to the left, all others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
