"""Functions that ranks run in the tests of the pre-flight checks: rank 1 is made to differ.

`tests.ranks` runs them; the assertions are in `test_preflight.py`.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from train.config.schema import RunConfig

FAULTS = ("none", "versions", "configuration", "run folder", "data", "network")


def verdict(config: RunConfig, fault: str, elsewhere: Path) -> str:
    """The pre-flight's sentence on this rank, empty if it passes.

    Args:
        fault: in what rank 1 differs.
        elsewhere: a folder in which rank 1 stands for "run folder" and "data", so that relative paths lead elsewhere.
    """
    from dataclasses import replace

    from train.distributed.launch import read_launch
    from train.distributed.versions import versions
    from train.distributed.world import start
    from train.supervision import preflight

    world, home = start(config, read_launch()), Path.cwd()
    try:
        with ExitStack() as changed:
            changed.enter_context(patch.object(preflight, "_TOKEN_TIMEOUT_S", 0.5))
            if world.rank == 1:
                if fault == "versions":
                    other = versions() | {"torch": "0.5"}
                    changed.enter_context(patch.object(preflight, "versions", lambda: other))
                if fault == "configuration":
                    config = replace(config, seed=config.seed + 1)
                if fault in ("run folder", "data"):
                    os.chdir(elsewhere)
                if fault == "network":
                    changed.enter_context(patch("torch.distributed.all_reduce", _wrong_sum))
            (config.run_dir / "log").mkdir(parents=True, exist_ok=True)
            preflight.run_checks(config, world)
    except preflight.PreflightError as error:
        return str(error)
    finally:
        os.chdir(home)
    return ""


def _wrong_sum(numbers: Any, *args: Any, **options: Any) -> None:
    import torch.distributed as dist

    dist.distributed_c10d.all_reduce(numbers, *args, **options)
    numbers[-1] += 1


def rehearsed(config: RunConfig) -> tuple[list[int], str]:
    """Returns the positions of the row of `preflight=only`, and its line of the table."""
    import contextlib
    import io

    from tests.train.cases import built
    from train.supervision.preflight import run_trial_step, select_fullest_row

    with built(config) as parts, contextlib.redirect_stderr(io.StringIO()) as output:
        run_trial_step(config, parts.world, parts.engine, parts.mixture, parts.table, parts.processor)
        return select_fullest_row(parts.table, config.packing).tolist(), output.getvalue()


def _hang(config: RunConfig) -> dict[str, str]:
    time.sleep(3600)
    return {}


def at_the_start(config: RunConfig, fault: str) -> int:
    """Runs a whole run, in which rank 1 does not join the process group, or hangs while it reads its files."""
    from train.__main__ import execute
    from train.supervision import preflight

    preflight.TIMEOUT_S = 2.0
    if os.environ["RANK"] == "1":
        if fault == "absent":
            return 0
        preflight._read_stores = _hang
    return execute(config)


def saves_verdict(config: RunConfig, free: int | None) -> str:
    """The sentence of the check of checkpoints on this rank, empty if it passes.

    Args:
        free: bytes that rank 1's disk has free; None: as many as it has.
    """
    import shutil
    from types import SimpleNamespace

    from tests.train.cases import built
    from train.supervision import preflight

    with ExitStack() as changed, built(config) as parts:
        (config.run_dir / "log").mkdir(parents=True, exist_ok=True)
        if free is not None and parts.world.rank == 1:
            changed.enter_context(patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=free)))
        try:
            preflight.check_saves_fit(config, parts.world, parts.engine, parts.planner.num_steps)
        except preflight.PreflightError as error:
            return str(error)
    return ""
