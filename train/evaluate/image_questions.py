"""Measures the effect of the image: the accuracy of single questions with their own image, with another one, and with
the base view of their own image alone.

An answer is right if greedy decoding gives exactly the truth, with its end token. This is the case if every token of
the truth is the most likely one after the true tokens before it, so one forward pass over prompt and truth decides it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_recipes.raw.questions import RESPONSE_FORMAT_PROMPTS
from data_recipes.schema.sample import DataError, Message
from data_recipes.store.reader import StoredSample
from llava_next.config import ViewsConfig
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.llava_next import LlavaNext
from train.config.schema import PackingConfig
from train.evaluate.evaluation_ranks import EvaluationRanks, describe_row_budgets, explain_out_of_memory
from train.validation.held_out import HeldOutSample

_IMAGES_PER_GROUP = 8  # that are each other's other image
_NUM_RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Question:
    """One question about one image. `sample` is the position of its sample in the list of samples."""

    source: str
    sample: int
    text: str
    truth: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of exactly answered questions.

    Attributes:
        right_picture, other_picture: with the question's own image and with another one.
        commonest_answer: share that the most frequent truth, `commonest`, would reach.
        difference: right_picture - other_picture.
        interval: 95 % confidence interval of the difference.
        base_view: with the base view of the question's own image alone; None if this was not asked for.
        base_view_difference: right_picture - base_view.
        base_view_interval: 95 % confidence interval of that difference.
    """

    num_questions: int
    num_pictures: int
    right_picture: float
    other_picture: float
    commonest_answer: float
    commonest: str
    difference: float
    interval: tuple[float, float]
    base_view: float | None = None
    base_view_difference: float | None = None
    base_view_interval: tuple[float, float] | None = None


def read_single_image_samples(samples: Sequence[HeldOutSample], limit: int) -> list[StoredSample]:
    """Reads the first `limit` samples that have exactly one image."""
    single: list[StoredSample] = []
    for sample in samples:
        if len(single) == limit:
            break
        if len(sample.text().sizes_hw) == 1:
            single.append(sample.read())
    return single


def extract_questions(source: str, samples: Sequence[StoredSample], limit: int, per_picture: int) -> list[Question]:
    """Returns the first `per_picture` questions of each conversation, up to `limit` in total.

    If the first question of a conversation ends with an instruction on the form of the answer, it is appended to the
    other questions too, since each is asked without the others.
    """
    questions = []
    for number, sample in enumerate(samples):
        turns = [message for message in sample.messages if message.role != "system"]
        pairs = list(zip(turns[0::2], turns[1::2], strict=False))[:per_picture]
        ending = next((ending for ending in RESPONSE_FORMAT_PROMPTS if pairs and pairs[0][0].text.endswith(ending)), "")
        for question, answer in pairs:
            text = question.text.replace("<image>", "").strip()
            if not text.endswith(ending):
                text = f"{text}\n{ending}"
            questions.append(Question(source, number, text, answer.text))
    return questions[:limit]


def filter_by_length(
    processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[list[Question], int]:
    """Selects the questions that fit the maximum length with every image, since each is also asked with another one.

    Returns:
        These questions, and the number of the others.
    """
    if not questions:
        return [], 0
    message = [Message("user", "<image>")]
    largest = max(samples, key=lambda sample: len(processor.prompt(message, sample.sizes_hw)[0]))
    fitting = [question for question in questions if _has_space(processor, question, largest)]
    return fitting, len(questions) - len(fitting)


def _has_space(processor: Processor, question: Question, image_sample: StoredSample) -> bool:
    try:
        processor.layout(_make_messages(question), image_sample.sizes_hw)
    except SampleRejected:
        return False
    return True


class _Use(NamedTuple):
    """A question that is asked with an image; both are positions, in the questions and in the samples."""

    question: int
    image: int
    is_own: bool


def answer_all(
    model: LlavaNext,
    processor: Processor,
    samples: Sequence[StoredSample],
    questions: Sequence[Question],
    packing: PackingConfig,
    ranks: EvaluationRanks,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Answers every question with its own image and with another one, and returns which answers are right.

    The other image is that of the next sample, so every image is used equally often in both roles. Questions with one
    image follow each other, so that they mostly share a row and therefore the tower's features. Every rank must call
    it.

    Args:
        packing: budgets of a row.

    Returns:
        Whether the answers with the own and with the other image are right, bool [num_questions] each.

    Raises:
        DataError: an image cannot be read.
        EvaluationError: a row did not fit into memory.
    """

    uses = _list_uses(questions)
    hits = _answer_uses(model, processor, samples, questions, uses, packing, ranks)
    right = np.zeros(len(questions), dtype=bool)
    other = np.zeros(len(questions), dtype=bool)
    for use, is_hit in zip(uses, hits, strict=True):
        (right if use.is_own else other)[use.question] = is_hit
    return right, other


def answer_base_views(
    model: LlavaNext,
    processor: Processor,
    samples: Sequence[StoredSample],
    questions: Sequence[Question],
    packing: PackingConfig,
    ranks: EvaluationRanks,
) -> npt.NDArray[np.bool_]:
    """Answers every question with the base view of its image alone: the same weights, without tiles and newlines.

    The base view of AnyRes is the entire image, resized to a square of one tile, which is the view squash. Every rank
    must call it. Arguments and errors are those of `answer_all`.

    Returns:
        Whether the answers are right, bool [num_questions].
    """
    single_view = Processor(processor.tokenizer, replace(processor.config, views=ViewsConfig("squash")))
    uses = [_Use(index, question.sample, True) for index, question in enumerate(questions)]
    return np.array(_answer_uses(model, single_view, samples, questions, uses, packing, ranks), dtype=bool)


def _answer_uses(
    model: LlavaNext,
    processor: Processor,
    samples: Sequence[StoredSample],
    questions: Sequence[Question],
    uses: Sequence[_Use],
    packing: PackingConfig,
    ranks: EvaluationRanks,
) -> list[bool]:
    """Returns whether each use is answered exactly, in the order of `uses`."""

    def answer(row: Sequence[_Use]) -> list[bool]:
        examples = _encode_row(processor, samples, questions, row)
        num_tokens = sum(example.layout.num_tokens for example in examples)
        what = f"a row of {num_tokens:,} tokens ({len(row)} questions of source {questions[0].source})"
        with explain_out_of_memory(what, describe_row_budgets(packing)):
            return _answer_row(model, processor, examples, ranks.device)

    rows = _pack_uses(processor, samples, questions, uses, packing)
    return [hit for hits in ranks.map(answer, rows, description=questions[0].source, unit="row") for hit in hits]


def _pack_uses(
    processor: Processor,
    samples: Sequence[StoredSample],
    questions: Sequence[Question],
    uses: Sequence[_Use],
    packing: PackingConfig,
) -> list[list[_Use]]:
    """Assigns the uses to rows within the budgets, in their order.

    A question that exceeds a budget alone has a row of its own. Tiles of an image count once in a row.
    """
    rows: list[list[_Use]] = [[]]
    num_tokens = num_tiles = 0
    images: set[int] = set()
    for use in uses:
        layout = processor.layout(_make_messages(questions[use.question]), samples[use.image].sizes_hw)
        new_tiles = 0 if use.image in images else layout.num_tiles
        exceeds = num_tokens + layout.num_tokens > packing.max_tokens or num_tiles + new_tiles > packing.max_tiles
        if rows[-1] and exceeds:
            rows.append([])
            num_tokens, num_tiles, images, new_tiles = 0, 0, set(), layout.num_tiles
        rows[-1].append(use)
        num_tokens, num_tiles = num_tokens + layout.num_tokens, num_tiles + new_tiles
        images.add(use.image)
    return rows


def _list_uses(questions: Sequence[Question]) -> list[_Use]:
    """Returns every question with its own image and with the next sample's, sorted by image."""
    by_sample: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        by_sample.setdefault(question.sample, []).append(index)
    uses = []
    for group in _split_into_groups(sorted(by_sample)):
        for position, number in enumerate(group):
            uses += [_Use(index, number, True) for index in by_sample[number]]
            uses += [_Use(index, group[(position + 1) % len(group)], False) for index in by_sample[number]]
    return sorted(uses, key=lambda use: (use.image, not use.is_own, use.question))


def _encode_row(
    processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question], row: Sequence[_Use]
) -> list[Example]:
    encoded: dict[int, Example] = {}
    return [_encode_question(processor, samples[use.image], questions[use.question], encoded, use.image) for use in row]


def _answer_row(
    model: LlavaNext, processor: Processor, examples: Sequence[Example], device: torch.device
) -> list[bool]:
    """Returns for each example whether every token of the truth is the most likely one."""
    config = processor.config
    batch = collate(examples, tile=config.tile, patches_per_tile=config.patches_per_side**2)
    hit = model.score(batch.to(device)).hits.cpu()
    missed = torch.zeros(len(examples), dtype=torch.long)
    missed.index_add_(0, batch.target_samples, (~hit).long())
    return [wrong == 0 for wrong in missed.tolist()]


def summarize(
    questions: Sequence[Question],
    right: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    base_view: npt.NDArray[np.bool_] | None = None,
) -> Accuracy:
    """Computes the accuracies and the bootstrap intervals of their differences; images are drawn with replacement.

    Args:
        right, other: see `answer_all`.
        base_view: see `answer_base_views`.
    """
    commonest, count = Counter(question.truth for question in questions).most_common(1)[0]
    keys = sorted({(question.source, question.sample) for question in questions})
    image_of = np.array([keys.index((question.source, question.sample)) for question in questions])
    size = np.bincount(image_of, minlength=len(keys))
    draws = np.random.default_rng(0).integers(0, len(keys), size=(_NUM_RESAMPLES, len(keys)))

    def interval(control: npt.NDArray[np.bool_]) -> tuple[float, float]:
        gain = np.bincount(image_of, weights=right.astype(float) - control.astype(float), minlength=len(keys))
        low, high = np.quantile(gain[draws].sum(axis=1) / size[draws].sum(axis=1), [0.025, 0.975])
        return float(low), float(high)

    return Accuracy(
        num_questions=len(questions),
        num_pictures=len(keys),
        right_picture=float(right.mean()),
        other_picture=float(other.mean()),
        commonest_answer=count / len(questions),
        commonest=commonest,
        difference=float(right.mean() - other.mean()),
        interval=interval(other),
        base_view=None if base_view is None else float(base_view.mean()),
        base_view_difference=None if base_view is None else float(right.mean() - base_view.mean()),
        base_view_interval=None if base_view is None else interval(base_view),
    )


def _encode_question(
    processor: Processor, image_sample: StoredSample, question: Question, encoded: dict[int, Example], number: int
) -> Example:
    """Encodes a question with the image of a sample. `encoded` caches the tiles by the number of the sample."""
    messages = _make_messages(question)
    try:
        if number not in encoded:
            encoded[number] = processor.encode(messages, image_sample.sizes_hw, image_sample.images)
        return Example(processor.layout(messages, image_sample.sizes_hw), encoded[number].tiles)
    except OSError as error:
        raise DataError(
            f"the image of sample {image_sample.id!r} of source {image_sample.source} cannot be read: {error}"
        ) from error


def _make_messages(question: Question) -> tuple[Message, Message]:
    return Message("user", f"<image>\n{question.text}"), Message("assistant", question.truth)


def _split_into_groups(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yields groups of samples that exchange images. Only a single sample in total forms a group of one."""
    bounds = list(range(0, len(numbers), _IMAGES_PER_GROUP))
    if len(bounds) > 1 and len(numbers) - bounds[-1] < 2:
        bounds.pop()
    for start, stop in zip(bounds, [*bounds[1:], len(numbers)], strict=True):
        yield list(numbers[start:stop])
