"""Measures the effect of the image: the accuracy of single questions with their own image and with another one.

An answer is right if greedy decoding gives exactly the truth, with its end token. This is the case if every token of
the truth is the most likely one after the true tokens before it, so one forward pass over prompt and truth decides it.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_recipes.raw.questions import RESPONSE_FORMAT_PROMPTS
from data_recipes.schema.sample import DataError, Message
from data_recipes.store.reader import StoredSample
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.llava_next import LlavaNext
from train.validation.held_out import HeldOutSample

_IMAGES_PER_ROW = 8
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
    """

    num_questions: int
    num_pictures: int
    right_picture: float
    other_picture: float
    commonest_answer: float
    commonest: str
    difference: float
    interval: tuple[float, float]


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


def answer_all(
    model: LlavaNext, processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Answers every question with its own image and with another one, and returns which answers are right.

    The other image is that of the next sample, so every image is used equally often in both roles. Both uses share a
    row and therefore the tower's features.

    Returns:
        Whether the answers with the own and with the other image are right, bool [num_questions] each.

    Raises:
        DataError: an image cannot be read.
    """
    numbers = sorted({question.sample for question in questions})
    right = np.zeros(len(questions), dtype=bool)
    other = np.zeros(len(questions), dtype=bool)
    by_sample = {number: [i for i, q in enumerate(questions) if q.sample == number] for number in numbers}
    for chunk in tqdm(list(_split_into_chunks(numbers)), desc=questions[0].source, unit="row", file=sys.stderr):
        examples: list[Example] = []
        targets: list[tuple[npt.NDArray[np.bool_], int]] = []
        encoded: dict[int, Example] = {}
        for position, number in enumerate(chunk):
            for image, hits in ((number, right), (chunk[(position + 1) % len(chunk)], other)):
                for index in by_sample[number]:
                    examples.append(_encode_question(processor, samples[image], questions[index], encoded, image))
                    targets.append((hits, index))
        config = processor.config
        batch = collate(examples, tile=config.tile, patches_per_tile=config.patches_per_side**2)
        hit = model.score(batch.to(model.hf.model.image_newline.device)).hits.cpu()
        missed = torch.zeros(len(examples), dtype=torch.long)
        missed.index_add_(0, batch.target_samples, (~hit).long())
        for (hits, index), wrong in zip(targets, missed.tolist(), strict=True):
            hits[index] = wrong == 0
    return right, other


def summarize(questions: Sequence[Question], right: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> Accuracy:
    """Computes the accuracies and the bootstrap interval of their difference; images are drawn with replacement.

    Args:
        right, other: see `answer_all`.
    """
    commonest, count = Counter(question.truth for question in questions).most_common(1)[0]
    keys = sorted({(question.source, question.sample) for question in questions})
    image_of = np.array([keys.index((question.source, question.sample)) for question in questions])
    gain = np.bincount(image_of, weights=right.astype(float) - other.astype(float), minlength=len(keys))
    size = np.bincount(image_of, minlength=len(keys))
    draws = np.random.default_rng(0).integers(0, len(keys), size=(_NUM_RESAMPLES, len(keys)))
    differences = gain[draws].sum(axis=1) / size[draws].sum(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return Accuracy(
        num_questions=len(questions),
        num_pictures=len(keys),
        right_picture=float(right.mean()),
        other_picture=float(other.mean()),
        commonest_answer=count / len(questions),
        commonest=commonest,
        difference=float(right.mean() - other.mean()),
        interval=(float(low), float(high)),
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


def _split_into_chunks(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yields groups of samples for one row. Only a single sample in total forms a group of one."""
    bounds = list(range(0, len(numbers), _IMAGES_PER_ROW))
    if len(bounds) > 1 and len(numbers) - bounds[-1] < 2:
        bounds.pop()
    for start, stop in zip(bounds, [*bounds[1:], len(numbers)], strict=True):
        yield list(numbers[start:stop])
