"""Processor time and memory of processes, and measurements in a process of their own. Standard library only."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


def memory_mib(key: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MiB (VmHWM: peak of resident memory); 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_alone(program: str, *arguments: object) -> dict[str, Any]:
    """Runs `program --alone ARGUMENTS` in a process of its own, so that its memory is its own; returns its JSON.

    Args:
        program: below scripts/bench, with its subcommand: "input.py batches".
    """
    file, *words = program.split()
    command = [sys.executable, str(Path(__file__).parents[1] / file), *words, "--alone", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
