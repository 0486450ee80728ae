"""Generates free answers in batches with stock transformers: the model, processor and `generate` of a directory.

For every question, the prompt of the stock processor is compared with that of the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from data_recipes.schema.sample import Message
from data_recipes.store.reader import StoredSample
from llava_next.config import ModelError
from llava_next.formats.onevision import load_processor
from llava_next.inputs.anyres import decode
from llava_next.inputs.chat_template import should_add_special_tokens
from llava_next.inputs.processor import Processor
from train.evaluate.evaluation_ranks import EvaluationRanks, explain_out_of_memory
from train.evaluate.image_questions import Question
from train.evaluate.metrics import score

LOSS_ONLY_HINT = (
    "`python -m train.evaluate --generate 0` computes its losses, and evaluate.answers generates answers in training"
)
"""The alternatives for a model that stock transformers loads but cannot run."""


@dataclass(frozen=True)
class Answer:
    """A free answer.

    Attributes:
        source, id, text, truth: of the question.
        answer: generated text.
        score: from 0 to 1; None if the metric cannot score it.
        is_cut: whether the answer reached the maximum number of new tokens.
    """

    source: str
    id: str
    text: str
    truth: str
    answer: str
    score: float | None
    is_cut: bool


class StockModel:
    """The model of a directory in stock transformers.

    Args:
        export: directory in the Hugging Face layout.
        processor: processor of the training, whose prompts the stock processor must reproduce.
        ranks: on whose devices the model is; on a CPU the weights are converted to float32.
        batch_size: questions per batch, which is padded on the left.
        max_new_tokens: maximum length of an answer.
    """

    def __init__(
        self, export: Path, processor: Processor, ranks: EvaluationRanks, *, batch_size: int, max_new_tokens: int
    ) -> None:
        dtype = "auto" if ranks.device.type == "cuda" else torch.float32
        self._export, self._processor, self._ranks = export, processor, ranks
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._stock = load_processor(export)
        self._model = AutoModelForImageTextToText.from_pretrained(export, dtype=dtype).to(ranks.device).eval()

    def generate_answers(
        self, samples: Sequence[StoredSample], questions: Sequence[Question], metric: str
    ) -> list[Answer]:
        """Returns greedy answers in the order of the questions, scored with a metric. Every rank must call it.

        Questions of similar length share a batch, which reduces padding. In float32 the answers do not depend on the
        batches; in half precision the rounding does.

        Args:
            metric: a name of `METRICS_BY_NAME`, or none.

        Raises:
            ModelError: the stock processor renders another prompt than the training.
            EvaluationError: a batch did not fit into memory.
        """
        lengths = [len(self._encode_prompt(samples, question)) for question in questions]
        order = sorted(range(len(questions)), key=lambda number: (-lengths[number], number))
        chunks = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

        def answer(chunk: Sequence[int]) -> list[tuple[str, bool]]:
            what = f"a batch of {len(chunk)} questions with prompts of up to {lengths[chunk[0]]:,} tokens"
            with explain_out_of_memory(what, f"--batch-size ({self._batch_size})"):
                return self._generate(samples, [questions[number] for number in chunk])

        texts = self._ranks.map(answer, chunks, description="answers", unit="batch")
        answers: dict[int, Answer] = {}
        for chunk, of_chunk in zip(chunks, texts, strict=True):
            for number, (text, is_cut) in zip(chunk, of_chunk, strict=True):
                question = questions[number]
                value = score(metric, text, [question.truth])
                sample_id = samples[question.sample].id
                answers[number] = Answer(question.source, sample_id, question.text, question.truth, text, value, is_cut)
        return [answers[number] for number in range(len(questions))]

    @torch.no_grad()
    def _generate(self, samples: Sequence[StoredSample], questions: Sequence[Question]) -> list[tuple[str, bool]]:
        prompts = [self._render_prompt(question) for question in questions]
        # In a list of lists, each has the images of one sample. LLaVA-OneVision depends on it.
        images = [
            [decode(image) for image in samples[question.sample].images[: question.num_images]]
            for question in questions
        ]
        inputs = self._stock(
            images=images,
            text=prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=should_add_special_tokens(self._stock.tokenizer, prompts[0]),
        )
        self._check_prompts(samples, questions, inputs["input_ids"], inputs["attention_mask"])
        inputs = inputs.to(self._ranks.device, self._model.dtype)
        outputs = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        new = outputs[:, inputs["input_ids"].shape[1] :]
        stops = self._model.generation_config.eos_token_id
        stop_ids = torch.tensor(stops if isinstance(stops, list) else [stops], device=new.device)
        is_cut = ~torch.isin(new, stop_ids).any(dim=1)
        texts = self._stock.batch_decode(new, skip_special_tokens=True)
        return [(text.strip(), bool(cut)) for text, cut in zip(texts, is_cut, strict=True)]

    def _render_prompt(self, question: Question) -> str:
        # A text with placeholders keeps them in their places; parts would bring the images to the front.
        content: Any = question.prompt
        if question.num_images == 1:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
        turn = {"role": "user", "content": content}
        return str(self._stock.apply_chat_template([turn], add_generation_prompt=True))

    def _encode_prompt(self, samples: Sequence[StoredSample], question: Question) -> list[int]:
        sizes_hw = samples[question.sample].sizes_hw[: question.num_images]
        ids, _ = self._processor.prompt([Message("user", question.prompt)], sizes_hw)
        return ids.tolist()  # type: ignore[no-any-return]

    def _check_prompts(
        self, samples: Sequence[StoredSample], questions: Sequence[Question], ids: torch.Tensor, mask: torch.Tensor
    ) -> None:
        for question, row, is_token in zip(questions, ids, mask, strict=True):
            if row[is_token.bool()].tolist() != self._encode_prompt(samples, question):
                raise ModelError(
                    f"{self._export}: the processor renders another prompt than the training: "
                    f"{self._render_prompt(question)!r}"
                )
