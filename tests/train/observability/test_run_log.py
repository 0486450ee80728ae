"""Tests of the run log: every step is once in metrics.jsonl, after kills and resumes too."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.config.schema import LogConfig, RunConfig
from train.observability.run_log import RunLog
from train.validation.live_answers import Answer

VALUES = {"train/loss": 1.23456789012, "lr/projector": 1e-3, "perf/tokens_per_s": 10.0, "perf/step_s": 0.5}


def logged(config: RunConfig, first: int, last: int, *, is_main: bool = True) -> None:
    """Logs steps `first` to `last` - 1 of a run, with an answer after every second one."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    log = RunLog(config, is_main=is_main, first_step=first, num_steps=9)
    for step in range(first, last):
        if step % 2:
            log.log_answers(step, [Answer("chats", "0007", "Why?", f"since {first}", "Därum", (5, 6))])
        log.log_step(step, {**VALUES, "run": float(first)})
    log.info("a sentence")
    log.close()


def lines(config: RunConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Returns the lines of a JSON lines file."""
    return [json.loads(line) for line in (config.run_dir / name).read_text().splitlines()]


def test_steps_that_run_again_replace_their_lines(run_config: RunConfig) -> None:
    """A resumed run removes the lines from its first step on, and a line that a kill cut off."""
    logged(run_config, 0, 6)
    path = run_config.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "train/lo')
    logged(run_config, 4, 8)
    assert [(line["step"], line["run"]) for line in lines(run_config)] == [
        *((step, 0.0) for step in range(4)),
        *((step, 4.0) for step in range(4, 8)),
    ]


def test_answers_to_steps_that_run_again_replace_theirs(run_config: RunConfig) -> None:
    """The same holds for answers, also if the resumed run generates none."""
    logged(run_config, 0, 6)
    logged(run_config, 3, 8)
    message = [(line["step"], line["answer"]) for line in lines(run_config, "answers.jsonl")]
    assert message == [(1, "since 0"), (3, "since 3"), (5, "since 3"), (7, "since 3")]
    line = lines(run_config, "answers.jsonl")[0]
    assert (line["source"], line["id"], line["question"], line["truth"]) == ("chats", "0007", "Why?", "Därum")
    RunLog(run_config, is_main=True, first_step=4, num_steps=9).close()
    assert [line["step"] for line in lines(run_config, "answers.jsonl")] == [1, 3]


def test_fresh_start_leaves_no_old_line(run_config: RunConfig) -> None:
    """A new run in an old folder has only its own steps."""
    logged(run_config, 0, 6)
    logged(run_config, 0, 2)
    assert [line["step"] for line in lines(run_config)] == [0, 1]


def test_only_rank_0_writes(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Other ranks write no file and print nothing."""
    logged(run_config, 0, 2, is_main=False)
    assert not (run_config.run_dir / "metrics.jsonl").exists()
    assert capsys.readouterr().err == ""


def test_every_thins_the_terminal_only(run_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """`log.every` affects the terminal only; the file has every step."""
    logged(replace(run_config, log=LogConfig(every=3)), 0, 7)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.strip().startswith("step ")]
    assert len(lines(run_config)) == 7
    assert 1 <= len(printed) <= 3


def test_numbers_are_strict_json(run_config: RunConfig) -> None:
    """NaN and Inf are written as valid JSON."""
    run_config.run_dir.mkdir(parents=True)
    log = RunLog(run_config, is_main=True, first_step=0, num_steps=1)
    log.log_step(0, {**VALUES, "train/grad_norm": float("nan")})
    log.close()
    text = (run_config.run_dir / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_kill_while_lines_are_dropped_loses_none(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter file replaces the longer one only when it is complete."""
    logged(run_config, 0, 6)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            logged(run_config, 4, 8)
    assert [line["step"] for line in lines(run_config)] == [0, 1, 2, 3, 4, 5]
    logged(run_config, 4, 8)
    assert [line["step"] for line in lines(run_config)] == list(range(8))
    assert {path.name for path in run_config.run_dir.iterdir()} == {"answers.jsonl", "metrics.jsonl"}


def test_tensorboard_has_every_step_once(run_config: RunConfig) -> None:
    """TensorBoard's readers find each step once, with the latest values, after a kill and two resumes; without the
    option there is no file."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="./scripts/setup.sh --extras tensorboard"
    )
    logged(run_config, 0, 2)
    assert not (run_config.run_dir / "tensorboard").exists()
    config = replace(run_config, log=LogConfig(tensorboard=True))
    for first, last in ((0, 6), (4, 5), (3, 8)):
        logged(config, first, last)
    result = accumulator.EventAccumulator(str(config.run_dir / "tensorboard")).Reload()
    assert sorted(result.Tags()["scalars"]) == sorted([*VALUES, "run"])
    read = {key: [(event.step, event.value) for event in result.Scalars(key)] for key in (*VALUES, "run")}
    assert read["run"] == [*((step, 0.0) for step in range(3)), *((step, 3.0) for step in range(3, 8))]
    assert [value for _, value in read["train/loss"]] == pytest.approx([line["train/loss"] for line in lines(config)])


@pytest.mark.full
def test_wandb_run_is_resumed(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, a run is written to the run folder without an account or a network. A resumed run is the same run in
    wandb, and steps that run again are not sent again."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replace(run_config, log=LogConfig(wandb="offline"))
    mixture = [{"source": "chats", "rejects": {"broken_image": 3}}, {"source": "pages", "rejects": {}}]
    data = {"mixture": mixture, "rejects_by_source": {"pages": {"no_supervised": 1, "too_long": 20}}}
    run_config.run_dir.mkdir(parents=True)
    (run_config.run_dir / "data.json").write_text(json.dumps(data))
    for first, last in ((0, 4), (2, 3), (3, 6)):  # stopped after step 2, and killed after 3; then after 3
        logged(config, first, last)
    files = sorted((run_config.run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    run_id = (run_config.run_dir / "wandb" / "run_id").read_text().strip()
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert len(files) == 3
    assert [step for path in files for step in wandb_steps(path)] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 4, 5]
    answers = [(step, row) for path in files for step, rows in wandb_tables(path, "answers") for row in rows]
    assert answers == [
        (step, [step, "chats", "0007", "Why?", f"since {run}", "Därum"]) for step, run in ((1, 0), (3, 0), (5, 3))
    ]
    for path in files:
        assert wandb_config(path)["data"] == data
        assert wandb_tables(path, "quarantine")[-1][1] == [
            ["chats", "preparing", "broken_image", 3],
            ["pages", "this run", "no_supervised", 1],
            ["pages", "this run", "too_long", 20],
        ]


def test_counts_stay_whole(run_config: RunConfig) -> None:
    """Counts of tokens keep all digits."""
    run_config.run_dir.mkdir(parents=True)
    log = RunLog(run_config, is_main=True, first_step=0, num_steps=1)
    log.log_step(0, {**VALUES, "seen/tokens": 123_456_789_012})
    log.close()
    assert lines(run_config)[0]["seen/tokens"] == 123_456_789_012


def wandb_config(path: Path) -> dict[str, Any]:
    """Returns the configuration in a wandb file."""
    updates = [entry for record in wandb_records(path) if record.HasField("run") for entry in record.run.config.update]
    return {entry.key: json.loads(entry.value_json) for entry in updates}


def wandb_tables(path: Path, name: str) -> list[tuple[int, list[list[Any]]]]:
    """Returns the tables of this name in the history of a run with their steps, or those of its summary."""
    history = [(record.history.step.num, item) for record in wandb_records(path) for item in record.history.item]
    summary = [(0, item) for record in wandb_records(path) for item in record.summary.update]
    for items in (history, summary):
        whole = [(step, json.loads(item.value_json)["path"]) for step, item in items if item.key == name]
        whole += [(step, json.loads(item.value_json)) for step, item in items if item.nested_key == [name, "path"]]
        if whole:
            return [(step, json.loads((path.parent / "files" / table).read_text())["data"]) for step, table in whole]
    return []


def wandb_steps(path: Path) -> list[int]:
    """Returns the steps in a wandb file, which another process may still be writing."""
    deadline = time.monotonic() + 60
    while not (result := wandb_records(path)) or not result[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.2)
    return [record.history.step.num for record in result if record.HasField("history")]


def wandb_records(path: Path) -> list[Any]:
    """Reads protobufs in LevelDB's log format: blocks of 32 KiB with records in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, piece, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        piece += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            records.append(Record.FromString(piece))
            piece = b""
    return records
