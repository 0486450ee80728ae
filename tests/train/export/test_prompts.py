"""Tests that an export renders the prompt of the training, whether or not its tokenizer adds the beginning-of-sequence
token.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from llava_next.config import ANYRES, ModelConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.chat_template import is_bos_added, set_post_processor, template_from_tokenizer
from llava_next.model.build import build_model, read_backbone, read_tokenizer
from tests.oracles import real_tokenizers
from tests.tiny import tiny_model
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.export.__main__ import main

QUESTION = "What is shown?"
BOS_TEMPLATES = ("vicuna_v1", "mistral_instruct", "llava_llama_3")


def _run_with_export(config: RunConfig, model: ModelConfig) -> Path:
    """Returns the folder of a run that has written its export, with random weights."""
    config = replace(config, model=model)
    backbone = read_backbone(model)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    config.run_dir.mkdir(parents=True)
    write_hf(build_model(backbone, dtype=torch.float32, seed=1), backbone, processor, config.run_dir / "export")
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return config.run_dir


def _prompts(stock: Any, image: Image.Image) -> list[list[int]]:
    """Returns the ids by each way to call a processor."""
    words = {"type": "text", "text": QUESTION}
    text = stock.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, words]}], add_generation_prompt=True
    )
    shown = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    both = stock.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(stock(images=image, text=text)["input_ids"][0]), list(both["input_ids"][0])]


@pytest.mark.parametrize("template", BOS_TEMPLATES)
def test_a_tokenizer_that_adds_the_token_is_exported(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    """The program verifies the export, whose prompts have the token once in every way of calling; in the authors'
    layout the tokenizer adds it and the chat template does not print it."""
    model = tiny_model(tmp_path / "parts", template=template, kind="metaspace")
    assert is_bos_added(read_tokenizer(model.language_model.tokenizer_path))
    run_dir = _run_with_export(run_config, model)
    out = tmp_path / "out"
    assert main([str(run_dir), "--out", str(out)]) == 0, capsys.readouterr().err
    stock = AutoProcessor.from_pretrained(out)
    for ids in _prompts(stock, Image.new("RGB", (60, 40))):
        assert ids.count(stock.tokenizer.bos_token_id) == 1
        assert ids[0] == stock.tokenizer.bos_token_id
    assert stock.tokenizer.padding_side == "left"
    for path, source in ((tmp_path / "original", run_dir), (tmp_path / "original_of_hf", out)):
        command = ["--format", "original", "--out", str(path), "--vision-tower", "some/clip"]
        assert main([str(source), *command]) == 0, capsys.readouterr().err
        tokenizer = AutoTokenizer.from_pretrained(path)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
        assert not rendered.startswith(tokenizer.bos_token)
        assert tokenizer(rendered)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_an_export_of_before_is_corrected(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory whose chat template prints the token and whose tokenizer adds it too: the copy's tokenizer adds
    none."""
    model = tiny_model(tmp_path / "parts", template="vicuna_v1", kind="metaspace")
    old = _run_with_export(run_config, model) / "export"
    tokenizer = AutoTokenizer.from_pretrained(old)
    set_post_processor(tokenizer, add_bos=True)
    tokenizer.backend_tokenizer.save(str(old / "tokenizer.json"))
    settings = json.loads((old / "tokenizer_config.json").read_text())
    del settings["padding_side"], settings["add_bos_token"]
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    twice, once = _prompts(AutoProcessor.from_pretrained(old), Image.new("RGB", (60, 40)))
    assert len(twice) == len(once) + 1
    assert main([str(old.parent), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    stock = AutoProcessor.from_pretrained(tmp_path / "out")
    assert _prompts(stock, Image.new("RGB", (60, 40))) == [once, once]
    assert stock.tokenizer.padding_side == "left"


def test_answers_in_a_batch_are_those_of_one_by_one(run_config: RunConfig, tmp_path: Path) -> None:
    """A stock pipeline that pads as the exported tokenizer does, with prompts of different lengths."""
    model_config = tiny_model(tmp_path / "parts", template="vicuna_v1", kind="metaspace")
    export = _run_with_export(run_config, model_config) / "export"
    stock, model = AutoProcessor.from_pretrained(export), AutoModelForImageTextToText.from_pretrained(export)
    images = [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 90), "blue")]
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("What?", "What is written on the sign in line two?")
    ]
    texts = [stock.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]

    def answers(images: list[Image.Image], texts: list[str]) -> list[list[int]]:
        inputs = stock(images=images, text=texts, padding=True, return_tensors="pt")
        result = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return result[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

    alone = [answers([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    assert answers(images, texts) == alone


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_a_published_directory_is_prompted_as_its_processor_does(tmp_path: Path, name: str) -> None:
    """In released Hugging Face checkpoints the chat template prints no token and the tokenizer adds it. `template:
    tokenizer` starts samples with it; with a plain language model, whose tokenizer renders without it, it does not."""
    tokenizer = real_tokenizers.tokenizer(name)
    tokenizer.save_pretrained(tmp_path / "plain")
    again = AutoTokenizer.from_pretrained(tmp_path / "plain")
    set_post_processor(again, add_bos=True)
    again.chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] }}"
        "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    again.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "whole")
    (tmp_path / "whole" / "processor_config.json").write_text("{}")
    assert not template_from_tokenizer(read_tokenizer(str(tmp_path / "model"))).bos
    assert template_from_tokenizer(read_tokenizer(str(tmp_path / "whole"))).bos
