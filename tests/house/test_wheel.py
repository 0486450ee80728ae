"""A wheel of the project works outside of a checkout."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_next.__main__ import _PROGRAMS
from tests.data_recipes.demo_requests.demo_logs import Demo, photo
from tests.tiny import SIZES_HW, encoded_picture, tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, as in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Of a copy: setuptools leaves build/ behind, and takes what it finds there into the next wheel.
    source = folder / "source"
    ignored = {".git", ".venv", "build", "outputs", "tests"}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in files:
        if name and name.split("/")[0] not in ignored:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`llava-next` of the wheel, started in a folder that has nothing of the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-P", "-m", "llava_next", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_wheel_has_what_the_checkout_has(installed: Path) -> None:
    """Configurations, page templates and the marks of typed packages, besides the modules."""
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.relative_to(installed / "llava_next_configs") for path in installed.rglob("*.yaml")} == shipped
    templates = ROOT / "train" / "html" / "templates"
    assert all((installed / "train" / "html" / "templates" / path.name).is_file() for path in templates.iterdir())
    assert all((installed / name / "py.typed").is_file() for name in ("llava_next", "data_recipes", "train"))


def test_commands_of_a_wheel(installed: Path, tmp_path: Path) -> None:
    """A configuration, a plan, and the refusal of missing raw data, each with shipped YAML files."""
    printed = run(installed, tmp_path, "train", "--cfg", "job", "name=x", "mixture=lcs_558k")
    assert printed.returncode == 0, printed.stderr
    assert "lcs_558k" in printed.stdout
    planned = run(installed, tmp_path, "plan", "model/language_model=vicuna_7b", "hardware=h200_141g", "stage=finetune")
    assert planned.returncode in (0, 1), planned.stderr
    assert "GPU-hours" in planned.stdout
    refused = run(installed, tmp_path, "prepare", "--mixture", "lcs_558k", "--raw", "raw", "--stores", "stores")
    assert refused.returncode == 2
    assert "raw" in refused.stderr
    assert "Traceback" not in refused.stderr


MINE: Mapping[str, Mapping[str, Any]] = {
    "source/mine.yaml": {
        "reader": "llava_json",
        "root": "mine",
        "options": {"annotations": "train.json", "image_root": "images"},
    },
    "mixture/mine.yaml": {"name": "mine", "seed": 0, "sources": {"mine": {"count": None, "holdout": 4}}},
}


def write_inputs(folder: Path) -> None:
    """What a user brings: raw data, logs of a demo, parts of a model, YAML files of her own."""
    images = folder / "raw" / "mine" / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(20):
        (images / f"{number}.png").write_bytes(encoded_picture(number, SIZES_HW[number % len(SIZES_HW)]))
        turns = (("human", "<image>\nWhat is it?"), ("gpt", f"It is number {number}."))
        conversations = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": conversations})
    (images.parent / "train.json").write_text(json.dumps(records))
    demo = Demo(folder / "logs")
    demo.ask("What is in the picture?", photo(2))
    demo.write()
    model = tiny_model(folder / "parts")
    parts = {
        "model/language_model/tiny.yaml": asdict(model.language_model),
        "model/vision_tower/tiny.yaml": asdict(model.vision_tower),
    }
    for name, values in {**MINE, **parts}.items():
        path = folder / "my_configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))  # tuples become lists


def test_every_command_of_a_wheel(installed: Path, tmp_path: Path) -> None:
    """From raw data to an answer, in an empty folder, with YAML files of one's own beside the shipped ones."""
    write_inputs(tmp_path)
    config_dir = ["--config-dir", "my_configs"]
    model = ["model/language_model=tiny", "model/vision_tower=tiny", "stage.max_length=512"]
    data = ["mixture=mine", "data.store_root=stores", "data.workers=0", "stage.batch_size=8"]
    budgets = ["packing.max_tokens=640", "packing.max_tiles=24", "device=cpu"]
    tiny = [*config_dir, "name=tiny", *model, *data, *budgets]
    run_folder = "outputs/tiny/finetune"
    commands = [
        ["guess", "raw/mine", "--raw", "raw"],
        ["prepare", "--mixture", "mine", "--raw", "raw", "--stores", "stores", *config_dir],
        ["demo-requests", "collect", "--logs", "logs", "--out", "requests", "--model", "stronger"],
        ["inspect", "stores/mine", *config_dir, *model, "stage=finetune", "--num", "2"],
        ["plan", *tiny, "hardware=cpu"],
        ["train", "--nproc", "2", *tiny, "stage=align"],
        ["train", *tiny, "stage=finetune"],
        ["evaluate", run_folder, "--max-new-tokens", "4"],
        ["evaluate", "--nproc", "2", run_folder, "--max-new-tokens", "4", "--out", "again.json"],
        ["inspect", run_folder, "--step", "1", "--loss"],
        ["export", run_folder, "--format", "original", "--out", "original"],
        ["report", "outputs/tiny/align", run_folder, "--out", "report.html"],
        ["chat", run_folder, "raw/mine/images/1.png", "--ask", "What is it?", "--max-new-tokens", "4"],
        ["accept", "--nproc", "2", "--out", "accepted", "--quick"],
    ]
    # `fetch` needs a publisher: tests/llava_next/test_command.py starts it.
    assert {command[0] for command in commands} == set(_PROGRAMS) - {"fetch"}
    for command in commands:
        ended = run(installed, tmp_path, *command)
        assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
        assert str(ROOT) not in ended.stdout + ended.stderr
    assert (tmp_path / run_folder / "export" / "config.json").is_file()
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "accepted" / "report.json").is_file()


def test_version_of_a_wheel(installed: Path, tmp_path: Path) -> None:
    """That of its metadata."""
    (metadata,) = installed.glob("llava_next_train-*.dist-info")
    printed = run(installed, tmp_path, "--version")
    assert printed.stdout.strip() == metadata.name.removesuffix(".dist-info").rpartition("-")[2]
