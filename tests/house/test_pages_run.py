"""Runs the commands of README.md and docs/ as printed, in the order of the pages, in a copy of the repository.

The copy is reduced: `SMALLER` cuts the quickstart's mixtures to a few steps. Files and folders that the reader provides
have the names of the page (RAW, DIR, photograph.jpg). The quickstart runs first, and a command may use the results of
earlier ones. Commands with a mark `# needs ...` are checked in test_pages.py.
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
from tests.data_recipes.demo_requests.test_program import make_answer
from tests.house.pages import PAGES, ROOT, WALKED, Command, blocks, commands, shown_programs, yaml_files
from tests.tiny import SIZES_HW, encoded_picture
from tests.train.launch import finish

COPIED = ("configs", "data_recipes", "llava_next", "scripts", "train", "constraints.txt", "pyproject.toml")
SMALLER = {  # {file: {text: replacement in the copy}}
    "configs/mixture/quickstart_align.yaml": {"{count: null}": "{count: 32}"},
    "configs/mixture/quickstart_finetune.yaml": {
        "{count: 336, holdout: 320}": "{count: 4, holdout: 2}",
        "{count: 48, holdout: 16}": "{count: 12, holdout: 1}",
        "text_chats: {count: 12}": "text_chats: {count: 2}",
        "{count: 16, holdout: 8}": "{count: 2, holdout: 2}",
        "{count: 8, holdout: 8}": "{count: 2, holdout: 1}",
        "{count: 80}": "{count: 2}",
    },
    "configs/mixture/quickstart_sets.yaml": {
        "{count: 2400, holdout: 320}": "{count: 8, holdout: 2}",
        "{count: 72}": "{count: 2}",
    },
    "scripts/quickstart.sh": {
        "--limit 320": "--limit 2",
        "--num-samples 320 --num-samples easy_vqa_test=20 --generate 6": "--num-samples 2 --generate 1",
        "--scale 0.3": "--scale 0.05",
    },
}
REPLACED = {  # {word of a command: replacement}
    # The quickstart's tower and template, because its export replaces the published model.
    "model/vision_tower=clip_vit_l_336": "model/vision_tower=dinov2_small_56",
    "stage.template=vicuna_v1": "stage.template=chatml",
    "step_000042": "step_000002",  # the last checkpoint of stage 2
    "37": "1",  # one of its steps
}
ADDED = {  # {start of a command: additional arguments that shorten it}
    "python -m train.chat": "--max-new-tokens 4",
    "python -m train.evaluate": "--num-samples 2 --limit 2 --max-new-tokens 4",
    "python scripts/quickstart/draw.py --set quickstart_sets": "--scale 0.01",
    "python scripts/bench/input.py stores": "--parts rate --pictures 3",
    "python scripts/bench/input.py batches": "--parts lengths --samples 40",
    "python scripts/bench/input.py archives": "--images 40",
    "python scripts/bench/plan.py balance": "--steps 20",
    "python scripts/bench/plan.py scale": "--quick",
}
ELSEWHERE = {  # {program, with its subcommand: (file that runs it, text of the file that names it)}
    "scripts/test.sh": (".ci/run", "scripts/test.sh"),
    "scripts/lmms_eval.sh": ("tests/scripts/test_lmms_eval.py", "lmms_eval.sh"),
    "scripts/vllm_env.sh": ("tests/scripts/test_vllm.py", "vllm_env"),
    "tests/scripts/test_vllm.py": ("tests/scripts/test_vllm.py", "pytest.mark.full"),
    "scripts/bench/step.py cpu": ("tests/scripts/test_bench_step.py", '["cpu", '),
    "scripts/bench/plan.py accuracy": ("tests/scripts/test_bench_plan.py", '["accuracy", '),
    "scripts/bench/save.py": ("tests/scripts/test_bench_save.py", '["--tiny", '),
}
PATIENCE_S = 900.0
QUICKSTART = "./scripts/quickstart.sh"


def program_elsewhere(command: Command) -> str | None:
    """Return the key of `ELSEWHERE` that a command runs, or None."""
    text = " ".join(word.removeprefix("./") for word in command.words) + " "
    return next((name for name in ELSEWHERE if f"{name} " in text), None)


PAGES_HERE = [page for page in PAGES if page != WALKED]
RUN_HERE = [c for c in commands(PAGES_HERE) if not c.needs and program_elsewhere(c) is None and c.text != QUICKSTART]


class Checkout:
    """A reader's copy of the repository.

    Args:
        folder: the folder to create it in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        for file, changes in SMALLER.items():
            text = (folder / file).read_text()
            for old, new in changes.items():
                assert text.count(old) == 1, f"{file} must contain {old!r} once"
                text = text.replace(old, new)
            (folder / file).write_text(text)
        for file, text in yaml_files().items():
            (folder / file).write_text(text)

    def run(self, command: list[str], stdin_text: str = "") -> tuple[int, str]:
        """Run a command with `stdin_text` at its standard input; return its exit code and output."""
        removed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
        environment = {key: value for key, value in os.environ.items() if key not in removed}
        bin_folder = Path(sys.executable).parent
        (self.folder / "stdin_text").write_text(stdin_text)
        overrides = {
            "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}",
            "PYTHONPATH": str(self.folder),
            "LLAVA_NEXT_PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "stdin_text").open() as stdin:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**environment, **overrides},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        return finish(process, PATIENCE_S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the repository with an image, raw data and a demo's logs, before any command."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    folder = checkout.folder
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
    return checkout


@pytest.fixture(scope="module")
def quickstart(checkout: Checkout) -> tuple[int, str]:
    """Exit code and output of the first command of the page."""
    return checkout.run(["bash", "-c", QUICKSTART])


def adapt_command(command: Command) -> str:
    """Return a command with the replacements and additional arguments of this test."""
    words = "|".join(rf"(?<![\w.]){re.escape(old)}(?![\w.])" for old in REPLACED)
    text = re.sub(words, lambda match: REPLACED[match[0]], command.text)
    more = next((more for start, more in ADDED.items() if text.startswith(start)), "")
    return f"{text} {more}"


def test_tables_are_used() -> None:
    """Every entry of the tables above is used, and commands that run elsewhere are named there."""
    programs = {program_elsewhere(command) for command in commands() if not command.needs}
    assert programs - {None} == set(ELSEWHERE)
    for file, name in ELSEWHERE.values():
        assert name in (ROOT / file).read_text(), f"{file} does not name {name}"
    text = "\n".join(command.text for command in RUN_HERE)
    assert [word for word in (*REPLACED, *ADDED) if word not in text] == []


@pytest.mark.full
def test_quickstart(quickstart: tuple[int, str]) -> None:
    """All steps run, and the summary reports that a model trained for four steps has not learned."""
    code, output = quickstart
    assert "12/12 Summary" in output, output
    assert code == 1, output
    assert "quickstart: the check failed: " in output


@pytest.mark.full
@pytest.mark.parametrize("command", RUN_HERE, ids=lambda command: command.text)
def test_command_runs(checkout: Checkout, quickstart: tuple[int, str], command: Command) -> None:
    """The command exits with code 0."""
    prepare_command(checkout, command)
    code, output = checkout.run(["bash", "-euo", "pipefail", "-c", adapt_command(command)], "What is it?\n")
    assert code == 0, output


def prepare_command(checkout: Checkout, command: Command) -> None:
    """Do what a reader does between two commands: download a published model or connector, have requests answered.

    Published models are replaced by the result of the quickstart.
    """
    folder = checkout.folder
    if "=DIR" in command.text:
        (folder / "DIR").symlink_to("outputs/quickstart/finetune/export")
    if "=ORIGINAL" in command.text:
        export = ["outputs/quickstart/finetune", "--format", "original", "--out", "ORIGINAL"]
        code, output = checkout.run([sys.executable, "-m", "train.export", *export])
        assert code == 0, output
    if "path/to/mm_projector.bin" in command.text:
        write_authors_connector(folder / "outputs" / "quickstart" / "align" / "connector", folder / "path" / "to")
    if "demo_requests answer" in command.text:
        (requests,) = (folder / "RAW" / "demo_requests" / "requests").glob("*.jsonl")
        (line,) = requests.read_text().splitlines()
        (folder / "answers.jsonl").write_text(json.dumps(make_answer(json.loads(line))) + "\n")


def write_authors_connector(connector: Path, folder: Path) -> None:
    """Write a connector in the authors' format."""
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


PROGRAM_TESTS = {"prefer.py": "tests/train/export/test_trl.py"}
"""Programs that a page shows: the files that run them with arguments."""


def test_shown_programs_are_run_elsewhere() -> None:
    """Each by the file of the table, which reads it from its page."""
    assert shown_programs().keys() == PROGRAM_TESTS.keys()
    assert all(name in (ROOT / file).read_text() for name, file in PROGRAM_TESTS.items())


@pytest.mark.full
@pytest.mark.parametrize(
    "block", [block for block in blocks("python", pages=PAGES_HERE) if block not in shown_programs().values()]
)
def test_python_block_runs(checkout: Checkout, quickstart: tuple[int, str], block: str) -> None:
    """The block runs as printed."""
    code, output = checkout.run([sys.executable, "-c", block])
    assert code == 0, output
