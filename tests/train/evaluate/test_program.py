"""Tests of `python -m train.evaluate` on a run and on a model directory: results, answers, tables and errors."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.distributed.run import get_args_parser

from data_recipes.schema.sample import Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.config import ImageMode, ViewsConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.inputs.batch import collate
from llava_next.model.build import build_model, read_backbone
from llava_next.model.llava_next import LossSums
from tests.tiny import tiny_mixture, tiny_model, tiny_samples, tiny_store
from tests.train.cases import tiny_run, with_stage
from tests.train.evaluate.learned import ANSWERS, Learned
from train.config.compose import to_yaml
from train.evaluate.__main__ import main
from train.evaluate.evaluated_model import SampleMaxima, load_directory


def _result(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answers = out.with_suffix(".answers.jsonl").read_text().splitlines()
    return json.loads(out.read_text()), [json.loads(line) for line in answers]


@pytest.mark.parametrize("mode", ["anyres", "pad"])
def test_a_run_is_evaluated_from_its_folder(
    tmp_path: Path, mode: ImageMode, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.yaml, export and stores come a loss, a score and accuracies for every source, and accuracies over
    all; also with single views, where the stock processor must render the same prompt, and where there are no tiles to
    leave out. The loss equals the model's on the held-out samples one by one."""
    model_config = tiny_model(tmp_path / "models")
    mixture_config, store_root = tiny_mixture(tmp_path / "data", 16, holdout=6)
    views = ViewsConfig(mode, mode)
    config = with_stage(tiny_run(model_config, mixture_config, store_root, tmp_path / "outputs"), views=views)
    config = replace(config, packing=replace(config.packing, max_tokens=512))
    backbone = read_backbone(model_config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, views=views, max_length=config.stage.max_length)
    run_dir = tmp_path / "run"
    write_hf(model, backbone, processor, run_dir / "export")
    (run_dir / "config.yaml").write_text(to_yaml(config))
    command = [str(run_dir), "--limit", "8", "--per-picture", "2", "--generate", "3", "--max-new-tokens", "4"]
    assert main([*command, "--base-view"]) == (0 if mode == "anyres" else 2)
    printed = capsys.readouterr()
    if mode == "anyres":
        assert "base view alone" in printed.out
    else:
        assert "--base-view" in printed.err
        assert main(command) == 0
    result, answers = _result(run_dir / "evaluation.json")
    (row,) = result["by_source"].values()
    assert result["all"]["num_questions"] == row["num_questions"] > 0
    assert (row["base_view"] is None) == (mode != "anyres")
    assert (row["metric"], row["num_answers"], len(answers), len(result["generated"])) == ("exact_match", 3, 3, 2)

    from data_recipes.mixture.mixture import Mixture

    mixture = Mixture.open(mixture_config, store_root)
    total = tokens = 0.0
    for number in mixture.heldout("tiny_pictures"):
        held_out = mixture.heldout_sample("tiny_pictures", number)
        example = processor.encode(held_out.messages, held_out.sizes_hw, held_out.images)
        batch = collate([example], tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
        loss = LossSums(*model(batch))
        total, tokens = total + loss.by_source.item(), tokens + loss.tokens_by_source.item()
    assert (row["num_samples"], row["num_tokens"]) == (6, tokens)
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_a_directory_is_evaluated_on_stores(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a run, template, geometry and normalization come from the directory; scores are the share of right
    answers, the stores' metrics are used unless others are chosen, and text-only sources have a loss."""
    samples = [Sample(sample.id, sample.messages, sample.images, f"shapes:{sample.id}") for sample in learned.samples]
    write_store(tmp_path / "shapes", SourceInfo("shapes", "messages_jsonl", "shapes", metric="anls"), samples)
    tiny_store(tmp_path, "chats", tiny_samples(3, pictures=False))
    out = tmp_path / "figures.json"
    command = [str(learned.export), "--store", str(tmp_path / "shapes"), "--store", str(tmp_path / "chats")]
    assert main([*command, "--out", str(out)]) == 0
    result, answers = _result(out)
    shapes, chats = result["by_source"]["shapes"], result["by_source"]["chats"]
    assert (shapes["metric"], shapes["score"], shapes["right_picture"]) == ("anls", 0.75, 0.75)
    assert [answer["truth"] for answer in answers] == list(ANSWERS)
    assert chats["loss"] > 1.0
    assert chats["score"] is None
    assert "shapes" in capsys.readouterr().out
    assert main([*command, "--out", str(out), "--metric", "shapes=none"]) == 0
    assert _result(out)[0]["by_source"]["shapes"]["score"] is None


ONEVISION = ViewsConfig("anyres_max_2", "pad", closing_newline=True)


@pytest.mark.parametrize("views", [*(ViewsConfig(mode, mode) for mode in get_args(ImageMode)), ONEVISION], ids=str)
def test_views_are_read_from_the_directory(tmp_path: Path, views: ViewsConfig) -> None:
    """Without a run, images become the views of the directory's processor; free answers have the training's prompts."""
    backbone = read_backbone(tiny_model(tmp_path / "models", "siglip"))
    processor = backbone.processor(template=None, views=views, max_length=512)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, tmp_path / "export")
    store = tiny_store(tmp_path, "tiny", tiny_samples(3))
    subject = load_directory(
        tmp_path / "export", [store], torch.device("cpu"), maxima=SampleMaxima(1), seed=0, chosen={}
    )
    actual, trained = subject.processor.config, processor.config
    assert (actual.views, actual.pad_colour) == (views, trained.pad_colour)
    assert (actual.tile, actual.patches_per_side, actual.grids) == (
        trained.tile,
        trained.patches_per_side,
        trained.grids,
    )
    out = tmp_path / "evaluation.json"
    command = [str(tmp_path / "export"), "--store", str(store), "--max-new-tokens", "2", "--out", str(out)]
    assert main(command) == 0
    assert _result(out)[0]["all"]["num_questions"] > 0


def test_stores_are_drawn_by_seed(learned: Learned, tmp_path: Path) -> None:
    """The same seed draws the same questions in the same order; another seed draws others."""
    tiny_store(tmp_path, "tiny", tiny_samples(30))
    asked: list[list[dict[str, Any]]] = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(asked)}.json"
        command = [str(learned.export), "--store", str(tmp_path / "tiny"), "--num-samples", "4", "--seed", str(seed)]
        assert main([*command, "--max-new-tokens", "2", "--out", str(out)]) == 0
        asked.append(_result(out)[1])
    assert asked[0] == asked[1]
    assert {answer["id"] for answer in asked[0]} != {answer["id"] for answer in asked[2]}


def test_a_source_has_its_own_number_of_samples(learned: Learned, tmp_path: Path) -> None:
    """--num-samples SOURCE=NUM takes precedence over --num-samples NUM."""
    stores = [str(tiny_store(tmp_path, name, tiny_samples(9))) for name in ("first", "second")]
    out = tmp_path / "evaluation.json"
    command = [str(learned.export), "--store", stores[0], "--store", stores[1], "--generate", "0", "--out", str(out)]
    assert main([*command, "--num-samples", "second=2", "--num-samples", "5"]) == 0
    rows = _result(out)[0]["by_source"]
    assert {source: row["num_samples"] for source, row in rows.items()} == {"first": 5, "second": 2}


def test_torchrun_passes_every_option_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Until Python 3.12, torchrun rejects a program's option that is the start of two of its own, such as --num."""
    with pytest.raises(SystemExit):
        main(["--help"])
    options = sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)))
    assert "--num-samples" in options
    command = ["-m", "train.evaluate", "run", *options]
    assert get_args_parser().parse_args(command).training_script_args == command[2:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "not a run folder"),
        (["{export}"], "pass prepared sources with --store STORE"),
        (["{export}", "--store", "{folder}/nothing"], "no complete store at"),
        (
            ["{export}", "--store", "{folder}/tiny", "--metric", "tiny=bleu"],
            "unknown metric; available: exact_match",
        ),
        (["{export}", "--store", "{folder}/tiny", "--metric", "tony=anls"], "unknown source; available: tiny"),
        (["{export}", "--store", "{folder}/tiny", "--num-samples", "tony=3"], "unknown source; available: tiny"),
    ],
)
def test_invalid_arguments_are_errors(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """Errors are one sentence with the fix, and exit code 2."""
    tiny_store(tmp_path, "tiny", tiny_samples(3, pictures=False))
    named = [argument.format(folder=tmp_path, export=learned.export) for argument in arguments]
    assert main(named) == 2
    assert words in capsys.readouterr().err
