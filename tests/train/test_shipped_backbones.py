"""Tests that every class of language model and tower in configs/model/ runs both stages, export and reload, from the
command line with its real tokenizer.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_next.config import ModelConfig
from llava_next.formats.onevision import load_processor
from llava_next.model.build import build_model, read_backbone
from tests.llava_next.models import mixed, row
from tests.oracles.real_tokenizers import STAND_INS
from tests.tiny import encoded_picture, tiny_mixture
from tests.train import shipped
from tests.train.launch import ROOT, share_compiled_ops
from tests.train.pair_results import record
from train.chat import main as chat
from train.config.compose import load_yaml

QUESTIONS = ("What is in the image?", "Read the text in the image, line by line.")
SIZES_HW = ((60, 45), (31, 90))
PAIRS = [
    ("vicuna_7b", "clip_vit_l_336", "zero2", ""),
    ("hermes_yi_34b", "dinov2_large", "zero3", "language_model"),
    ("llama3_8b", "clip_vit_l_336", "zero1", "vision_tower"),
    ("mistral_7b", "clip_vit_l_336", "zero3", ""),
    ("qwen2_5_0_5b", "clip_vit_l_336", "zero3", "language_model,vision_tower"),
    ("qwen2_5_7b", "siglip2_so400m_384", "zero2", ""),
    ("qwen1_5_0_5b", "siglip_so400m_384", "zero2", "language_model,vision_tower"),
    ("qwen2_7b", "clip_vit_l_336", "zero0", ""),
    ("qwen3_8b", "siglip2_so400m_384", "zero3", "language_model"),
    ("qwen3_0_6b", "siglip_so400m_384", "zero2", ""),
    ("llama3_1_8b", "siglip2_so400m_384", "zero2", "vision_tower"),
    ("llama3_2_1b", "clip_vit_l_336", "zero3", ""),
    ("gemma3_1b", "siglip2_so400m_384", "zero3", ""),
    ("phi4_mini", "clip_vit_l_336", "zero2", "language_model"),
    ("smollm2_135m", "dinov2_small_70", "zero1", "language_model"),
    ("smollm3_3b", "siglip_so400m_384", "zero2", "vision_tower"),
    ("smollm2_135m", "dinov2_registers_large", "zero3", ""),
]
"""Language model, tower, engine of stage 2, recomputed parts."""
FIRST_ENGINES = {"zero2": "zero3", "zero3": "zero2"}
"""Engine of stage 1, where it is another than that of stage 2."""


def test_every_shipped_configuration_is_of_a_family_that_is_run() -> None:
    """A new file in configs/model/ needs a row here."""
    families = {name for name, family in shipped.FAMILIES.items() for name in (name, *family.members)}
    assert families | {"released"} == _files("language_model")
    assert {*shipped.TOWERS, "dinov2_small_112", "dinov2_small_56", "released"} == _files("vision_tower")
    assert {language_model for language_model, *_ in PAIRS} == shipped.FAMILIES.keys()
    assert {tower for _, tower, *_ in PAIRS} == shipped.TOWERS.keys()


def _files(kind: str) -> set[str]:
    return {path.stem for path in (shipped.MODEL_CONFIGS / kind).glob("*.yaml")}


@pytest.mark.full
@pytest.mark.parametrize(("language_model", "tower", "engine", "recompute"), PAIRS, ids=lambda value: value or "none")
def test_both_stages_export_and_answers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
    language_model: str,
    tower: str,
    engine: str,
    recompute: str,
) -> None:
    """Two steps of each stage; a sample in a packed row has its loss alone; the verified export of the checkpoint; the
    Auto classes load it, both ways of prompting agree, and a batch of two gives the answers of each alone. Of a tower
    with registers, stock transformers loads the export and cannot run it."""
    export, message = _train_and_export(tmp_path, language_model, tower, engine, f"recompute=[{recompute}]")
    config = load_yaml(tmp_path / "runs" / "pair" / "finetune" / "config.yaml").model
    difference = packed_difference(config)
    assert difference <= 2e-6
    same_logits = re.search(r"gives the same logits \(largest difference (\S+) of their norm", message)
    if "registers" in tower:
        assert "logits NOT compared, because it cannot run: " in message
        answers = "refused"
    else:
        assert same_logits, message
        _check_answers(AutoProcessor.from_pretrained(export), export)
        _check_chat(tmp_path, export, capsys)
        answers = "a batch as one by one; chat"
    file: Path | None = pytestconfig.getoption("--record-pairs")
    if file is None:
        return
    template = config.language_model.template
    pair = {
        "language_model": language_model,
        "vision_tower": tower,
        "tokenizer": "stand-in" if shipped.FAMILIES[language_model].tokenizer in STAND_INS else "real",
        "template": template if isinstance(template, str) else "in its file",
        "zero_stages": [int(each.removeprefix("zero")) for each in (FIRST_ENGINES.get(engine, engine), engine)],
        "recompute": recompute.split(",") if recompute else [],
        "packed_difference": difference,
        "exported_as": json.loads((export / "config.json").read_text())["model_type"],
        "logits_difference": float(same_logits[1]) if same_logits else None,
        "answers": answers,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
    }
    record(file, pair)


def packed_difference(config: ModelConfig) -> float:
    """The largest relative difference between losses of samples in a packed row and alone.

    Weights are drawn so widely that attention is not uniform: a wrong position or segment changes the loss.
    """
    overrides = {**config.language_model.overrides, "initializer_range": 0.3}
    language_model = replace(config.language_model, weights="random", overrides=overrides)
    backbone = read_backbone(replace(config, language_model=language_model))
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
    examples = [sample.example for sample in mixed(backbone)]
    with torch.no_grad():
        alone = torch.cat([model(row(backbone, [example]))[1][:1] for example in examples])
        packed = model(row(backbone, examples))[1][: len(examples)]
    assert len(set(alone.tolist())) == len(examples)
    return float((packed / alone - 1).abs().max())


@pytest.mark.full
@pytest.mark.parametrize(
    ("language_model", "tower", "engine"),
    [("qwen2_7b", "siglip_so400m_384", "zero3"), ("vicuna_7b", "clip_vit_l_336", "zero2")],
)
def test_onevision_views_with_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], language_model: str, tower: str, engine: str
) -> None:
    """The same with OneVision's views, adapters and recomputation of both parts. The stock processor needs torchvision,
    so ours, which leaves out its videos, takes its place."""
    adapters = "{rank:4,alpha:8,targets:[q_proj,v_proj]}"
    export, message = _train_and_export(
        tmp_path,
        language_model,
        tower,
        engine,
        "stage.views={single:anyres_max_9,several:pad,closing_newline:true}",
        "recompute=[language_model,vision_tower]",
        f"lora={{language_model:{adapters}}}",
    )
    assert "gives the same logits" in message
    assert json.loads((export / "config.json").read_text())["model_type"] == "llava_onevision"
    _check_answers(load_processor(export), export)
    _check_chat(tmp_path, export, capsys)


@pytest.mark.full
def test_a_sliding_window_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with a window that is shorter than the samples, at ZeRO-3, with adapters and recomputation of both
    parts; the export has the window."""
    export, message = _train_and_export(
        tmp_path,
        "mistral_7b",
        "clip_vit_l_336",
        "zero3",
        "+model.language_model.overrides.sliding_window=48",
        "recompute=[language_model,vision_tower]",
        "lora={language_model:{rank:4,alpha:8,targets:[q_proj,v_proj]}}",
    )
    assert "gives the same logits" in message
    assert json.loads((export / "config.json").read_text())["text_config"]["sliding_window"] == 48
    _check_answers(AutoProcessor.from_pretrained(export), export)
    _check_chat(tmp_path, export, capsys)


def _train_and_export(tmp_path: Path, language_model: str, tower: str, engine: str, *finetune: str) -> tuple[Path, str]:
    """Both stages and the verified export of the last checkpoint, with what was printed about it; `finetune`: overrides
    of the second stage."""
    share_compiled_ops(tmp_path)
    shipped.write_language_model(language_model, tmp_path)
    shipped.write_vision_tower(tower, tmp_path)
    mixture, stores = tiny_mixture(tmp_path, 8)
    (tmp_path / "configs" / "mixture").mkdir(parents=True)
    (tmp_path / "configs" / "mixture" / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(mixture)))))
    command = [
        *("train", "--config-dir", str(tmp_path / "configs"), "name=pair", f"root={tmp_path}/runs", "mixture=tiny"),
        *(f"model/language_model={language_model}", f"model/vision_tower={tower}", *shipped.TOWERS[tower]),
        *(f"data.store_root={stores}", "data.workers=0", "data.length_workers=1", "device=cpu", "timeout_s=60"),
        *("stage.batch_size=4", "stage.max_length=2048", "packing.max_tokens=2048", "packing.max_tiles=16"),
        "save.every=2",
    ]
    _run(tmp_path, *command, f"engine={FIRST_ENGINES.get(engine, engine)}", "stage=align")
    assert (tmp_path / "runs" / "pair" / "align" / "connector" / "contract.json").is_file()
    _run(tmp_path, *command, f"engine={engine}", "stage=finetune", *finetune)
    export = tmp_path / "export"
    message = _run(
        tmp_path, "train.export", f"{tmp_path}/runs/pair/finetune/checkpoints/step_000002", "--out", str(export)
    )
    return export, message


def _check_chat(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "image.png"
    picture.write_bytes(encoded_picture(0, SIZES_HW[0]))
    assert chat([str(export), str(picture), "--ask", QUESTIONS[0], "--max-new-tokens", "4"]) == 0
    assert "error" not in capsys.readouterr().err


def _run(folder: Path, *command: str) -> str:
    environment = os.environ | {
        "LLAVA_NEXT_MODELS": str(folder),
        "LLAVA_NEXT_CACHE": str(folder),
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _check_answers(stock: Any, export: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    images = [Image.effect_noise((width, height), 60).convert("RGB") for height, width in SIZES_HW]
    texts, prompts = [], []
    for image, question in zip(images, QUESTIONS, strict=True):
        content: list[dict[str, Any]] = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        texts.append(stock.apply_chat_template(turn, add_generation_prompt=True))
        tokenized = stock.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
        prompts.append(tokenized["input_ids"][0])

    def answers(images: list[Image.Image], texts: list[str]) -> list[list[int]]:
        inputs = stock(images=images, text=texts, padding=True, return_tensors="pt")
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        assert rows == [list(prompts[texts_all.index(text)]) for text in texts]
        result = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return result[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

    texts_all = list(texts)
    alone = [answers([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    assert answers(images, texts) == alone
    bos = stock.tokenizer.bos_token_id
    if bos is not None and texts[0].startswith(stock.tokenizer.bos_token):
        assert all(list(prompt[:2]).count(bos) == 1 for prompt in prompts)
