"""Tests of the profiler: the files have exactly the selected steps, and nothing that is learned changes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train import cases
from tests.train.conftest import StartRanks
from train.config.schema import ProfileConfig, RunConfig


def traced(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the events of a trace."""
    with gzip.open(folder / "profile" / f"{name}.json.gz") as file:
        return list(json.load(file)["traceEvents"])


def steps_in(events: list[dict[str, Any]]) -> list[int]:
    """Returns the steps that a trace contains."""
    names = {event["name"] for event in events if str(event.get("name", "")).startswith("step ")}
    return sorted(int(name.removeprefix("step ")) for name in names)


def test_chosen_steps_are_profiled_on_rank_0(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Two ranks, two of four steps: one trace with these steps and their matrix products, and a table of operations.
    The losses are those of a run without the profiler."""
    plain = start_ranks(2).run(cases.train, replace(run_config, name="plain"))[0]
    config = replace(run_config, profile=ProfileConfig((1, 2)))
    assert start_ranks(2).run(cases.train, config)[0].losses == plain.losses
    assert not (replace(run_config, name="plain").run_dir / "profile").exists()
    folder = config.run_dir / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps_000001_000002.json.gz", "steps_000001_000002.txt"]
    events = traced(config.run_dir, "steps_000001_000002")
    assert steps_in(events) == [1, 2]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "aten::mm" in (folder / "steps_000001_000002.txt").read_text()


@pytest.mark.full
def test_a_run_may_begin_and_end_between_the_steps(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A resumed run may profile other steps than the one before. It starts with the remaining ones, and if the last one
    is never reached, the trace is written at the end."""
    start_ranks(1).run(cases.train_up_to, run_config, 2)
    config = replace(run_config, profile=ProfileConfig((1, 50)))
    start_ranks(1).run(cases.train, config)
    assert [path.name for path in (config.run_dir / "profile").glob("*.gz")] == ["steps_000002_000003.json.gz"]
    assert steps_in(traced(config.run_dir, "steps_000002_000003")) == [2, 3]
