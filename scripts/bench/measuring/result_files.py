"""The output of every benchmark: a table for the terminal, and a JSON file with the command and the machine.

Standard library only, so that it can be imported in the environment of the authors' code.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parents[1] / "results"
Column = tuple[str, str, str]
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "numpy", "pillow")


def machine_facts(**more: Any) -> dict[str, Any]:
    """Processor, its widest vectors, cores that this process may use, memory, versions.

    Args:
        more: further facts that only the benchmark knows.
    """
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


def save(
    name: str,
    program: str,
    arguments: Sequence[str],
    results: Mapping[str, Any],
    folder: Path = RESULTS,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Writes folder/name.json and returns its path.

    Args:
        program: as it is started, below scripts/bench: "plan.py scale".
        arguments: what followed it; `--out PATH` is left out, since the path is of this machine alone.
        results: plain values only.
        machine: of `machine_facts`, which is called if there are no facts to add.
    """
    words = ["python", f"scripts/bench/{program}", *arguments]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = machine or machine_facts()
    content = {"bench": name, "command": " ".join(words), "when": when, "machine": facts, "results": results}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table whose first column is aligned left and whose others are aligned right."""
    return tabulate(rows, header, "simple", disable_numparse=True, colglobalalign="right", colalign=("left",))


def columns_table(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """A text table of one line for each row, by its name.

    Args:
        columns: (key of a row's values, title, format) each; a value that is absent or None is left empty.
        corner: title of the names.
    """
    cells = [
        (name, *("" if values.get(key) is None else format(values[key], form) for key, _, form in columns))
        for name, values in rows.items()
    ]
    return table((corner, *(title for _, title, _ in columns)), cells)
