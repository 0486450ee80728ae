"""Tests of live answers: the same on any ranks and at any ZeRO stage, equal to those of the export, and without effect
on what is learned.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.mixture_config import SourceShare
from data_recipes.schema.sample import Message, Sample
from llava_next.config import ViewsConfig
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import IGNORE, Example
from llava_next.model.build import build_model, read_backbone
from llava_next.model.flops import StepCosts
from tests.tiny import PATCHES_PER_SIDE, SIZES_HW, encode_noise_image, tiny_mixture, tiny_store
from tests.train import cases
from tests.train.cases import Record, with_stage, zero
from tests.train.conftest import StartRanks
from train.config.compose import check, to_yaml
from train.config.schema import ConfigError, EvaluateConfig, PackingConfig, RunConfig
from train.data.loader import build_processor
from train.distributed.world import World
from train.validation.held_out import HeldOutSample, encode_sample, list_mixture_samples, list_store_samples
from train.validation.live_answers import Answer, AnswerGenerator, build_answer_generator

ASKED = EvaluateConfig(every=2, answers=8, answer_tokens=7)
RATES = {"vision_tower": 1.0e-3, "projector": 1.0e-2, "language_model": 1.0e-2}
"""High enough for answers that depend on step and question."""
ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)


@pytest.fixture(scope="module")
def holding_out(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run with seven samples with images and two without held out; 38 remain for three steps."""
    mixture, store_root = tiny_mixture(tmp_path_factory.mktemp("held_out"), 40, holdout=7)
    mixture = replace(mixture, sources={**mixture.sources, "tiny_chats": SourceShare(holdout=2)})
    config = with_stage(tiny_parts, learning_rates=RATES)
    return replace(config, mixture=mixture, data=replace(tiny_parts.data, store_root=str(store_root)))


def _lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "answers.jsonl").read_text().splitlines()]


_ASKED: dict[tuple[int, int], tuple[Record, list[Answer], list[dict[str, Any]]]] = {}


def asked(
    start_ranks: StartRanks, config: RunConfig, root: Path, size: int, stage: int
) -> tuple[Record, list[Answer], list[dict[str, Any]]]:
    """Rank 0's record of the run with live answers, its answers after the end, and answers.jsonl; each run is trained
    once."""
    if (size, stage) not in _ASKED:
        config = replace(config, root=str(root / f"asked{size}{stage}"), engine=zero(stage), evaluate=ASKED)
        result = start_ranks(size).run(cases.train_and_ask, config, 3)
        assert all(answers == result[0][1] for _, answers in result)
        _ASKED[size, stage] = (*result[0], _lines(config))
    return _ASKED[size, stage]


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 2), *(pytest.param(*world, marks=pytest.mark.full) for world in ((1, 0), (2, 1), (2, 3), (3, 3)))],
)
def test_asking_changes_nothing_that_is_learned(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, size: int, stage: int
) -> None:
    """With and without live answers, losses, norms and weights are the same bit for bit."""
    config = replace(holding_out, root=str(tmp_path / "without"), engine=zero(stage))
    alone = start_ranks(size).run(cases.train, config, 3)[0]
    record, _, _ = asked(start_ranks, holding_out, tmp_path, size, stage)
    assert record.losses == alone.losses
    assert record.grad_norms == alone.grad_norms
    for name, weight in alone.after.items():
        np.testing.assert_array_equal(record.after[name], weight)
    assert not (config.run_dir / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 2), (2, 3), *(pytest.param(*world, marks=pytest.mark.full) for world in ((1, 0), (2, 0), (2, 1), (3, 3)))],
)
def test_answers_are_the_same_on_any_ranks(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, size: int, stage: int
) -> None:
    """At any ZeRO stage too, the ids are the same. They are in answers.jsonl at every held-out loss, with alternating
    sources, and differ between steps."""
    _, expected, _ = asked(start_ranks, holding_out, tmp_path, 1, 2)
    _, answers, lines = asked(start_ranks, holding_out, tmp_path, size, stage)
    assert answers == expected
    assert len({answer.ids for answer in answers}) > 1
    assert {len(answer.ids) for answer in answers} <= set(range(8))
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    chats, pictures = "tiny_chats", "tiny_pictures"
    assert [line["source"] for line in lines[:8]] == [chats, pictures, chats, *[pictures] * 5]
    output = [(answer.source, answer.id, answer.question, answer.answer, answer.truth) for answer in answers]
    names = ("source", "id", "question", "answer", "truth")
    assert [tuple(line[name] for name in names) for line in lines[8:]] == output
    assert [line["id"] for line in lines[:8]] == [line["id"] for line in lines[8:]]
    assert [line["answer"] for line in lines[:8]] != [line["answer"] for line in lines[8:]]


@pytest.mark.full
def test_a_rank_without_a_question_takes_part(start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path) -> None:
    """Two ranks, ZeRO-3, one question: its answer is the same as among others."""
    _, expected, _ = asked(start_ranks, holding_out, tmp_path, 1, 2)
    config = replace(holding_out, root=str(tmp_path), engine=zero(3), evaluate=replace(ASKED, answers=1))
    for _, answers in start_ranks(2).run(cases.train_and_ask, config, 3):
        assert answers == expected[:1]


def test_a_prompt_is_the_trained_one_up_to_the_answer(holding_out: RunConfig) -> None:
    """Its ids are those of the training sample up to the first answer, and none is supervised."""
    live = _live(holding_out, list_store_samples(Path(holding_out.data.store_root) / "tiny_pictures", 8))
    assert len(live.probes) == 8
    for probe in live.probes:
        text = probe.sample.text()
        layout = live.processor.layout(text.messages, text.sizes_hw)
        num = len(probe.prompt)
        assert layout.ids[:num].tolist() == probe.prompt.tolist()
        assert (layout.labels[:num] == IGNORE).all()
        assert layout.labels[num] != IGNORE
        assert probe.truth == text.messages[1].text
        assert probe.question in text.messages[0].text
        assert "<image>" not in probe.question
    assert {probe.num_images for probe in live.probes} == {1, 2}


def test_a_prompt_has_the_views_of_its_whole_sample(holding_out: RunConfig, tmp_path: Path) -> None:
    """A sample with an image in each of two rounds has two images, also where the first round alone is asked: its views
    are those of several images, in the ids and in the row."""
    sizes = SIZES_HW[3:5]
    turns = [("user", "<image>\nWhat is it?"), ("assistant", "A."), ("user", "<image>\nAnd this?"), ("assistant", "B.")]
    images = tuple(encode_noise_image(number, size) for number, size in enumerate(sizes))
    sample = Sample("0", tuple(Message(role, text) for role, text in turns), images, "tiny:0")  # type: ignore[arg-type]
    config = with_stage(holding_out, views=ViewsConfig("anyres", "pad", closing_newline=True))
    live = _live(config, list_store_samples(tiny_store(tmp_path, "rounds", [sample]), 1))
    (probe,) = live.probes
    layout = live.processor.layout(sample.messages, sizes)
    assert layout.ids[: len(probe.prompt)].tolist() == probe.prompt.tolist()
    assert (probe.num_images, probe.num_tiles) == (1, 1)
    batch = live._make_batch((0,))
    assert len(batch.image_positions) == layout.images[0].num_tokens == PATCHES_PER_SIDE**2 + 1


def test_questions_are_selected_from_the_data(holding_out: RunConfig) -> None:
    """The first questions of each source in the order of the held-out samples, alternating between sources; as many as
    requested or available."""
    mixture = Mixture.open(holding_out.mixture, Path(holding_out.data.store_root))
    chats, pictures = (
        [mixture.heldout_text(name, number).id for number in mixture.heldout(name)]
        for name in ("tiny_chats", "tiny_pictures")
    )
    requested = [chats[0], pictures[0], chats[1], *pictures[1:]]
    samples = [sample for of_source in list_mixture_samples(mixture).values() for sample in of_source]
    for num, expected in ((4, requested[:4]), (8, requested[:8]), (100, requested)):
        assert [probe.id for probe in _live(holding_out, samples, num).probes] == expected


def test_a_row_is_searched_as_each_prompt_alone(holding_out: RunConfig) -> None:
    """Packed into one row with space behind each prompt, every prompt gets the ids that it gets alone by one pass over
    prompt and answer per token; for prompts with one image, two and none."""
    root = Path(holding_out.data.store_root)
    live = _live(
        holding_out, [*list_store_samples(root / "tiny_pictures", 6), *list_store_samples(root / "tiny_chats", 2)]
    )
    model = build_model(read_backbone(holding_out.model), dtype=torch.float32, seed=5).eval()
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # at its first weights a model says the same to everything
    answers = live.generate(model.forward, ALONE)
    assert len({answer.ids for answer in answers}) > 4
    geometry = live.processor.config
    for probe, answer in zip(live.probes, answers, strict=True):
        example = encode_sample(probe.sample, live.processor)
        tiles, images = example.tiles[: probe.num_tiles], example.layout.images[: probe.num_images]
        output: list[int] = []
        while len(output) < ASKED.answer_tokens:
            ids = np.array([*probe.prompt, *output, 0], dtype=np.int32)
            labels = np.where(np.arange(len(ids)) == len(ids) - 1, 0, IGNORE)
            layout = replace(example.layout, ids=ids, labels=labels, images=images)
            batch = collate([Example(layout, tiles)], tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)
            output.append(int(model.target_logits(batch).argmax()))
            if output[-1] in live.stop_ids:
                output.pop()
                break
        assert answer.ids == tuple(output)


def test_it_ends_when_all_have_stopped(holding_out: RunConfig) -> None:
    """There are as many passes as the longest answer has tokens, with its stop token; tokens after a stop token are not
    part of an answer."""
    live = _live(holding_out, list_store_samples(Path(holding_out.data.store_root) / "tiny_pictures", 8))
    stop = live.stop_ids[0]
    message = {
        0: [105, 106, stop],
        1: [stop],
        2: [107, stop],
        3: [105, stop],
        4: [108, 109, 110, stop],
        5: [stop],
        6: [stop],
        7: [109, stop],
    }
    passes = 0

    def forward(batch: Batch, *, next_ids: bool) -> torch.Tensor:
        nonlocal passes
        assert next_ids
        firsts = batch.target_positions - passes
        for place, first in zip(row, firsts.tolist(), strict=True):
            before = (message[place] + [111] * 9)[:passes]
            assert batch.input_ids[0, first + 1 : first + 1 + passes].tolist() == before
        passes += 1
        return torch.tensor([(message[place] + [111] * 9)[passes - 1] for place in row])

    (row,) = live.rows
    assert [answer.ids for answer in live.generate(forward, ALONE)] == [
        tuple(message[place][:-1]) for place in range(len(live.probes))
    ]
    assert passes == 4


def _live(config: RunConfig, samples: Sequence[HeldOutSample], num: int = 8) -> AnswerGenerator:
    """Returns a generator of answers to questions about samples, in one row."""
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, config.stage)
    packing, costs = PackingConfig(max_tokens=4096, max_tiles=96), StepCosts(tile=1.0, token=1.0, pair=0.0)
    return build_answer_generator(samples, replace(ASKED, answers=num), backbone, processor, packing, costs)


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_export_gives_the_same_answers(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, stage: int
) -> None:
    """The answers after the last step equal those of stock `generate` with the run's export, in greedy search."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    from llava_next.inputs.anyres import decode

    config = replace(holding_out, root=str(tmp_path), engine=zero(stage), evaluate=ASKED)
    start_ranks(2).run(cases.train_and_write, config)
    lines = _lines(config)[-8:]
    mixture = Mixture.open(config.mixture, Path(config.data.store_root))
    live = _live(config, [sample for of_source in list_mixture_samples(mixture).values() for sample in of_source])
    export = config.run_dir / "export"
    stock = LlavaNextForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export)
    for probe, line in zip(live.probes, lines, strict=True):
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(probe.prompt.astype(np.int64))[None]}
        pictures = [decode(picture) for picture in probe.sample.read().images[: probe.num_images]]
        if pictures:
            inputs |= processor.image_processor(pictures, return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=ASKED.answer_tokens, do_sample=False)[0, len(probe.prompt) :]
        assert (line["id"], line["answer"]) == (probe.id, processor.decode(ids, skip_special_tokens=True).strip())


def test_answers_without_an_evaluation_are_refused(holding_out: RunConfig) -> None:
    """The configuration is rejected, since the questions would never be asked."""
    from omegaconf import OmegaConf

    config = replace(holding_out, evaluate=EvaluateConfig(answers=4))
    with pytest.raises(
        ConfigError, match=r"evaluate\.answers=4 questions are asked .* evaluate\.every=0 means never; set"
    ):
        check(OmegaConf.create(to_yaml(config)), folders=False)  # type: ignore[arg-type]
