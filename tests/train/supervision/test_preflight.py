"""Tests of the pre-flight checks: if ranks differ, all end with one sentence within seconds; otherwise they pass, and
`preflight=only` runs one step on the fullest row.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import Ranks, run_to_the_end
from tests.train import preflight_cases
from tests.train.launch import Program
from train.config.schema import PackingConfig, RunConfig
from train.data.length_table import ROW, LengthTable
from train.supervision.preflight import select_fullest_row

NAMED = {
    "none": (),
    "versions": ("rank 1 (", "torch 0.5", "same environment"),
    "configuration": ("rank 1 (", "`seed: 4`", "`seed: 3`"),
    "run folder": ("rank 1 (", "is not shared with rank 0", "`root=`"),
    "data": ("rank 1 (", "no complete store at", "tiny_chats"),
    "network": ("instead of 3 on rank 1"),
}


@pytest.mark.parametrize("fault", preflight_cases.FAULTS)
def test_ranks_that_differ_end_with_one_sentence(
    start_ranks: Callable[[int], Ranks], run_config: RunConfig, tmp_path: Path, fault: str
) -> None:
    """Both ranks end with the same message, whichever of them differs, and leave no file in the run folder."""
    config = run_config
    if fault == "run folder":
        config = replace(config, root=os.path.relpath(config.root))
    if fault == "data":
        config = replace(config, data=replace(config.data, store_root=os.path.relpath(config.data.store_root)))
    first, second = start_ranks(2).run(preflight_cases.verdict, config, fault, tmp_path)
    assert first == second
    assert first.startswith(f"pre-flight, {fault}: ") or fault == "none"
    for word in NAMED[fault]:
        assert word in first
    assert bool(first) == bool(NAMED[fault])
    assert list(tmp_path.rglob("preflight_*")) == []


@pytest.mark.parametrize(("fault", "words"), [("absent", "2 ranks did not meet at"), ("stuck", "Ranks 1 failed")])
def test_a_rank_that_does_not_come_ends_the_start(
    run_config: RunConfig, tmp_path: Path, fault: str, words: str
) -> None:
    """If one rank is not started, or hangs in its file system, the others end within the timeout with a message."""
    config = replace(run_config, timeout_s=5 if fault == "absent" else 60)
    ended = run_to_the_end(2, preflight_cases.at_the_start, config, fault, folder=tmp_path, missing=[1], timeout_s=240)
    assert ended[0].exit_code == 1
    assert words in ended[0].output
    assert words in json.loads((config.run_dir / "exit.json").read_text())["reason"]


def test_one_step_on_the_fullest_row(start_ranks: Callable[[int], Ranks], run_config: RunConfig) -> None:
    """The step runs under ZeRO on all ranks with the same row, and the table has its size."""
    config = replace(run_config, preflight="only")
    (row, printed), (other, silent) = start_ranks(2).run(preflight_cases.rehearsed, config, timeout_s=300)
    assert row == other
    assert printed.split()[:5] == ["ok", "one", "step", str(len(row)), "sample(s),"]
    assert "nothing was saved" in printed
    assert silent == ""


def test_the_fullest_row_fills_its_budgets() -> None:
    """Longest first, each sample once, within both budgets, until no other fits."""
    rng = np.random.default_rng(0)
    rows = np.zeros(500, dtype=ROW)
    rows["tokens"], rows["tiles"] = rng.integers(1, 400, 500), rng.integers(0, 6, 500)
    table = LengthTable(rows, "", Path(), {}, 0)
    for budgets in (PackingConfig(1000, 60), PackingConfig(8000, 20), PackingConfig(10**6, 10**4)):
        chosen = select_fullest_row(table, budgets)
        left = budgets.max_tokens - rows["tokens"][chosen].sum(), budgets.max_tiles - rows["tiles"][chosen].sum()
        assert min(left) >= 0
        assert len(set(chosen.tolist())) == len(chosen)
        others = np.setdiff1d(np.arange(500), chosen)
        assert not np.any((rows["tokens"][others] <= left[0]) & (rows["tiles"][others] <= left[1]))
        assert rows["tokens"][chosen[0]] == rows["tokens"].max()


@pytest.mark.full
def test_preflight_only_trains_nothing(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """From the command line: a table in the terminal, exit code 0, and only logs in the run folder."""
    program = Program(tiny_parts, tmp_path)
    code, output = program.run("torchrun", "name=looked", "stage.init_from=null", "preflight=only")
    assert code == 0, output
    lines = [line.split()[1] for line in output.splitlines() if line.startswith("ok  ")]
    assert lines == [
        "versions",
        "configuration",
        "GPUs",
        "run",
        "data",
        "clocks",
        "limits",
        "nodes",
        "network",
        "checkpoints",
        "one",
    ]
    assert sorted(path.name for path in (program.root / "looked" / "finetune").iterdir()) == ["log", "run.lock"]
