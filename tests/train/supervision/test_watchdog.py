"""Tests of the watchdog: a run whose ranks hang or fail ends in time, with rank, step, phase, cause and samples."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_recipes.mixture.mixture import Mixture
from tests.ranks import Ended, run_to_the_end
from tests.train import cases
from train.config.schema import RunConfig
from train.data.length_table import open_table
from train.data.loader import build_processor
from train.supervision.rank_progress import PHASES, Progress, RankStatus, find_stragglers, read_statuses
from train.supervision.watchdog import ExitFile, _is_collective_error

TIMEOUT_S = 10.0


def make_status(rank: int, step: int, micro_step: int, phase: str) -> RankStatus:
    """Returns a status; its time does not matter."""
    return RankStatus(rank, "node1", step, micro_step, phase, since=0.0)


def test_status_is_read_as_written(tmp_path: Path) -> None:
    """Each change of phase is in the file immediately; an observation applies only to the phase in which it was
    made."""
    progress = Progress(tmp_path, rank=1)
    for step, micro_step, phase in ((-1, 0, "start"), (0, 0, "data"), (17, 12, "backward"), (123_456, 0, "save")):
        progress.enter(phase, step, micro_step)
        [read] = read_statuses(tmp_path, 2)
        assert (read.rank, read.step, read.micro_step, read.phase) == (1, step, micro_step, phase)
        assert abs(time.time() - read.since) < 1
        assert (read.waits, read.at) == (False, "")
        progress.record_observation(read, waits=True, at="x" * 500)
        [read] = read_statuses(tmp_path, 2)
        assert read.waits
        assert len((tmp_path / "rank_001.progress").read_bytes()) == 640
    for step in range(100):  # however quickly one phase follows another
        progress.record_observation(progress.current[0], waits=True, at="")
        progress.enter("data", step)
        assert not read_statuses(tmp_path, 2)[0].waits
    progress.remove()
    assert read_statuses(tmp_path, 2) == []


def test_progress_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    """A new run starts with the phase start, and a file that cannot be parsed is omitted."""
    Progress(tmp_path).enter("forward", 99, 3)
    assert Progress(tmp_path).current[0].step == -1
    (tmp_path / "rank_001.progress").write_bytes(b'{"rank": 1, "ho')
    assert [(result.rank, result.step) for result in read_statuses(tmp_path, 3)] == [(0, -1)]


def test_failed_write_does_not_raise(tmp_path: Path) -> None:
    """A failed write of the progress file does not end the run."""
    progress = Progress(tmp_path)
    assert progress._file is not None
    os.close(progress._file)
    progress.enter("forward", 3, 1)
    progress.record_observation(progress.current[0], waits=True, at="")
    assert progress.current[0].step == 3


def test_progress_is_cheap(tmp_path: Path) -> None:
    """Three changes of phase per micro-step take a fraction of a millisecond."""
    progress = Progress(tmp_path)
    fastest = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for number in range(100):
            progress.enter("forward", 17, number)
        fastest = min(fastest, (time.perf_counter() - started) / 100)
    assert fastest < 2e-4


AT_FORWARD = make_status(0, 7, 5, "forward")
AT_AGREE = make_status(0, 7, 0, "agree")


def test_age_ignores_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the watchdog has looked, the age of a phase is measured by the monotonic clock."""
    progress, clock = Progress(tmp_path), time.time
    progress.enter("forward", 3)
    for days in (30, -30):
        monkeypatch.setattr(time, "time", lambda days=days: clock() + 86_400 * days)
        progress.record_observation(progress.current[0], waits=False, at="")
        assert read_statuses(tmp_path, 1)[0].age_s < 60
    monkeypatch.setattr(time, "time", clock)
    assert replace(make_status(0, 3, 0, "forward"), since=clock() + 500).age_s == 0


@pytest.mark.parametrize(
    ("statuses", "expected"),
    {
        "an_earlier_step": ([AT_AGREE, make_status(1, 6, 0, "update")], [1]),
        "an_earlier_row": ([AT_FORWARD, make_status(1, 7, 4, "backward")], [1]),
        "an_earlier_phase": ([AT_AGREE, make_status(1, 7, 5, "forward")], [1]),
        "inside_the_same_phase": ([replace(AT_FORWARD, waits=True), make_status(1, 7, 5, "forward")], [1]),
        "two_of_four": (
            [AT_AGREE, *(make_status(rank, 7, row, "data") for rank, row in ((1, 1), (2, 1), (3, 2)))],
            [1, 2],
        ),
        "device_waits": (
            [replace(AT_FORWARD, waits=True, waits_for_device=True), make_status(1, 7, 5, "forward")],
            [1],
        ),
        "all_wait_one_for_its_device": (
            [replace(AT_AGREE, waits=True), replace(AT_AGREE, rank=1, waits=True, waits_for_device=True)],
            [1],
        ),
        "all_wait": ([replace(AT_AGREE, waits=True), replace(AT_AGREE, rank=1, waits=True)], [0, 1]),
        "alone": ([AT_FORWARD], [0]),
    }.values(),
)
def test_find_stragglers(statuses: list[RankStatus], expected: list[int]) -> None:
    """The ranks with the least progress, and within one phase those that do not wait for the others."""
    assert [result.rank for result in find_stragglers(statuses)] == expected


def test_collective_errors_are_recognized() -> None:
    """Gloo's errors about another rank are not failures of the rank that raises them."""
    heard = ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer", "Application timeout caused pair closure")
    assert [_is_collective_error(RuntimeError(words)) for words in (*heard, "shapes differ")] == [True, True, False]


def test_phases_are_in_the_order_of_a_step() -> None:
    """The order increases from one phase to the next, and from row to row."""
    row = [(number, phase) for number in range(3) for phase in ("data", "forward", "backward")]
    whole = [(0, phase) for phase in ("agree", "update", "evaluate", "save")]
    steps = [make_status(0, step, *at) for step in (0, 1) for at in (*row, *whole)]
    orders = [
        each.order
        for each in [make_status(0, -1, 0, "join"), make_status(0, -1, 0, "start"), *steps, make_status(0, 1, 0, "end")]
    ]
    assert orders == sorted(set(orders))
    assert {each.phase for each in steps} | {"join", "start", "end"} == set(PHASES)


def test_first_failure_is_recorded(tmp_path: Path) -> None:
    """Only the first rank of a run writes exit.json; a file of an earlier run is replaced."""
    ExitFile(tmp_path).write(0, "finished")
    first, second = ExitFile(tmp_path), ExitFile(tmp_path)
    assert second.write(1, "rank 1 failed", rank=1)
    assert not first.write(1, "the connection was closed")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 1, "reason": "rank 1 failed", "rank": 1}
    assert ExitFile(tmp_path).write(75, "stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


# ------------------------------------------------------------------------------------------------ real runs


def faulty_run(config: RunConfig, fault: str, stage: int, folder: Path) -> tuple[list[Ended], dict[str, Any], float]:
    """Runs two ranks with a fault in rank 1; returns how they ended, exit.json, and the seconds since the fault."""
    config = replace(config, engine=cases.zero(stage), timeout_s=int(TIMEOUT_S))
    config = replace(config, data=replace(config.data, workers=1))
    missing = [1] if fault == "stop" else []
    ended = run_to_the_end(2, cases.run_with_fault, config, 1, fault, folder=folder, missing=missing, timeout_s=240)
    exit_info = json.loads((config.run_dir / "exit.json").read_text())
    status = json.loads((config.run_dir / "log" / "rank_001.progress").read_text().splitlines()[0])
    took_s = (config.run_dir / "exit.json").stat().st_mtime - status["since"]
    assert exit_info["code"] == 1
    assert (exit_info["rank"], exit_info["step"], exit_info["micro_step"], exit_info["phase"]) == tuple(
        status[key] for key in ("rank", "step", "micro_step", "phase")
    )
    # One rank speaks, and what it says stands in exit.json.
    assert sum(each.output.count("error: rank 1 (") for each in ended) == 1
    assert f"error: {exit_info['reason']}\n" in "".join(each.output for each in ended)
    assert f", micro-step {exit_info['micro_step']}, " in exit_info["reason"]
    return ended, exit_info, took_s


def tokens_of(config: RunConfig, names: list[str]) -> list[int]:
    """Returns the lengths of samples that are given by name, from the length table."""
    from llava_next.model.build import read_backbone

    mixture = Mixture.open(config.mixture, Path(config.data.store_root))
    processor = build_processor(read_backbone(config.model), config.stage)
    folder = Path(config.data.store_root) / ".lengths"
    table = open_table(mixture, processor, folder, is_writer=True, num_workers=1, show_progress=False)
    texts = [mixture.text(int(row["sample"])) for row in table.rows]
    of_name = {f"{text.source}:{text.id}": int(row["tokens"]) for text, row in zip(texts, table.rows, strict=True)}
    return [of_name[name] for name in names]


def assert_named_samples_are_those_in_hand(config: RunConfig, exit_info: dict[str, Any], ended: Ended) -> None:
    """The named samples have the lengths of those in the model when the fault happened."""
    struck = re.search(r"fault at \[(.*)\]", ended.output)
    assert struck
    assert tokens_of(config, exit_info["samples"]) == [int(length) for length in struck[1].split(",")]
    assert f"its samples: {', '.join(exit_info['samples'][:12])}" in exit_info["reason"]


@pytest.mark.parametrize(
    ("fault", "stage"),
    [("sleep", 3), *(pytest.param(*case, marks=pytest.mark.full) for case in (("sleep", 2), ("stop", 2), ("stop", 3)))],
)
def test_stuck_rank_ends_the_run(run_config: RunConfig, tmp_path: Path, fault: str, stage: int) -> None:
    """A rank that hangs in its forward pass, or whose process is suspended, ends the run within `timeout_s` and a few
    seconds. The reason has host, step, micro-step and samples; the stack is in the rank's log."""
    ended, exit_info, took_s = faulty_run(run_config, fault, stage, tmp_path)
    assert TIMEOUT_S - 1 < took_s < TIMEOUT_S + 10
    assert exit_info["reason"].startswith(f"rank 1 ({os.uname().nodename}) has been in step ")
    assert ", forward for " in exit_info["reason"]
    assert f"timeout_s={TIMEOUT_S:g}" in exit_info["reason"] or "gave up: RuntimeError" in exit_info["reason"]
    assert_named_samples_are_those_in_hand(run_config, exit_info, ended[1])
    assert ended[0].exit_code == 1
    if fault == "sleep":
        assert ended[1].exit_code == 1
        assert "in strike" in (run_config.run_dir / "log" / "rank_001.log").read_text()


@pytest.mark.full
def test_ranks_that_wait_for_their_device_are_not_named(run_config: RunConfig, tmp_path: Path) -> None:
    """On a GPU a rank waits for the others in a copy to the host, in the same row as the rank that is late: the report
    names the late rank alone."""
    ended, exit_info, took_s = faulty_run(run_config, "device", 2, tmp_path)
    assert took_s < TIMEOUT_S + 10
    assert exit_info["reason"].startswith(f"rank 1 ({os.uname().nodename}) has been in step ")
    assert "in strike" in exit_info["reason"]
    assert "the same holds" not in exit_info["reason"]
    assert [each.exit_code for each in ended] == [1, 1]
    observed = json.loads((run_config.run_dir / "log" / "rank_000.progress").read_text().splitlines()[1])
    assert observed["waits"]
    assert observed["waits_for_device"]


@pytest.mark.full
def test_stuck_worker_ends_the_run(run_config: RunConfig, tmp_path: Path) -> None:
    """If a loader worker hangs, the rank ends the run and names the samples; the worker's stack is in the rank's
    log."""
    ended, exit_info, took_s = faulty_run(run_config, "data", 2, tmp_path)
    assert took_s < TIMEOUT_S + 10
    assert "waiting for its data for " in exit_info["reason"]
    struck = re.search(r"fault at (\d+)", ended[1].output)
    assert struck
    text = Mixture.open(run_config.mixture, Path(run_config.data.store_root)).text(int(struck[1]))
    assert f"{text.source}:{text.id}" in exit_info["samples"]
    assert [each.exit_code for each in ended] == [1, 1]
    assert "in hang" in (run_config.run_dir / "log" / "rank_001.log").read_text()


@pytest.mark.parametrize(("fault", "stage"), [("raise", 2), pytest.param("raise", 3, marks=pytest.mark.full)])
def test_rank_that_raises_is_named(run_config: RunConfig, tmp_path: Path, fault: str, stage: int) -> None:
    """An error on one rank ends all of them at once, with rank, host, step, samples and cause; the other ranks print
    nothing in the terminal."""
    ended, exit_info, took_s = faulty_run(run_config, fault, stage, tmp_path)
    assert took_s < TIMEOUT_S
    moment = f"step {exit_info['step']}, micro-step {exit_info['micro_step']}, forward"
    start = f"rank 1 ({os.uname().nodename}) failed in {moment}: "
    assert exit_info["reason"].startswith(start + "ValueError: a fault on purpose; its samples: ")
    assert_named_samples_are_those_in_hand(run_config, exit_info, ended[1])
    assert "Traceback" in ended[1].output
    assert "Traceback" not in ended[0].output
    assert "gave up: RuntimeError" in (run_config.run_dir / "log" / "rank_000.log").read_text()
    assert [each.exit_code for each in ended] == [1, 1]


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_dead_rank_is_named(run_config: RunConfig, tmp_path: Path, stage: int) -> None:
    """If a rank is killed, the others name it as soon as its loader workers, which hold its connections, have ended too
    (they check every five seconds)."""
    ended, exit_info, took_s = faulty_run(run_config, "kill", stage, tmp_path)
    assert took_s < TIMEOUT_S
    assert exit_info["reason"].startswith(f"rank 1 ({os.uname().nodename}) has been in step ")
    assert "gave up: RuntimeError" in exit_info["reason"]
    assert_named_samples_are_those_in_hand(run_config, exit_info, ended[1])
    assert [each.exit_code for each in ended] == [1, -9]


def test_a_run_that_ends_well_leaves_no_progress(run_config: RunConfig, tmp_path: Path) -> None:
    """Finished ranks remove their progress files; exit.json has the outcome."""
    ended = run_to_the_end(2, cases.run_with_fault, run_config, -1, "none", folder=tmp_path, timeout_s=240)
    assert [each.exit_code for each in ended] == [0, 0], ended
    assert sorted(path.name for path in (run_config.run_dir / "log").iterdir()) == ["rank_000.log", "rank_001.log"]
    exit_info = json.loads((run_config.run_dir / "exit.json").read_text())
    assert exit_info == {"code": 0, "reason": "finished", "step": 3}
