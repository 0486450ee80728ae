"""Owns the proof that README.md's commands run as they are printed: in a copy of the checkout, in the page's order.

The copy has what a reader has, only less of it: `SMALLER` cuts the quickstart's mixtures to steps that one can count.
The folders and files that the page leaves to the reader lie in it under the page's own words (RAW, DIR,
photograph.jpg). The quickstart is run first, as on the page; a command may stand on what those before it left. What a
mark `# needs ...` leaves out is checked in test_readme.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_recipes.demo_requests.demo_logs import Demo, photo
from tests.data_recipes.demo_requests.test_program import answered
from tests.house.readme import ROOT, Command, blocks, commands, yaml_files
from tests.tiny import SIZES_HW, encoded_picture
from tests.train.launch import finish

COPIED = ("configs", "data_recipes", "llava_next", "scripts", "train", "constraints.txt", "pyproject.toml")
SMALLER = {  # file of the copy -> what stands there, and what the small world has in its place
    "configs/mixture/quickstart_align.yaml": {"{count: null}": "{count: 32}"},
    "configs/mixture/quickstart_finetune.yaml": {
        "{count: 160, holdout: 16}": "{count: 12, holdout: 1}",
        "text_chats: {count: 24}": "text_chats: {count: 4}",
        "{count: 24, holdout: 8}": "{count: 4, holdout: 2}",
        "{count: 12, holdout: 8}": "{count: 2, holdout: 1}",
        "{count: 1100}": "{count: 2}",
    },
    "scripts/quickstart.sh": {"--limit 400 --num 200 --generate 2": "--limit 2 --num 2 --generate 0"},
}
GIVEN = {  # what a command says -> what it is here
    # The quickstart's tower and template, since its export stands for the published model.
    "model/vision_tower=clip_vit_l_336": "model/vision_tower=dinov2_small_70",
    "stage.template=vicuna_v1": "stage.template=chatml",
    "step_000110": "step_000002",  # stage 2's last one
    "57": "1",  # and one of its steps
}
ADDED = {  # the beginning of a command -> arguments that make it short
    "python -m train.chat": "--max-new-tokens 4",
    "python -m train.evaluate": "--num 2 --limit 2 --max-new-tokens 4",
    "python scripts/bench/input.py": "--parts lengths --samples 40",
    "python scripts/bench/balance.py": "--steps 20",
    "python scripts/bench/scale.py": "--quick",
    "python scripts/bench/adamw.py": "--millions 4 --rounds 2",
    "python scripts/bench/attention.py": "--rounds 1",
}
ELSEWHERE = {  # the program of a command -> the file that runs it, and how it names it
    "scripts/test.sh": (".ci/run", "scripts/test.sh"),
    "scripts/lmms_eval.sh": ("tests/scripts/test_lmms_eval.py", "lmms_eval.sh"),
    "scripts/vllm_env.sh": ("tests/scripts/test_vllm.py", "vllm_env"),
    "tests/scripts/test_vllm.py": ("tests/scripts/test_vllm.py", "pytest.mark.full"),
    "scripts/bench/step.py": ("tests/scripts/test_bench.py", 'load("step")'),
    "scripts/bench/plan.py": ("tests/scripts/test_bench_plan.py", 'load("plan")'),
    "scripts/bench/prepare.py": ("tests/scripts/test_bench_prepare.py", "scripts/bench/prepare.py"),
    "scripts/bench/save.py": ("tests/scripts/test_bench_save.py", "scripts/bench/save.py"),
}
PATIENCE_S = 900.0
QUICKSTART = "./scripts/quickstart.sh"


def program_elsewhere(command: Command) -> str | None:
    """Which of `ELSEWHERE` a command runs, if any."""
    return next((name for name in ELSEWHERE if name in [word.removeprefix("./") for word in command.words]), None)


RUN_HERE = [c for c in commands() if not c.needs and program_elsewhere(c) is None and c.text != QUICKSTART]


class World:
    """A reader's checkout.

    Args:
        folder: is filled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        for file, changes in SMALLER.items():
            text = (folder / file).read_text()
            for old, new in changes.items():
                assert text.count(old) == 1, f"{file} has no longer one {old!r}"
                text = text.replace(old, new)
            (folder / file).write_text(text)
        for file, text in yaml_files().items():
            (folder / file).write_text(text)

    def run(self, command: list[str], said: str = "") -> tuple[int, str]:
        """Exit code and output of a command, given `said` at its standard input."""
        hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
        kept = {key: value for key, value in os.environ.items() if key not in hidden}
        bin_folder = Path(sys.executable).parent
        (self.folder / "said").write_text(said)
        own = {
            "PATH": f"{bin_folder}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": str(self.folder),
            "LLAVA_NEXT_PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "said").open() as stdin:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**kept, **own},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        return finish(process, PATIENCE_S)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A checkout with a picture, raw data in the page's own layout, and a demo's logs, before any command."""
    world = World(tmp_path_factory.mktemp("checkout"))
    folder = world.folder
    (folder / "photograph.jpg").write_bytes(photo(1))
    images = folder / "RAW" / "mine" / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(28):
        name = f"{number}.png"
        (images / name).write_bytes(encoded_picture(number, SIZES_HW[number % len(SIZES_HW)]))
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"It is number {number}.")]
        conversations = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": name, "conversations": conversations})
    (images.parent / "train.json").write_text(json.dumps(records))
    demo = Demo(folder / "DEMO_LOGS")
    demo.ask("What is in the picture?", photo(2))
    demo.write()
    return world


@pytest.fixture(scope="module")
def quickstart(world: World) -> tuple[int, str]:
    """What the first command of the page ends with and says."""
    return world.run(["bash", "-c", QUICKSTART])


def as_given(command: Command) -> str:
    """The command as this small world wants it, with the arguments that make it short."""
    words = "|".join(rf"(?<![\w.]){re.escape(old)}(?![\w.])" for old in GIVEN)
    text = re.sub(words, lambda match: GIVEN[match[0]], command.text)
    more = next((more for start, more in ADDED.items() if text.startswith(start)), "")
    return f"{text} {more}"


def test_the_tables_of_this_file_speak_of_the_page() -> None:
    """Each line of them is used, and what is said to run elsewhere is named there."""
    programs = {program_elsewhere(command) for command in commands() if not command.needs}
    assert programs - {None} == set(ELSEWHERE)
    for file, name in ELSEWHERE.values():
        assert name in (ROOT / file).read_text(), f"{file} does not name {name}"
    text = "\n".join(command.text for command in RUN_HERE)
    assert [word for word in (*GIVEN, *ADDED) if word not in text] == []


@pytest.mark.full
def test_the_quickstart_comes_to_its_end(quickstart: tuple[int, str]) -> None:
    """All of its steps; and its summary says of a model that has learnt for four steps that it has learnt nothing."""
    code, output = quickstart
    assert "11/11 Summary" in output, output
    assert code == 1, output
    assert "quickstart: the check failed: " in output


@pytest.mark.full
@pytest.mark.parametrize("command", RUN_HERE, ids=lambda command: command.text)
def test_a_command_runs(world: World, quickstart: tuple[int, str], command: Command) -> None:
    """As it is printed, with exit code 0."""
    before(world, command)
    code, output = world.run(["bash", "-euo", "pipefail", "-c", as_given(command)], "What is it?\n")
    assert code == 0, output


def before(world: World, command: Command) -> None:
    """What a reader does between two commands: fetches a published model or connector, has requests answered.

    What is published is here made of the quickstart's result.
    """
    folder = world.folder
    if "=DIR" in command.text:
        (folder / "DIR").symlink_to("outputs/quickstart/finetune/export")
    if "=ORIGINAL" in command.text:
        export = ["outputs/quickstart/finetune", "--format", "original", "--out", "ORIGINAL"]
        code, output = world.run([sys.executable, "-m", "train.export", *export])
        assert code == 0, output
    if "path/to/mm_projector.bin" in command.text:
        write_theirs(folder / "outputs" / "quickstart" / "align" / "connector", folder / "path" / "to")
    if "demo_requests answer" in command.text:
        (requests,) = (folder / "RAW" / "demo_requests" / "requests").glob("*.jsonl")
        (line,) = requests.read_text().splitlines()
        (folder / "answers.jsonl").write_text(json.dumps(answered(json.loads(line))) + "\n")


def write_theirs(connector: Path, folder: Path) -> None:
    """A connector of ours as the authors would have saved it."""
    import torch
    from safetensors.torch import load_file

    (file,) = connector.glob("*.safetensors")
    names = {"linear_1": "0", "linear_2": "2"}
    tensors = {}
    for name, tensor in load_file(file).items():
        if "image_newline" not in name:
            layer, kind = name.split(".")[-2:]
            tensors[f"model.mm_projector.{names[layer]}.{kind}"] = tensor
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "mm_projector.bin")


@pytest.mark.full
@pytest.mark.parametrize("block", blocks("python"))
def test_a_block_of_python_runs(world: World, quickstart: tuple[int, str], block: str) -> None:
    """As it is printed."""
    code, output = world.run([sys.executable, "-c", block])
    assert code == 0, output
