"""Tests of backbones in the real programs: what a start reports, what it rejects with exit code 2, and how the other
programs treat a model that stock transformers cannot run.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Phi3Config, Siglip2VisionConfig

from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, ModelConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from tests.llava_next.model.test_language_models import SIZES
from tests.tiny import encoded_picture, tiny_mixture, tiny_model, tiny_samples, tiny_store
from tests.train.cases import tiny_run
from tests.train.launch import Program
from train.chat import main as chat
from train.evaluate.__main__ import main as evaluate
from train.export.__main__ import main as export


@pytest.fixture(scope="module")
def with_registers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a finished run with a tower of five prefix tokens, on a source whose answers contain
    an end token twice."""
    folder = tmp_path_factory.mktemp("registers")
    samples = [
        replace(sample, messages=(sample.messages[0], Message("assistant", f"The tag {sample.id} is </s>, or </s>.")))
        for sample in tiny_samples(30)
    ]
    tiny_store(folder / "stores", "tags", samples)
    config = tiny_run(
        tiny_model(folder / "models", "dinov3"),
        MixtureConfig("tags", 0, {"tags": SourceShare(holdout=4)}),
        folder / "stores",
        folder / "outputs",
    )
    program = Program(config, folder)
    code, output = program.run("plain", "name=registers", "stage.init_from=null", "stage.epochs=1")
    assert code == 0, output
    return program.root / "registers" / "finetune", output


def test_a_start_reports_what_the_export_cannot(with_registers: tuple[Path, str]) -> None:
    """In the terminal and the log: stock transformers cannot run the export, with both numbers of tokens."""
    run_dir, output = with_registers
    for text in (output, (run_dir / "log" / "rank_000.log").read_text()):
        assert "cannot run" in text
        assert "dinov3_vit has 5" in text


def test_a_start_reports_special_tokens_in_the_data(with_registers: tuple[Path, str]) -> None:
    """By source and token, in the terminal, the log and data.json."""
    run_dir, output = with_registers
    for text in (output, (run_dir / "log" / "rank_000.log").read_text()):
        assert "source tags: number of samples whose text contains a special token's text" in text
        assert "26 </s>" in text
    assert json.loads((run_dir / "data.json").read_text())["special_texts"] == {"tags": {"</s>": 26}}


def test_export_that_stock_cannot_run_is_reported(
    with_registers: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the result and from a checkpoint: written, loaded, not compared, and the reason, also on the card. The other
    programs reject it with the alternative, which works."""
    run_dir, _ = with_registers
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    for number, source in enumerate((run_dir / "export", checkpoint)):
        out = tmp_path / str(number)
        assert export([str(source), "--out", str(out)]) == 0, capsys.readouterr().err
        printed, card = capsys.readouterr().out, (out / "README.md").read_text()
        for text in (printed, card):
            assert "stock transformers loads all tensors; logits NOT compared" in text
            assert "transformers: loads the weights but cannot run" in text
            assert "transformers: yes" not in text
    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded_picture(0, (40, 40)))
    assert chat([str(run_dir / "export"), str(picture), "--ask", "What is it?"]) == 2
    assert evaluate([str(run_dir), "--limit", "2", "--out", str(tmp_path / "figures.json")]) == 2
    assert capsys.readouterr().err.count("--generate 0") == 2
    assert evaluate([str(run_dir), "--limit", "2", "--out", str(tmp_path / "figures.json"), "--generate", "0"]) == 0
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert figures["by_source"]["tags"]["loss"] > 0


def test_vllm_is_promised_for_tried_language_models_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For another language model the card says that it was not tested."""
    config = tiny_model(tmp_path)
    AutoConfig.for_model("olmo2", **SIZES).save_pretrained(config.language_model.path)
    backbone = read_backbone(config)
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, tmp_path / "export")
    assert export([str(tmp_path / "export"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "vLLM: yes" not in printed
    assert "vLLM: not tested with a language model of type olmo2" in printed


def _phi3(model: ModelConfig) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [64.0] * 4}
    config = Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=256)
    config.save_pretrained(model.language_model.path)


def _experts(model: ModelConfig) -> None:
    AutoConfig.for_model("qwen3_moe", **SIZES).save_pretrained(model.language_model.path)


def _naflex(model: ModelConfig) -> None:
    Siglip2VisionConfig().save_pretrained(model.vision_tower.path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_phi3, "error: stage.max_length=512: Phi3RotaryEmbedding"),
        pytest.param(
            _experts, "error: model.language_model: qwen3_moe is a mixture of experts", marks=pytest.mark.full
        ),
        pytest.param(_naflex, "error: model.vision_tower.path: a tower of model_type", marks=pytest.mark.full),
    ],
    ids=["longrope", "experts", "naflex"],
)
def test_a_start_refuses_with_one_sentence(tmp_path: Path, change: Any, word: str) -> None:
    """Exit code 2, the key, no traceback."""
    model = tiny_model(tmp_path / "models")
    change(model)
    mixture, store_root = tiny_mixture(tmp_path / "data", 16)
    program = Program(tiny_run(model, mixture, store_root, tmp_path / "outputs"), tmp_path)
    code, output = program.run("plain", "name=refused", "stage.init_from=null", "model.language_model.weights=random")
    assert code == 2, output
    assert output.count(word) == 1, output
    assert "Traceback" not in output


@pytest.mark.full
def test_the_printed_length_is_accepted(tmp_path: Path) -> None:
    """With the advised LongRoPE length, the run trains. On two ranks and with a tower with registers, the second rank
    receives both rotary tables from the first."""
    model = tiny_model(tmp_path / "models", "dinov3")
    _phi3(model)
    mixture, store_root = tiny_mixture(tmp_path / "data", 16)
    program = Program(tiny_run(model, mixture, store_root, tmp_path / "outputs"), tmp_path)
    code, output = program.run("torchrun", "name=short", "stage.init_from=null", "stage.max_length=256", "max_steps=1")
    assert code == 0, output
