"""Free answers of stock transformers, from a directory alone: its model, its processor, its `generate`, in batches.

Owns the batches and what becomes of their answers. That the stock processor renders the prompt of the training is
checked for every question: an answer to another prompt would be somebody else's result.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_recipes.schema.sample import Message
from data_recipes.store.reader import StoredSample
from llava_next.config import ModelError
from llava_next.inputs.anyres import decode
from llava_next.inputs.chat_template import adds_special_tokens
from llava_next.inputs.processor import Processor
from train.evaluate.image_questions import Question
from train.evaluate.metrics import score

ONLY_LOSSES = "python -m train.evaluate --generate 0 measures its losses, and evaluate.answers asks it in training"
"""What is left for a model that stock transformers loads and cannot run."""


@dataclass(frozen=True)
class Answer:
    """What was answered; `is_cut`: it ran into the limit of new tokens. `score` is None where nothing can be said."""

    source: str
    id: str
    text: str
    truth: str
    answer: str
    score: float | None
    is_cut: bool


class StockModel:
    """A directory as stock transformers runs it.

    Args:
        export: the directory.
        processor: of our own, whose prompts the stock one has to render.
        device: where it runs; on a CPU in float32, whatever the weights are in.
        batch_size: questions that are answered together, padded on the left.
        max_new_tokens: the longest answer.
    """

    def __init__(
        self, export: Path, processor: Processor, device: torch.device, *, batch_size: int, max_new_tokens: int
    ) -> None:
        dtype = "auto" if device.type == "cuda" else torch.float32
        self._export, self._processor, self._device = export, processor, device
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._stock = AutoProcessor.from_pretrained(export)
        self._model = AutoModelForImageTextToText.from_pretrained(export, dtype=dtype).to(device).eval()

    def answers(self, samples: Sequence[StoredSample], questions: Sequence[Question], metric: str) -> list[Answer]:
        """Greedy answers, in the order of the questions, scored by the metric of that name.

        Questions of like length share a batch, so that little is padded. In float32 an answer does not depend on its
        batch; in half precision rounding does.

        Raises:
            ModelError: the stock processor renders another prompt than training did.
        """
        lengths = [len(self._ids(samples, question)) for question in questions]
        order = sorted(range(len(questions)), key=lambda number: (-lengths[number], number))
        found: dict[int, Answer] = {}
        with tqdm(total=len(order), desc="answers", unit="question", file=sys.stderr) as bar:
            for start in range(0, len(order), self._batch_size):
                chunk = order[start : start + self._batch_size]
                texts = self._generate(samples, [questions[number] for number in chunk])
                for number, (text, is_cut) in zip(chunk, texts, strict=True):
                    question = questions[number]
                    said = score(metric, text, [question.truth])
                    sample_id = samples[question.sample].id
                    found[number] = Answer(
                        question.source, sample_id, question.text, question.truth, text, said, is_cut
                    )
                bar.update(len(chunk))
        return [found[number] for number in range(len(questions))]

    @torch.no_grad()
    def _generate(self, samples: Sequence[StoredSample], questions: Sequence[Question]) -> list[tuple[str, bool]]:
        prompts = [self._prompt(question) for question in questions]
        pictures = [decode(samples[question.sample].pictures[0]) for question in questions]
        inputs = self._stock(
            images=pictures,
            text=prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=adds_special_tokens(self._stock.tokenizer, prompts[0]),
        )
        self._check(samples, questions, inputs["input_ids"], inputs["attention_mask"])
        inputs = inputs.to(self._device, self._model.dtype)
        outputs = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        new = outputs[:, inputs["input_ids"].shape[1] :]
        stops = self._model.generation_config.eos_token_id
        stop_ids = torch.tensor(stops if isinstance(stops, list) else [stops], device=new.device)
        is_cut = ~torch.isin(new, stop_ids).any(dim=1)
        texts = self._stock.batch_decode(new, skip_special_tokens=True)
        return [(text.strip(), bool(cut)) for text, cut in zip(texts, is_cut, strict=True)]

    def _prompt(self, question: Question) -> str:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
        return str(self._stock.apply_chat_template([turn], add_generation_prompt=True))

    def _ids(self, samples: Sequence[StoredSample], question: Question) -> list[int]:
        message = Message("user", f"<image>\n{question.text}")
        ids, _ = self._processor.prompt([message], samples[question.sample].sizes_hw)
        return ids.tolist()  # type: ignore[no-any-return]

    def _check(
        self, samples: Sequence[StoredSample], questions: Sequence[Question], ids: torch.Tensor, mask: torch.Tensor
    ) -> None:
        for question, row, kept in zip(questions, ids, mask, strict=True):
            if row[kept.bool()].tolist() != self._ids(samples, question):
                raise ModelError(
                    f"{self._export}: its processor renders another prompt than training did: "
                    f"{self._prompt(question)!r}"
                )
