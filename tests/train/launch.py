"""Runs the program as a user does, in its own processes, on a tiny mixture.

It provides the command lines and a folder with their YAML files; the assertions are in the tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from llava_next.cache_root import cache_root
from train.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180.0
_BIN = Path(sys.executable).parent
LAUNCHERS = {
    "plain": [sys.executable, "-m", "train"],
    "torchrun": [str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "train"],
    # Without a GPU the launcher asks DS_ACCELERATOR and takes the number of processes as it is told.
    "deepspeed": [str(_BIN / "deepspeed"), "--num_accelerators", "2", "--module", "train"],
}


def share_compiled_ops(cache: Path) -> None:
    """Lets a cache of a test's own have the compiled op of the usual cache: DeepSpeed compiles it for over a minute."""
    ops = cache_root() / "ops"
    ops.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "ops").is_symlink():
        (cache / "ops").symlink_to(ops)


class Program:
    """The program with a tiny model and mixture; every call is one run of one stage.

    Args:
        config: names the tiny parts.
        folder: for the YAML files and the runs.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "outputs"
        self._store_root = config.data.store_root
        parts = {
            "model/language_model/tiny.yaml": asdict(config.model.language_model),
            "model/vision_tower/tiny.yaml": asdict(config.model.vision_tower),
            "mixture/tiny.yaml": asdict(config.mixture),
        }
        for name, values in parts.items():
            path = folder / "configs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(_plain(values)))

    def command(self, launcher: str, *overrides: str) -> list[str]:
        """Returns the command line of a finetune run, unless the overrides say otherwise; later ones take
        precedence."""
        return [
            *LAUNCHERS[launcher],
            "--config-dir",
            str(self.folder / "configs"),
            "model/language_model=tiny",
            "model/vision_tower=tiny",
            "mixture=tiny",
            f"root={self.root}",
            f"data.store_root={self._store_root}",
            "data.workers=1",
            "data.length_workers=1",
            "stage.batch_size=13",
            "stage.max_length=512",
            "packing.max_tokens=640",
            "packing.max_tiles=24",
            "device=cpu",
            "timeout_s=60",
            *overrides,
        ]

    def start(self, launcher: str, *overrides: str, agent: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """Starts the program in its own process group; `agent` replaces the launcher's usual command."""
        hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "DS_ACCELERATOR")
        remaining = {key: value for key, value in os.environ.items() if key not in hidden}
        if launcher == "deepspeed":
            remaining["DS_ACCELERATOR"] = "cpu"
        command = self.command(launcher, *overrides)
        return subprocess.Popen(
            [*agent, *command[len(LAUNCHERS[launcher]) :]] if agent else command,
            cwd=ROOT,
            env={**remaining, "OMP_NUM_THREADS": "1", "PATH": f"{_BIN}{os.pathsep}{remaining.get('PATH', '')}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, launcher: str, *overrides: str) -> tuple[int, str]:
        """Runs the program; returns exit code and output."""
        return finish(self.start(launcher, *overrides))

    def metrics(self, name: str, stage: str = "finetune") -> list[dict[str, Any]]:
        """Returns the lines of a run's metrics.jsonl."""
        path = self.root / name / stage / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def wait_for_step(self, process: "subprocess.Popen[str]", name: str, step: int) -> None:
        """Waits until a running program has finished this step."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.metrics(name)) <= step:
            if process.poll() is not None or time.monotonic() > deadline:
                kill_all(process)
                raise AssertionError(f"step {step} of {name} never came:\n{process.communicate()[0]}")
            time.sleep(0.05)


def finish(process: "subprocess.Popen[str]", timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Returns exit code and output of a program, which is killed with all of its processes after a timeout."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(process)
        output, _ = process.communicate()
        raise AssertionError(f"not finished after {timeout_s:.0f} s:\n{output}") from None
    return process.returncode, output


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kills a program and every process that it started, including launchers' own sessions."""
    for pid in [process.pid, *_descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Returns the process ids of a launched program's ranks, by rank."""
    result: dict[int, list[int]] = {}
    for pid in _descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        rank = dict(entry.split("=", 1) for entry in entries if "=" in entry).get("RANK")
        if rank is not None and "train" in words and "deepspeed.launcher.launch" not in words:
            result.setdefault(int(rank), []).append(pid)
    return [min(result[rank]) for rank in sorted(result)]  # the workers of its loader are younger


def _descendants(pid: int) -> list[int]:
    """Returns the process ids of all descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.name))
    result = list(children.get(pid, []))
    for child in result:
        result += children.get(child, [])
    return result


def _plain(values: Any) -> Any:
    """Converts tuples to lists, as in YAML."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return [_plain(value) for value in values]
    return values
