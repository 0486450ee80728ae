"""Tests of the program as a user runs it: three launchers give one result; the content of the run folder; stops, kills
and resumes.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import HostilePickle, tiny_vision_tower
from tests.train.launch import LAUNCHERS, ROOT, Program, finish, kill_all, ranks_of
from train.config.compose import load_yaml
from train.config.schema import RunConfig

FRESH = "stage.init_from=null"
LONG = (FRESH, "stage.epochs=12", "save.every=0")  # 37 steps


@pytest.fixture(scope="module")
def program(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program with the tiny run's parts."""
    return Program(tiny_parts, tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def by_torchrun(program: Program) -> list[dict[str, Any]]:
    """The metrics of a run of two ranks under torchrun."""
    code, output = program.run("torchrun", "name=torchrun", FRESH)
    assert code == 0, output
    return program.metrics("torchrun")


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Returns the loss of each step."""
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["train/loss"] for line in lines]


def test_run_folder_is_complete(program: Program, by_torchrun: list[dict[str, Any]]) -> None:
    """A finished run has its configuration, the counts of its data, one line per step, a log of each rank, exit.json, a
    checkpoint, and a model that stock transformers loads."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    folder = program.root / "torchrun" / "finetune"
    assert len(losses(by_torchrun)) == 4
    assert load_yaml(folder / "config.yaml").run_dir == folder
    about = json.loads((folder / "data.json").read_text())
    assert (about["num_samples"], about["rejects"]) == (40, {})
    assert sum(row["used"] for row in about["mixture"]) == 40
    assert json.loads((folder / "export" / "data.json").read_text()) == about
    assert (folder / "quarantine.jsonl").read_text() == ""
    assert sorted(path.name for path in (folder / "log").iterdir()) == ["rank_000.log", "rank_001.log"]
    assert "started afresh" in (folder / "log" / "rank_000.log").read_text()
    assert json.loads((folder / "exit.json").read_text()) == {"code": 0, "reason": "finished", "step": 3}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000004"]
    assert not list(folder.glob("*.partial"))
    model, actual = LlavaNextForConditionalGeneration.from_pretrained(folder / "export", output_loading_info=True)
    assert [problem for problem in actual.values() if problem] == []
    processor = LlavaNextProcessor.from_pretrained(folder / "export")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index


@pytest.mark.full
@pytest.mark.parametrize("hostile", [False, True])
def test_a_run_starts_from_the_authors_connector(program: Program, tiny_parts: RunConfig, hostile: bool) -> None:
    """`stage.init_from=path/to/mm_projector.bin`: the start reports, in the terminal and the log, what was loaded and
    what starts fresh. A file that would run code is rejected with one sentence and exit code 2, and runs none."""
    import torch

    from llava_next.model.build import build_model, read_backbone

    model = build_model(read_backbone(tiny_parts.model), dtype=torch.float16, seed=5).hf.model
    numbers = {"linear_1": 0, "linear_2": 2}
    tensors: dict[str, Any] = {
        f"model.mm_projector.{numbers[layer]}.{name}": tensor.detach()
        for layer, module in model.multi_modal_projector.named_children()
        for name, tensor in module.named_parameters()
    }
    marker, file = program.folder / "it_ran", program.folder / f"hostile_{hostile}" / "mm_projector.bin"
    if hostile:
        tensors["model.mm_projector.0.bias"] = HostilePickle(marker)
    file.parent.mkdir()
    torch.save(tensors, file)
    options = (f"name=from_authors_{hostile}", f"stage.init_from={file}", "max_steps=1", "save.every=0")
    code, output = program.run("plain", *options)
    if hostile:
        assert code == 2, output
        assert re.search(rf"^error: stage\.init_from={file} imports posix\.system, .*$", output, re.MULTILINE)
        assert "Traceback" not in output
        assert not marker.exists()
        return
    assert code == 0, output
    log = (program.root / options[0].removeprefix("name=") / "finetune" / "log" / "rank_000.log").read_text()
    printed = f"starts with the projector (mlp2x_gelu, float16) from {file}, without image_newline"
    assert printed in output
    assert printed in log


@pytest.mark.full
def test_a_siglip_tower_is_shown_whole_images(program: Program, tmp_path: Path) -> None:
    """The shipped SigLIP tower trains stage 1 on squashed images, and the start names the file that sets it. A custom
    SigLIP tower crops, and the start names the setting that does not; a run cannot resume with the other mode."""
    tower = tiny_vision_tower(tmp_path / "siglip", "siglip")
    own = (f"model.vision_tower.path={tower}", "model.vision_tower.weights=random", "max_steps=1", "save.every=1")
    shipped = ("stage=align", "model/vision_tower=siglip_so400m_384", *own)
    code, output = program.run("plain", "name=shipped_siglip", *shipped)
    assert code == 0, output
    assert "vision_tower/siglip_so400m_384_align.yaml" in output
    assert "the centre of an image" not in output
    assert load_yaml(program.root / "shipped_siglip" / "align" / "config.yaml").stage.views.modes == {"squash"}
    mine = ("name=own_siglip", "stage=align", *own)
    code, output = program.run("plain", *mine)
    assert code == 0, output
    assert "changed for this vision tower" not in output
    assert "crop shows the centre of an image only" in output
    code, output = program.run("plain", *mine, "stage.views.single=squash")
    assert code == 2, output
    assert "stage.views.single was crop, is squash" in output
    code, output = program.run("plain", *mine, "max_steps=2")
    assert code == 0, output
    assert "resumed from" in output


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["plain", "deepspeed"])
def test_launchers_agree(program: Program, by_torchrun: list[dict[str, Any]], launcher: str) -> None:
    """A single process, torchrun and the deepspeed launcher give the same losses."""
    code, output = program.run(launcher, f"name={launcher}", FRESH)
    assert code == 0, output
    assert losses(program.metrics(launcher)) == pytest.approx(losses(by_torchrun), rel=1e-5)


@pytest.mark.full
def test_two_stages_with_one_command_line(program: Program) -> None:
    """With another `stage=`, the second stage finds the connector of the first; starting a finished run again does
    nothing, with exit code 0."""
    starts = ("started afresh", "starts with the connector from", "resumed from")
    for stage, start in zip(("align", "finetune", "finetune"), starts, strict=True):
        code, output = program.run("plain", "name=both", f"stage={stage}")
        assert code == 0, output
        assert f"stage {stage}, {start}" in output
    assert (program.root / "both" / "align" / "connector" / "contract.json").is_file()
    assert (program.root / "both" / "finetune" / "export" / "config.json").is_file()
    assert len(losses(program.metrics("both"))) == len(losses(program.metrics("both", "align"))) == 4
    first, second = map(json.loads, (program.root / "both" / "finetune" / "starts.jsonl").read_text().splitlines())
    assert [(start["step"], start["ranks"], start["device"]) for start in (first, second)] == [
        (0, 1, "cpu"),
        (4, 1, "cpu"),
    ]
    assert second["origin"].startswith("resumed from")
    assert second["versions"] == first["versions"]


@pytest.fixture(scope="module")
def uninterrupted(program: Program) -> list[float]:
    """The losses of a long uninterrupted run."""
    code, output = program.run("plain", "name=uninterrupted", *LONG)
    assert code == 0, output
    return losses(program.metrics("uninterrupted"))


@pytest.mark.full
@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name
)
def test_asked_to_stop(program: Program, uninterrupted: list[float], number: signal.Signals, whole_group: bool) -> None:
    """SIGTERM, Slurm's SIGUSR1, SIGHUP and Ctrl-C, sent to the program or (as a terminal and a scheduler do) to all of
    its processes: a checkpoint, exit code 75, and the same command resumes with the losses of an uninterrupted run."""
    name = f"stopped_{number.name}_{whole_group}"
    process = program.start("plain", f"name={name}", *LONG)
    program.wait_for_step(process, name, 3)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, output = finish(process)
    assert code == 75, output
    assert "run the same command again" in output
    done = len(program.metrics(name))
    assert 4 <= done < len(uninterrupted)
    folder = program.root / name / "finetune"
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    code, output = program.run("plain", f"name={name}", *LONG)
    assert code == 0, output
    assert f"at step {done}" in output
    assert losses(program.metrics(name)) == uninterrupted


@pytest.mark.full
def test_closed_terminal(program: Program) -> None:
    """If its terminal is closed, a run saves and exits with 75, although nothing that it prints can be written."""
    terminal, side = os.openpty()
    process = subprocess.Popen(
        program.command("plain", "name=hung_up", *LONG), cwd=ROOT, preexec_fn=lambda: os.login_tty(side)
    )
    os.close(side)
    while len(program.metrics("hung_up")) <= 2:
        os.read(terminal, 65536)  # returns what the run has written
    os.close(terminal)
    assert process.wait(60) == 75
    done = len(program.metrics("hung_up"))
    folder = program.root / "hung_up" / "finetune"
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{done:06d}"]


@pytest.mark.full
def test_nohup_goes_on(program: Program, uninterrupted: list[float]) -> None:
    """A run that has inherited SIGHUP as ignored goes on after a hangup, at its start and in its steps."""
    process = program.start("plain", "name=nohup", *LONG, agent=["nohup", *LAUNCHERS["plain"]])
    program.wait_for_step(process, "nohup", 2)
    os.killpg(process.pid, signal.SIGHUP)
    code, output = finish(process)
    assert code == 0, output
    assert losses(program.metrics("nohup")) == uninterrupted


@pytest.mark.full
def test_killed_run_resumes_from_its_checkpoint(program: Program, uninterrupted: list[float]) -> None:
    """A killed run resumes from its newest checkpoint, and its metrics have every step once."""
    options = ("name=killed", *LONG[:2], "save.every=3", "save.keep=2")
    process = program.start("plain", *options)
    program.wait_for_step(process, "killed", 7)
    kill_all(process)
    process.communicate()
    code, output = program.run("plain", *options)
    assert code == 0, output
    assert "resumed from" in output
    assert losses(program.metrics("killed")) == uninterrupted


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_dead_rank_ends_the_run(program: Program, launcher: str) -> None:
    """If one rank is killed, no other waits forever, and the launcher reports a failure."""
    name = f"dead_{launcher}"
    process = program.start(launcher, f"name={name}", *LONG)
    program.wait_for_step(process, name, 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, output = finish(process)
    assert code != 0, output
    assert len(program.metrics(name)) < 37


@pytest.mark.full
def test_stuck_rank_ends_the_run(program: Program) -> None:
    """If one rank hangs, the others give up after `timeout_s`, name it, and the run ends."""
    process = program.start("torchrun", "name=stuck", *LONG, "timeout_s=8")
    program.wait_for_step(process, "stuck", 2)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    started = time.monotonic()
    code, output = finish(process)
    assert code != 0, output
    assert "error: rank 1 (" in output
    message = json.loads((program.root / "stuck" / "finetune" / "exit.json").read_text())
    assert (message["code"], message["rank"]) == (1, 1)
    assert message["step"] >= 2
    # The collective's timeout, and torchrun's own 30 seconds for the rank that does not end.
    assert time.monotonic() - started < 8 + 30 + 20


@pytest.mark.full
def test_torchrun_passes_a_stop_on(program: Program, uninterrupted: list[float]) -> None:
    """SIGTERM to torchrun reaches the ranks, which save within its 30 seconds; the same command then resumes on two
    ranks. torchrun's own exit code cannot be chosen."""
    process = program.start("torchrun", "name=stopped_torchrun", *LONG)
    program.wait_for_step(process, "stopped_torchrun", 3)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0, output
    done = len(program.metrics("stopped_torchrun"))
    assert done < len(uninterrupted)
    code, output = program.run("torchrun", "name=stopped_torchrun", *LONG)
    assert code == 0, output
    assert f"at step {done}" in output
    assert losses(program.metrics("stopped_torchrun")) == pytest.approx(uninterrupted, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "expected"), [("torchrun", 1), ("deepspeed", 2)])
def test_error_is_printed_once_under_a_launcher(program: Program, launcher: str, expected: int) -> None:
    """Two ranks with a wrong key: one of them prints the error. The deepspeed launcher passes exit code 2 on, torchrun
    turns it into 1."""
    code, output = program.run(launcher, "name=mistake", "packing.max_token=3")
    assert code == expected, output
    assert output.count("error: packing.max_token:") == 1, output


@pytest.mark.full
def test_refused_resume_changes_nothing(program: Program) -> None:
    """A start that a checkpoint rejects has exit code 2 and leaves the folder unchanged."""
    code, output = program.run("plain", "name=refused", FRESH)
    assert code == 0, output
    folder = program.root / "refused" / "finetune"
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "data.json", "metrics.jsonl")}
    code, output = program.run("plain", "name=refused", FRESH, "seed=5")
    assert code == 2, output
    assert output.count("error: ") == 1
    assert "is of a run with other settings: seed was 0, is 5. Restore them" in output
    assert {name: (folder / name).read_bytes() for name in before} == before
