"""Questions about pictures, each asked on its own, and whether the model looks: with its picture, with another's.

An answer counts when it is exactly the truth, end token included, in greedy decoding. Greedy decoding gives the truth
just when each of its tokens is the likeliest after the true ones before it, so one forward pass over prompt and truth
decides it, without generating. Beside both stands the commonest answer.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from data_recipes.raw.questions import ENDINGS
from data_recipes.schema.sample import DataError, Message
from data_recipes.store.reader import StoredSample
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.llava_next import LlavaNext
from train.validation.held_out import HeldOutSample

_PICTURES_PER_ROW = 8
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """One question about one picture; `sample` is the number of its sample within its source."""

    source: str
    sample: int
    text: str
    truth: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered exactly; the interval is of right_picture - other_picture, at 95 %."""

    num_questions: int
    num_pictures: int
    right_picture: float
    other_picture: float
    commonest_answer: float
    commonest: str
    difference: float
    interval: tuple[float, float]


def with_one_picture(samples: Sequence[HeldOutSample], limit: int) -> list[StoredSample]:
    """The first `limit` samples that show one picture, read."""
    found: list[StoredSample] = []
    for sample in samples:
        if len(found) == limit:
            break
        if len(sample.text().sizes_hw) == 1:
            found.append(sample.read())
    return found


def questions_of(source: str, samples: Sequence[StoredSample], limit: int, per_picture: int) -> list[Question]:
    """The first questions of each sample's conversation, up to `limit` in all; the samples' order decides.

    Where the conversation asks for a form of answer, with its first question, every question asks for it here: on its
    own it would not be known.
    """
    questions = []
    for number, sample in enumerate(samples):
        turns = [message for message in sample.messages if message.role != "system"]
        pairs = list(zip(turns[0::2], turns[1::2], strict=False))[:per_picture]
        ending = next((text for text in ENDINGS if pairs and pairs[0][0].text.endswith(text)), "")
        for question, answer in pairs:
            words = question.text.replace("<image>", "").strip()
            if not words.endswith(ending):
                words = f"{words}\n{ending}"
            questions.append(Question(source, number, words, answer.text))
    return questions[:limit]


def filter_by_length(
    processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[list[Question], int]:
    """The questions that fit the maximum length with every picture, as each is asked with another's too; and how many
    do not."""
    if not questions:
        return [], 0
    ask = [Message("user", "<image>")]
    largest = max(samples, key=lambda sample: len(processor.prompt(ask, sample.sizes_hw)[0]))
    kept = [question for question in questions if _fits(processor, question, largest)]
    return kept, len(questions) - len(kept)


def _fits(processor: Processor, question: Question, picture: StoredSample) -> bool:
    try:
        processor.layout(_messages(question), picture.sizes_hw)
    except SampleRejected:
        return False
    return True


def answer_all(
    model: LlavaNext, processor: Processor, samples: Sequence[StoredSample], questions: Sequence[Question]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Hits with the right picture and with another's: bool [num_questions] each.

    The other picture is the next sample's, so every picture is used as often as a right one as as a wrong one. Both
    ways share a row and so the tower's features.

    Raises:
        DataError: a picture cannot be read.
    """
    numbers = sorted({question.sample for question in questions})
    right = np.zeros(len(questions), dtype=bool)
    other = np.zeros(len(questions), dtype=bool)
    of_sample = {number: [i for i, q in enumerate(questions) if q.sample == number] for number in numbers}
    for chunk in tqdm(list(_chunks(numbers)), desc=questions[0].source, unit="row", file=sys.stderr):
        examples: list[Example] = []
        where: list[tuple[npt.NDArray[np.bool_], int]] = []
        encoded: dict[int, Example] = {}
        for place, number in enumerate(chunk):
            for picture, hits in ((number, right), (chunk[(place + 1) % len(chunk)], other)):
                for index in of_sample[number]:
                    examples.append(_ask(processor, samples[picture], questions[index], encoded, picture))
                    where.append((hits, index))
        config = processor.config
        batch = collate(examples, tile=config.tile, patches_per_tile=config.patches_per_side**2)
        hit = model.score(batch.to(model.hf.model.image_newline.device)).hits.cpu()
        missed = torch.zeros(len(examples), dtype=torch.long)
        missed.index_add_(0, batch.target_samples, (~hit).long())
        for (hits, index), wrong in zip(where, missed.tolist(), strict=True):
            hits[index] = wrong == 0
    return right, other


def summarize(questions: Sequence[Question], right: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> Accuracy:
    """Accuracies, and the bootstrap interval of their difference, pictures drawn with replacement.

    The commonest answer is the commonest truth of these very questions: no constant answer can do better.
    """
    commonest, count = Counter(question.truth for question in questions).most_common(1)[0]
    keys = sorted({(question.source, question.sample) for question in questions})
    picture_of = np.array([keys.index((question.source, question.sample)) for question in questions])
    gain = np.bincount(picture_of, weights=right.astype(float) - other.astype(float), minlength=len(keys))
    size = np.bincount(picture_of, minlength=len(keys))
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


def _ask(
    processor: Processor, picture: StoredSample, question: Question, encoded: dict[int, Example], number: int
) -> Example:
    """The question on its own, about this picture; pixels are cut once per picture."""
    messages = _messages(question)
    try:
        if number not in encoded:
            encoded[number] = processor.encode(messages, picture.sizes_hw, picture.pictures)
        return Example(processor.layout(messages, picture.sizes_hw), encoded[number].tiles)
    except OSError as error:
        raise DataError(f"sample {picture.id!r} of source {picture.source} cannot be asked about: {error}") from error


def _messages(question: Question) -> tuple[Message, Message]:
    return Message("user", f"<image>\n{question.text}"), Message("assistant", question.truth)


def _chunks(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Groups of pictures for one row, none of them alone: a lone picture has no other."""
    bounds = list(range(0, len(numbers), _PICTURES_PER_ROW))
    if len(bounds) > 1 and len(numbers) - bounds[-1] < 2:
        bounds.pop()
    for start, stop in zip(bounds, [*bounds[1:], len(numbers)], strict=True):
        yield list(numbers[start:stop])
