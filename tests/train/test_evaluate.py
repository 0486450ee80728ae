"""What the evaluation counts as right is what stock `generate` answers; its figures add up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_recipes.mixture import Mixture
from data_recipes.raw.questions import SHORT_ANSWER
from data_recipes.sample import Message
from data_recipes.store import StoredSample
from llava_next.batch import collate
from llava_next.build import build_model, read_backbone
from llava_next.config import ImageMode, ModelConfig
from llava_next.hf import read_hf, write_hf
from llava_next.model import LossSums
from llava_next.processor import Processor
from tests.tiny import encoded_picture, tiny_mixture, tiny_model
from train.evaluate import (
    Question,
    answer_all,
    evaluate,
    format_table,
    generate_answers,
    held_out_samples,
    questions_of,
    summarize,
)

SIZE_HW = (40, 40)
ANSWERS = ("red", "blue", "a cat", "no")


def _sample(number: int) -> StoredSample:
    messages = (Message("user", "<image>\nWhat is it?"), Message("assistant", ANSWERS[number]))
    return StoredSample(
        str(number), "shapes", messages, (SIZE_HW,), (encoded_picture(number, SIZE_HW),), (str(number),)
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig, Processor, list[StoredSample]]:
    """An export that has learned the answers of three of four pictures by heart."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learned")
    config = tiny_model(folder, tower="clip")
    backbone = read_backbone(config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, image_mode="anyres", max_length=512)
    samples = [_sample(number) for number in range(len(ANSWERS))]
    examples = [processor.encode(s.messages, s.sizes_hw, s.pictures) for s in samples[:3]]
    batch = collate(examples, tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = LossSums(*model(batch)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.3:
            break
    assert loss.item() < 0.3
    write_hf(model, backbone, processor, folder / "export")
    return folder / "export", config, processor, samples


def test_a_hit_is_what_generate_answers(
    learned: tuple[Path, ModelConfig, Processor, list[StoredSample]],
) -> None:
    """Teacher-forced hits are exactly the questions whose truth stock `generate` answers, right ones and wrong ones."""
    export, config, processor, samples = learned
    _, model = read_hf(export, config)
    questions = [question for n, s in enumerate(samples) for question in questions_of("shapes", [s], 9, 9)]
    questions = [replace(question, sample=n) for n, question in enumerate(questions)]
    right, other = answer_all(model, processor, samples, questions)
    answers = [answer["answer"] for answer in generate_answers(export, samples, questions, processor)]
    assert [answer == truth for answer, truth in zip(answers, ANSWERS, strict=True)] == right.tolist()
    assert right.tolist() == [True, True, True, False]
    assert not other.any()  # every answer differs, so another sample's picture leads to another answer


def test_figures_add_up() -> None:
    """Shares are of all questions, and the interval of the difference holds the difference."""
    questions = [Question("s", n // 2, "q", "no" if n % 4 else "yes") for n in range(40)]
    right = np.array([n % 10 != 0 for n in range(40)])
    other = np.array([n % 2 == 0 for n in range(40)])
    accuracy = summarize(questions, right, other)
    assert (accuracy.num_questions, accuracy.num_pictures) == (40, 20)
    assert accuracy.right_picture == right.mean()
    assert accuracy.other_picture == other.mean()
    assert (accuracy.commonest, accuracy.commonest_answer) == ("no", 0.75)
    assert accuracy.interval[0] < accuracy.difference < accuracy.interval[1]
    assert accuracy.difference == pytest.approx(accuracy.right_picture - accuracy.other_picture)


def test_questions_are_asked_on_their_own(tmp_path: Path) -> None:
    """Only held-out samples with one picture are asked about, each turn as a question without a placeholder."""
    mixture_config, store_root = tiny_mixture(tmp_path, 20, holdout=5)
    mixture = Mixture.open(mixture_config, store_root)
    held_out = held_out_samples(mixture, store_root)
    trained = {h for n in range(mixture.num_samples) for h in mixture.sample(n).picture_hashes}
    assert set(held_out) == {"tiny_pictures"}
    samples = held_out["tiny_pictures"]
    assert samples
    assert all(len(sample.pictures) == 1 and not set(sample.picture_hashes) & trained for sample in samples)
    questions = questions_of("tiny_pictures", samples, limit=4, per_picture=2)
    assert len(questions) <= 4
    assert all("<image>" not in question.text and question.truth for question in questions)


def test_the_form_of_answer_is_asked_for_each_time() -> None:
    """It stands with a conversation's first question only, and every question is asked on its own."""
    turns = [f"<image>\nWhich is highest?\n{SHORT_ANSWER}", "2016", "Which is lowest?", "2011"]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))
    asked = questions_of("charts", [replace(_sample(0), messages=messages)], limit=9, per_picture=9)
    assert [question.text.split("\n") for question in asked] == [
        ["Which is highest?", SHORT_ANSWER],
        ["Which is lowest?", SHORT_ANSWER],
    ]


@pytest.mark.parametrize("mode", ["anyres", "pad"])
def test_a_run_is_evaluated_from_its_folder(tmp_path: Path, mode: ImageMode) -> None:
    """From config.yaml, export and stores alone come a figure for every source, and one for all together; also where
    the model saw single views, and the stock processor has to make the same prompt of them."""
    from tests.train.cases import tiny_run, with_stage
    from train.config import to_yaml

    model_config = tiny_model(tmp_path / "models")
    mixture_config, store_root = tiny_mixture(tmp_path / "data", 16, holdout=6)
    config = with_stage(tiny_run(model_config, mixture_config, store_root, tmp_path / "outputs"), image_mode=mode)
    backbone = read_backbone(model_config)
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, image_mode=mode, max_length=config.stage.max_length)
    run_dir = tmp_path / "run"
    write_hf(model, backbone, processor, run_dir / "export")
    (run_dir / "config.yaml").write_text(to_yaml(config))
    result = evaluate(run_dir, limit=8, per_picture=2, num_generated=1)
    assert set(result["by_source"]) == {"tiny_pictures"}
    assert result["all"]["num_questions"] == result["by_source"]["tiny_pictures"]["num_questions"]
    assert len(result["generated"]) == 1
    assert "all" in format_table(result)
