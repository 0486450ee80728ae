"""Live answers: the same on any ranks and at any ZeRO stage, those of the export, and no trace of them in what is
learned."""

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
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import IGNORE, Example
from llava_next.model.build import build_model, read_backbone
from llava_next.model.flops import StepCosts
from tests.tiny import tiny_mixture
from tests.train import cases
from tests.train.cases import Record, with_stage, zero
from tests.train.conftest import StartRanks
from train.config.compose import check, to_yaml
from train.config.schema import ConfigError, EvaluateConfig, PackingConfig, RunConfig
from train.data.loader import stage_processor
from train.distributed.world import World
from train.validation.held_out import HeldOutSample, encoded, of_mixture, of_store
from train.validation.live_answers import Answer, LiveAnswers, live_answers

ASKED = EvaluateConfig(every=2, answers=8, answer_tokens=7)
RATES = {"vision_tower": 1.0e-3, "projector": 1.0e-2, "language_model": 1.0e-2}
"""High enough for answers that depend on step and question."""
ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)


@pytest.fixture(scope="module")
def holding_out(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run with seven samples with pictures and two without held out; 38 are left for three steps."""
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
    """Rank 0's record of the run that is asked, its answers after the end, and answers.jsonl; each run once."""
    if (size, stage) not in _ASKED:
        config = replace(config, root=str(root / f"asked{size}{stage}"), engine=zero(stage), evaluate=ASKED)
        found = start_ranks(size).run(cases.train_and_ask, config, 3)
        assert all(answers == found[0][1] for _, answers in found)
        _ASKED[size, stage] = (*found[0], _lines(config))
    return _ASKED[size, stage]


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 2), (2, 3), *(pytest.param(*world, marks=pytest.mark.full) for world in ((1, 0), (2, 1), (3, 3)))],
)
def test_asking_changes_nothing_that_is_learned(
    start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, size: int, stage: int
) -> None:
    """With and without: the same losses, norms and weights, bit for bit."""
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
    """And at any ZeRO stage: the same ids. They stand in answers.jsonl wherever the held-out loss is due, each source
    in its turn, and are other ones after other steps."""
    _, expected, _ = asked(start_ranks, holding_out, tmp_path, 1, 2)
    _, answers, lines = asked(start_ranks, holding_out, tmp_path, size, stage)
    assert answers == expected
    assert len({answer.ids for answer in answers}) > 1
    assert {len(answer.ids) for answer in answers} <= set(range(8))
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    chats, pictures = "tiny_chats", "tiny_pictures"
    assert [line["source"] for line in lines[:8]] == [chats, pictures, chats, *[pictures] * 5]
    said = [(answer.source, answer.id, answer.question, answer.answer, answer.truth) for answer in answers]
    names = ("source", "id", "question", "answer", "truth")
    assert [tuple(line[name] for name in names) for line in lines[8:]] == said
    assert [line["id"] for line in lines[:8]] == [line["id"] for line in lines[8:]]
    assert [line["answer"] for line in lines[:8]] != [line["answer"] for line in lines[8:]]


@pytest.mark.full
def test_a_rank_without_a_question_takes_part(start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path) -> None:
    """Two ranks, ZeRO-3, one question: the answer that it has among others."""
    _, expected, _ = asked(start_ranks, holding_out, tmp_path, 1, 2)
    config = replace(holding_out, root=str(tmp_path), engine=zero(3), evaluate=replace(ASKED, answers=1))
    for _, answers in start_ranks(2).run(cases.train_and_ask, config, 3):
        assert answers == expected[:1]


def test_a_prompt_is_the_trained_one_up_to_the_answer(holding_out: RunConfig) -> None:
    """Its ids are those of the sample as it is trained, nothing of them supervised and all before the first answer."""
    live = _live(holding_out, of_store(Path(holding_out.data.store_root) / "tiny_pictures", 8))
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


def test_the_questions_are_the_datas_own(holding_out: RunConfig) -> None:
    """The first of each source, in the order in which they are held out, the sources by turns; as many as are asked
    for, or as there are."""
    mixture = Mixture.open(holding_out.mixture, Path(holding_out.data.store_root))
    chats, pictures = (
        [mixture.heldout_text(name, number).id for number in mixture.heldout(name)]
        for name in ("tiny_chats", "tiny_pictures")
    )
    wanted = [chats[0], pictures[0], chats[1], *pictures[1:]]
    samples = [sample for of_source in of_mixture(mixture).values() for sample in of_source]
    for num, expected in ((4, wanted[:4]), (8, wanted[:8]), (100, wanted)):
        assert [probe.id for probe in _live(holding_out, samples, num).probes] == expected


def test_a_row_is_searched_as_each_prompt_alone(holding_out: RunConfig) -> None:
    """Packed into one row, with room behind each prompt, every prompt gets the ids that it gets alone, by one pass over
    prompt and answer for each token; prompts of one picture, of two and of none."""
    root = Path(holding_out.data.store_root)
    live = _live(holding_out, [*of_store(root / "tiny_pictures", 6), *of_store(root / "tiny_chats", 2)])
    model = build_model(read_backbone(holding_out.model), dtype=torch.float32, seed=5).eval()
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # at its first weights a model says the same to everything
    answers = live.ask(model.forward, ALONE)
    assert len({answer.ids for answer in answers}) > 4
    geometry = live.processor.config
    for probe, answer in zip(live.probes, answers, strict=True):
        example = encoded(probe.sample, live.processor)
        tiles, images = example.tiles[: probe.num_tiles], example.layout.images[: probe.num_images]
        said: list[int] = []
        while len(said) < ASKED.answer_tokens:
            ids = np.array([*probe.prompt, *said, 0], dtype=np.int32)
            labels = np.where(np.arange(len(ids)) == len(ids) - 1, 0, IGNORE)
            layout = replace(example.layout, ids=ids, labels=labels, images=images)
            batch = collate([Example(layout, tiles)], tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)
            said.append(int(model.target_logits(batch).argmax()))
            if said[-1] in live.stop_ids:
                said.pop()
                break
        assert answer.ids == tuple(said)


def test_it_ends_when_all_have_stopped(holding_out: RunConfig) -> None:
    """A pass is told what the passes before it said; there are as many as the longest answer takes, its stop token
    included; what follows a stop token is not part of an answer."""
    live = _live(holding_out, of_store(Path(holding_out.data.store_root) / "tiny_pictures", 8))
    stop = live.stop_ids[0]
    told = {
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
            before = (told[place] + [111] * 9)[:passes]
            assert batch.input_ids[0, first + 1 : first + 1 + passes].tolist() == before
        passes += 1
        return torch.tensor([(told[place] + [111] * 9)[passes - 1] for place in row])

    (row,) = live.rows
    assert [answer.ids for answer in live.ask(forward, ALONE)] == [
        tuple(told[place][:-1]) for place in range(len(live.probes))
    ]
    assert passes == 4


def _live(config: RunConfig, samples: Sequence[HeldOutSample], num: int = 8) -> LiveAnswers:
    """Questions about samples, in one row."""
    backbone = read_backbone(config.model)
    processor = stage_processor(backbone, config.stage)
    packing, costs = PackingConfig(max_tokens=4096, max_tiles=96), StepCosts(tile=1.0, token=1.0, pair=0.0)
    return live_answers(samples, replace(ASKED, answers=num), backbone, processor, packing, costs)


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_the_export_says_the_same(start_ranks: StartRanks, holding_out: RunConfig, tmp_path: Path, stage: int) -> None:
    """What the live model answered at the end is what stock `generate` says with the run's export, in greedy search."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    from llava_next.inputs.anyres import decode

    config = replace(holding_out, root=str(tmp_path), engine=zero(stage), evaluate=ASKED)
    start_ranks(2).run(cases.train_and_write, config)
    lines = _lines(config)[-8:]
    mixture = Mixture.open(config.mixture, Path(config.data.store_root))
    live = _live(config, [sample for of_source in of_mixture(mixture).values() for sample in of_source])
    export = config.run_dir / "export"
    stock = LlavaNextForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export)
    for probe, line in zip(live.probes, lines, strict=True):
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(probe.prompt.astype(np.int64))[None]}
        pictures = [decode(picture) for picture in probe.sample.read().pictures[: probe.num_images]]
        if pictures:
            inputs |= processor.image_processor(pictures, return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=ASKED.answer_tokens, do_sample=False)[0, len(probe.prompt) :]
        assert (line["id"], line["answer"]) == (probe.id, processor.decode(ids, skip_special_tokens=True).strip())


def test_answers_without_an_evaluation_are_refused(holding_out: RunConfig) -> None:
    """They would never be asked."""
    from omegaconf import OmegaConf

    config = replace(holding_out, evaluate=EvaluateConfig(answers=4))
    with pytest.raises(
        ConfigError, match=r"evaluate\.answers=4 questions are asked .* evaluate\.every=0 is never; set"
    ):
        check(OmegaConf.create(to_yaml(config)), folders=False)  # type: ignore[arg-type]
