"""Evaluates a running server: the questions of prepared sources, its answers, and the metrics of `train.evaluate`.

No weights are loaded. Losses and the shares of exact answers with other images need the model itself and are left out.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from data_recipes.store.reader import StoredSample
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER
from train.evaluate.answers import Answer
from train.evaluate.chat_server import KEY_VARIABLE, ChatServer, Part, explain_unreadable, image_part, text_part
from train.evaluate.evaluated_model import Asked
from train.evaluate.image_questions import Question, extract_questions, read_image_samples
from train.evaluate.metrics import score
from train.evaluate.results import SourceReport

IMAGES_FIRST = "an image is inside the text, and this protocol puts images first"
"""Why a question about a set is not asked."""


@dataclass(frozen=True)
class ServedEvaluation:
    """How the questions are asked.

    Attributes:
        limit: maximum number of questions of a source.
        per_image: of each conversation.
        num_threads: requests at a time.
        max_new_tokens: maximum length of an answer.
    """

    limit: int
    per_image: int
    num_threads: int
    max_new_tokens: int

    def evaluate(self, server: ChatServer, asked: Asked) -> list[SourceReport]:
        """Asks the questions of every source and scores the answers.

        Raises:
            ConfigError, DataError, EvaluationError: see `ChatServer.ask`; an image cannot be read.
        """
        reports = []
        for source, held_out in asked.samples.items():
            samples = read_image_samples(held_out, self.limit)
            questions = extract_questions(source, samples, self.limit, self.per_image)
            askable = [question for question in questions if has_images_first(question)]
            reports.append(
                SourceReport(
                    source,
                    num_samples=len(held_out),
                    num_rejected=0,
                    num_tokens=0,
                    loss=None,
                    metric=asked.metrics[source],
                    answers=self._answer(server, samples, askable, asked.metrics[source]),
                    num_unasked=len(questions) - len(askable),
                    unasked_reason=IMAGES_FIRST,
                )
            )
        return reports

    def _answer(
        self, server: ChatServer, samples: Sequence[StoredSample], questions: Sequence[Question], metric: str
    ) -> list[Answer]:
        def answer(question: Question) -> Answer:
            sample = samples[question.sample]
            what = f"the question of sample {sample.id!r} of source {question.source}"
            reply = server.ask(make_parts(question, sample), self.max_new_tokens, what)
            value = score(metric, reply.text, [question.truth])
            return Answer(question.source, sample.id, question.text, question.truth, reply.text, value, reply.is_cut)

        with ThreadPoolExecutor(self.num_threads) as pool:
            try:
                answers = pool.map(answer, questions)
                return list(tqdm(answers, "answers", len(questions), unit="question", file=sys.stderr))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # without asking the questions that wait
                raise


def connect(url: str, model: str | None, timeout_s: float) -> ChatServer:
    """Returns the server, with the key of the environment. Arguments and errors are those of `ChatServer`."""
    return ChatServer(url, model, key=os.environ.get(KEY_VARIABLE, ""), timeout_s=timeout_s)


def has_images_first(question: Question) -> bool:
    """Whether the placeholders of a question come before its text, as chat templates place images."""
    return IMAGE_PLACEHOLDER not in _strip_images(question)


def make_parts(question: Question, sample: StoredSample) -> list[Part]:
    """Returns a question with its images as the parts of a message.

    Raises:
        DataError: an image cannot be read.
    """
    try:
        images = [image_part(image) for image in sample.images[: question.num_images]]
    except OSError as error:
        raise explain_unreadable(error, sample.id, question.source) from error
    return [*images, text_part(_strip_images(question))]


def _strip_images(question: Question) -> str:
    """The text behind the leading placeholders, each of which has a line of its own."""
    return question.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n" * question.num_images)
