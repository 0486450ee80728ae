"""One folder and several runs: a second start, orphaned ranks, a finished run, the mistake of one rank."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.launch import Program, finish
from train import run as run_module
from train.config.schema import ConfigError, RunConfig
from train.distributed.launch import Launch
from train.distributed.world import World
from train.supervision.watchdog import Watchdog

OPTIONS = ("stage.init_from=null", "save.every=1")


@pytest.fixture
def program(tiny_parts: RunConfig, tmp_path: Path) -> Program:
    """The program with a folder of its own."""
    return Program(tiny_parts, tmp_path)


def exit_json(program: Program, name: str) -> dict[str, object]:
    """exit.json of a run."""
    values: dict[str, object] = json.loads((program.root / name / "finetune" / "exit.json").read_text())
    return values


@pytest.mark.full
def test_second_start_of_an_active_run_is_refused(program: Program) -> None:
    """It names the first one's host and process, exits with 2, and leaves nothing of the first one changed."""
    options = ("name=twice", "stage.epochs=300", "stage.init_from=null", "save.every=5")
    first = program.start("torchrun", *options)
    program.wait_for_step(first, "twice", 1)
    code, output = program.run("plain", *options)
    assert first.poll() is None
    assert code == 2, output
    assert "another run is active" in output
    assert "pid" in output
    first.terminate()
    _, output = finish(first)
    steps = [line["step"] for line in program.metrics("twice")]
    assert steps == list(range(len(steps))), output
    assert exit_json(program, "twice")["code"] == 75


@pytest.mark.full
def test_ranks_end_with_their_launcher(program: Program) -> None:
    """After `kill -9` of torchrun its ranks end, and the same command continues."""
    launcher = program.start("torchrun", "name=orphans", "stage.epochs=300", *OPTIONS)
    program.wait_for_step(launcher, "orphans", 1)
    os.kill(launcher.pid, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)  # the ranks have its pipe
    assert "launcher" in output
    assert "launcher" in str(exit_json(program, "orphans")["reason"])
    num_before = len(program.metrics("orphans"))
    code, output = program.run("torchrun", "name=orphans", "stage.epochs=300", f"max_steps={num_before + 1}", *OPTIONS)
    assert code == 0, output


class Built(Exception):
    """Raised in place of building a model."""


def test_finished_run_without_checkpoints_is_refused_before_its_model_is_built(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may take minutes to build. With `overwrite=true`, and in an empty folder, it is built."""

    def start(config: RunConfig) -> None:
        launch = Launch(0, 0, 1)
        run_module.run(config, launch, Watchdog(config.run_dir, launch, 60.0, 60.0))

    def assemble(*_: object) -> None:
        raise Built

    world = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
    monkeypatch.setattr(run_module, "_start_world", lambda *_: world)
    monkeypatch.setattr(run_module, "assemble", assemble)
    with pytest.raises(Built):
        start(run_config)
    (run_config.run_dir / "export").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"export exists: .* it has no checkpoint; .*overwrite=true"):
        start(run_config)
    with pytest.raises(Built):
        start(replace(run_config, overwrite=True))


@pytest.mark.full
def test_finished_run_without_checkpoints_is_not_trained_again(program: Program) -> None:
    """The same command is refused, with the key that allows it; with checkpoints it ends at once."""
    options = ("name=done", "stage.init_from=null", "save.every=0")
    assert program.run("plain", *options)[0] == 0
    metrics, export = program.metrics("done"), program.root / "done" / "finetune" / "export"
    written_ns = max(path.stat().st_mtime_ns for path in export.iterdir())
    code, output = program.run("plain", *options)
    assert code == 2, output
    assert "overwrite=true" in output
    assert program.metrics("done") == metrics
    code, output = program.run("plain", *options, "overwrite=true")
    assert code == 0, output
    assert max(path.stat().st_mtime_ns for path in export.iterdir()) > written_ns
    saved = ("name=saved", *OPTIONS)
    assert program.run("plain", *saved)[0] == 0
    metrics = program.metrics("saved")
    export = program.root / "saved" / "finetune" / "export"
    written_ns = max(path.stat().st_mtime_ns for path in export.iterdir())
    assert program.run("plain", *saved)[0] == 0
    assert max(path.stat().st_mtime_ns for path in export.iterdir()) == written_ns
    assert program.run("plain", *saved, "overwrite=true")[0] == 0
    assert max(path.stat().st_mtime_ns for path in export.iterdir()) > written_ns
    assert program.metrics("saved") == metrics


@pytest.mark.full
def test_mistake_of_one_rank_is_reported(program: Program, tmp_path: Path) -> None:
    """A folder that only rank 1 lacks: its sentence has rank and host."""
    (tmp_path / "a_file").write_text("")
    (tmp_path / "disk").mkdir()
    script = tmp_path / "start.sh"
    script.write_text(
        f'if [ "$RANK" = 1 ]; then export NODE_DISK={tmp_path}/a_file; else export NODE_DISK={tmp_path}/disk; fi\n'
        f'exec {sys.executable} -m train "$@"\n'
    )
    agent = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    process = program.start(
        "plain", "name=one", "data.local_dir=${oc.env:NODE_DISK}", *OPTIONS, agent=[*agent, "bash", str(script)]
    )
    code, output = finish(process)
    assert code != 0
    assert [line for line in output.splitlines() if line.startswith("error: rank 1 (") and "a_file" in line], output
