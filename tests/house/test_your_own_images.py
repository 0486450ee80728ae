"""docs/your-own-images.md runs as printed, with a tiny checkpoint in place of the released one: from a folder with 300
images and a table to an answer of the tuned model.
"""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from llava_next.config import ANYRES
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from tests.house.pages import FENCE, WALKED, commands_of
from tests.house.test_pages_run import Checkout
from tests.tiny import SIZES_HW, encoded_picture, tiny_model

NUM_IMAGES, NUM_HELD_OUT = 300, 30
DOWNLOADED = Path("llava-v1.6-mistral-7b-hf")

pytestmark = pytest.mark.full


def write_folder(folder: Path) -> None:
    """The reader's folder: images, and a table whose last lines are captions."""
    (folder / "images").mkdir(parents=True)
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number in range(1, NUM_IMAGES + 1):
            name = f"{number:04d}.jpg"
            (folder / "images" / name).write_bytes(encoded_picture(number, SIZES_HW[number % len(SIZES_HW)]))
            table.writerow([name, "Which number is it?" if number <= 200 else "", f"It is number {number % 10}."])


def write_released_model(folder: Path, parts: Path) -> None:
    """A tiny model with random weights, in the layout of the released one."""
    backbone = read_backbone(tiny_model(parts, tower="clip", template="mistral_instruct"))
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(build_model(backbone, dtype=torch.float32, seed=7), backbone, processor, folder)


def test_page_runs_as_printed(tmp_path: Path) -> None:
    """Each block in the order of the page. The run has the samples that are not held out, the report shows questions,
    and the model answers."""
    pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
    checkout = Checkout(tmp_path)
    write_folder(tmp_path / "my_images")
    outputs = {}
    for language, block in FENCE.findall(WALKED.read_text()):
        if language == "python":
            code, output = checkout.run(["python", "-c", block])
            assert code == 0, output
        for command in commands_of(block) if language == "bash" else ():
            if command.needs:
                assert f"--local-dir {DOWNLOADED}" in command.text
                write_released_model(tmp_path / DOWNLOADED, tmp_path / "parts")
                continue
            code, output = checkout.run(["bash", "-euo", "pipefail", "-c", command.text])
            assert code == 0, f"{command.text}\n{output}"
            outputs[" ".join(command.words[:3])] = output
    run = tmp_path / "outputs" / "my_images" / "finetune"
    data = json.loads((run / "data.json").read_text())
    assert data["num_samples"] == NUM_IMAGES - NUM_HELD_OUT
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (num_steps,) = map(int, re.findall(r"samples are (\d+) steps", WALKED.read_text()))
    assert len(lines) == num_steps
    held_out = [line["eval/my_images/loss"] for line in lines if "eval/my_images/loss" in line]
    assert held_out[-1] < held_out[0]
    assert f"{NUM_IMAGES - NUM_HELD_OUT} samples" in outputs["python -m train.plan"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["by_source"]["my_images"]["num_samples"] == NUM_HELD_OUT
    assert "Questions and answers" in (run / "report.html").read_text()
    assert (run / "export" / "config.json").is_file()
    assert outputs["python -m train.chat"].strip()
