"""Measures the effect of the images: the accuracy of single questions with their own images, with others, and with the
base view of their own image alone.

The other image of a question about one image is that of another sample. In a set, every image but the first is replaced
by those of another sample, so that a model that sees only one image of a set gains nothing.

An answer is right if greedy decoding gives exactly the truth, with its end token. This is the case if every token of
the truth is the most likely one after the true tokens before it, so one forward pass over prompt and truth decides it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_recipes.raw.questions import RESPONSE_FORMAT_PROMPTS
from data_recipes.schema.sample import DataError, Message
from data_recipes.store.reader import StoredSample
from llava_next.config import ViewsConfig
from llava_next.inputs.anyres import SizeHW
from llava_next.inputs.batch import collate
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.llava_next import LlavaNext
from train.config.schema import PackingConfig
from train.evaluate.evaluation_ranks import EvaluationRanks, describe_row_budgets, explain_out_of_memory
from train.validation.held_out import HeldOutSample

_T = TypeVar("_T")
_IMAGES_PER_GROUP = 8  # that are each other's other image
_NUM_RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Question:
    """One question about the images of a sample.

    Attributes:
        sample: the position of its sample in the list of samples.
        text: without a placeholder if it is about one image, else with one for each image.
        num_images: it is asked with the first images of the sample, as many.
    """

    source: str
    sample: int
    text: str
    truth: str
    num_images: int = 1

    @property
    def prompt(self) -> str:
        """The text with a placeholder for each image, as training has it."""
        return f"{IMAGE_PLACEHOLDER}\n{self.text}" if self.num_images == 1 else self.text


@dataclass(frozen=True)
class Accuracy:
    """Shares of exactly answered questions.

    Attributes:
        right_picture, other_picture: with the question's own images and with others.
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


def read_image_samples(samples: Sequence[HeldOutSample], limit: int) -> list[StoredSample]:
    """Reads the first `limit` samples that have images."""
    chosen: list[StoredSample] = []
    for sample in samples:
        if len(chosen) == limit:
            break
        if sample.text().sizes_hw:
            chosen.append(sample.read())
    return chosen


def extract_questions(source: str, samples: Sequence[StoredSample], limit: int, per_picture: int) -> list[Question]:
    """Returns the first `per_picture` questions of each conversation, up to `limit` in total.

    If the first question of a conversation ends with an instruction on the form of the answer, it is appended to the
    other questions too, since each is asked without the others. A question about a set has all images up to it; those
    of earlier turns come first.
    """
    questions = []
    for number, sample in enumerate(samples):
        turns = [message for message in sample.messages if message.role != "system"]
        pairs = list(zip(turns[0::2], turns[1::2], strict=False))[:per_picture]
        ending = next((ending for ending in RESPONSE_FORMAT_PROMPTS if pairs and pairs[0][0].text.endswith(ending)), "")
        num_before = 0
        for question, answer in pairs:
            text = question.text
            num_images = num_before + text.count(IMAGE_PLACEHOLDER)
            if len(sample.images) == 1:
                num_images, text = 1, text.replace(IMAGE_PLACEHOLDER, "")
            else:
                text = f"{IMAGE_PLACEHOLDER}\n" * num_before + text
            text = text.strip()
            if not text.endswith(ending):
                text = f"{text}\n{ending}"
            questions.append(Question(source, number, text, answer.text, num_images))
            num_before = num_images
    return questions[:limit]


def filter_askable(
    processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[list[Question], int]:
    """Selects the questions that can be asked with their own images and with others, as training has them.

    They fit the maximum length with every image. One about a set has several images, since training shows a set's
    images in other views than a single one, and there is another set with as many.

    Returns:
        These questions, and the number of the others.
    """
    kinds = {len(sample.images) > 1 for sample in samples}
    largest = {is_set: _find_largest(processor, samples, is_set=is_set) for is_set in kinds}

    def is_askable(question: Question) -> bool:
        if len(samples[question.sample].images) > 1 and (
            question.num_images < 2 or _find_other_set(samples, question) == question.sample
        ):
            return False
        return _has_space(processor, question, [largest[question.num_images > 1]] * question.num_images)

    askable = [question for question in questions if is_askable(question)]
    return askable, len(questions) - len(askable)


def _find_other_set(samples: Sequence[StoredSample], question: Question) -> int:
    """The next sample with at least the question's number of images; its own where there is no other."""
    order = [*range(question.sample + 1, len(samples)), *range(question.sample)]
    return next((number for number in order if len(samples[number].images) >= question.num_images), question.sample)


def _find_largest(processor: Processor, samples: Sequence[StoredSample], *, is_set: bool) -> SizeHW:
    """The size of an image with the most tokens, in samples with one image or in sets."""
    num_images = 2 if is_set else 1
    message = [Message("user", IMAGE_PLACEHOLDER * num_images)]
    sizes = {size for sample in samples for size in sample.sizes_hw if (len(sample.sizes_hw) > 1) == is_set}
    return max(sorted(sizes), key=lambda size: len(processor.prompt(message, [size] * num_images)[0]))


def _has_space(processor: Processor, question: Question, sizes_hw: Sequence[SizeHW]) -> bool:
    try:
        processor.layout(_make_messages(question), sizes_hw)
    except SampleRejected:
        return False
    return True


class _Use(NamedTuple):
    """A question that is asked with the images of a sample; both are positions, in the questions and in the samples."""

    question: int
    image: int
    is_own: bool

    def key(self, question: Question) -> tuple[int, ...]:
        """Equal for uses of equal images."""
        if question.num_images == 1:
            return (self.image,)
        return (question.sample, self.image, question.num_images)

    def choose(self, question: Question, own: Sequence[_T], other: Sequence[_T]) -> list[_T]:
        """The sizes or the images of this use, of those of the question's own sample and of the other one."""
        if self.is_own or question.num_images == 1:
            return list((own if self.is_own else other)[: question.num_images])
        return [own[0], *other[1 : question.num_images]]


def answer_all(
    model: LlavaNext,
    processor: Processor,
    samples: Sequence[StoredSample],
    questions: Sequence[Question],
    packing: PackingConfig,
    ranks: EvaluationRanks,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Answers every question with its own images and with others, and returns which answers are right.

    The others are those of the next sample, so every image is used equally often in both roles. Questions with equal
    images follow each other, so that they mostly share a row and therefore the tower's features. Every rank must call
    it.

    Args:
        packing: budgets of a row.

    Returns:
        Whether the answers with the own and with the other images are right, bool [num_questions] each.

    Raises:
        DataError: an image cannot be read.
        EvaluationError: a row did not fit into memory.
    """

    uses = _list_uses(samples, questions)
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
    """Answers every question with the base view of its images alone: the same weights, without tiles and newlines.

    The base view of AnyRes is the entire image, resized to a square of one tile, which is the view squash. Images of a
    set that are not cut with AnyRes keep their view. Every rank must call it. Arguments and errors are those of
    `answer_all`.

    Returns:
        Whether the answers are right, bool [num_questions].
    """
    views = processor.config.views
    several = "squash" if views.several is None or views.rules[1].mode == "anyres" else views.several
    closing_newline = views.closing_newline and several == views.several
    hits = np.zeros(len(questions), dtype=bool)
    for is_set, base in ((False, ViewsConfig("squash")), (True, ViewsConfig("squash", several, closing_newline))):
        indices = [index for index, question in enumerate(questions) if (question.num_images > 1) == is_set]
        uses = [_Use(index, questions[index].sample, True) for index in indices]
        single_view = Processor(processor.tokenizer, replace(processor.config, views=base))
        if uses:
            hits[indices] = _answer_uses(model, single_view, samples, questions, uses, packing, ranks)
    return hits


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
    images: set[tuple[int, ...]] = set()
    for use in uses:
        question = questions[use.question]
        sizes = use.choose(question, samples[question.sample].sizes_hw, samples[use.image].sizes_hw)
        layout = processor.layout(_make_messages(question), sizes)
        key = use.key(question)
        new_tiles = 0 if key in images else layout.num_tiles
        exceeds = num_tokens + layout.num_tokens > packing.max_tokens or num_tiles + new_tiles > packing.max_tiles
        if rows[-1] and exceeds:
            rows.append([])
            num_tokens, num_tiles, images, new_tiles = 0, 0, set(), layout.num_tiles
        rows[-1].append(use)
        num_tokens, num_tiles = num_tokens + layout.num_tokens, num_tiles + new_tiles
        images.add(key)
    return rows


def _list_uses(samples: Sequence[StoredSample], questions: Sequence[Question]) -> list[_Use]:
    """Returns every question with its own images and with the next sample's, sorted by image."""
    by_sample: dict[int, list[int]] = {}
    uses = []
    for index, question in enumerate(questions):
        if question.num_images == 1:
            by_sample.setdefault(question.sample, []).append(index)
        else:
            other = _find_other_set(samples, question)
            uses += [_Use(index, question.sample, True), _Use(index, other, False)]
    for group in _split_into_groups(sorted(by_sample)):
        for position, number in enumerate(group):
            uses += [_Use(index, number, True) for index in by_sample[number]]
            uses += [_Use(index, group[(position + 1) % len(group)], False) for index in by_sample[number]]
    return sorted(uses, key=lambda use: (use.image, not use.is_own, use.question))


def _encode_row(
    processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question], row: Sequence[_Use]
) -> list[Example]:
    encoded: dict[tuple[int, ...], Example] = {}
    return [_encode_use(processor, samples, questions[use.question], use, encoded) for use in row]


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


def _encode_use(
    processor: Processor,
    samples: Sequence[StoredSample],
    question: Question,
    use: _Use,
    encoded: dict[tuple[int, ...], Example],
) -> Example:
    """Encodes a question with the images of a use. `encoded` caches the tiles by the images."""
    messages, key = _make_messages(question), use.key(question)
    own, other = samples[question.sample], samples[use.image]
    sizes = use.choose(question, own.sizes_hw, other.sizes_hw)
    try:
        if key not in encoded:
            encoded[key] = processor.encode(messages, sizes, use.choose(question, own.images, other.images))
        return Example(processor.layout(messages, sizes), encoded[key].tiles)
    except OSError as error:
        raise DataError(f"an image of sample {other.id!r} of source {other.source} cannot be read: {error}") from error


def _make_messages(question: Question) -> tuple[Message, Message]:
    return Message("user", question.prompt), Message("assistant", question.truth)


def _split_into_groups(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yields groups of samples that exchange images. Only a single sample in total forms a group of one."""
    bounds = [*range(0, len(numbers), _IMAGES_PER_GROUP), len(numbers)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < 2:
        del bounds[-2]
    for start, stop in pairwise(bounds):
        yield list(numbers[start:stop])
