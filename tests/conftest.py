"""What the marks mean, and what is prepared while the first tests run; fixtures live beside the tests that use them.

`full` is left out by default (pyproject.toml) and asked for by `scripts/test.sh full`. `gpu` is
skipped here, with a reason, where there is no CUDA device.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.engine import deepspeed_ops

ROOT = Path(__file__).resolve().parents[1]
LONGEST = (
    "scripts/test_slurm.py",
    "house/test_pages_run.py",
    "train/acceptance/test_program.py",
    "train/checkpoint/test_kills.py",
    "train/checkpoint/test_resume.py",
    "train/engine/test_contract.py",
    "train/test_trainer.py",
    "scripts/test_vllm.py",
    "train/test_program.py",
    "house/test_wheel.py",
    "house/test_your_own_images.py",
    "train/test_shipped_backbones.py",
    "train/test_tune.py",
    "scripts/test_lmms_eval.py",
    "train/checkpoint/test_disk.py",
    "scripts/test_bench_step.py",
)
"""Files that take minutes. They run first, so that two processes end at about the same time."""
_OPS = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option with which the table of pairs is made anew (`tests/train/pair_results.py`)."""
    parser.addoption("--record-pairs", type=Path, help="the JSON file to which test_shipped_backbones.py writes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files, and skip what needs a CUDA device where there is none; torch is imported only if a test asks for
    one."""
    order = {str((ROOT / "tests" / name).resolve(strict=True)): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device: on a machine with one, run pytest -m gpu"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where ranks will be started, compile DeepSpeed's CPU op beside the tests that need none: it takes a minute.

    The first ranks wait for it (`deepspeed_ops.ensure_built`).
    """
    starts_ranks = any({"start_ranks", "rank"} & set(getattr(item, "fixturenames", ())) for item in session.items)
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if session.config.option.collectonly or not is_first or not starts_ranks or deepspeed_ops.is_built():
        return
    command = ["nice", "-n", "10", sys.executable, "-m", "train.engine.deepspeed_ops"]
    session.config.stash[_OPS] = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the compilation of a session that has ended before it."""
    process = session.config.stash.get(_OPS, None)
    if process is not None:
        process.terminate()
        process.wait()
