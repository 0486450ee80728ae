"""The differences between the authors' ids or labels and ours, as rules that convert ours into theirs.

There is no tolerance: each rule changes one property of our code to that of theirs, and the result must be equal to the
last id. differences.md gives the reasons, and the tests check its table.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from data_recipes.schema.sample import Message
from llava_next.config import AUTHORS_GRIDS, ProcessorConfig, ViewsConfig
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER, Segment, Template, get_template, move_image_to_front
from llava_next.inputs.processor import Processor, SampleRejected
from tests.oracles.digests import IGNORE, IMAGE
from tests.oracles.inputs import Conversation, Turn

RULES = {
    "one_picture_a_turn": "several placeholders of a turn become one",
    "picture_line_as_written": "a turn that begins with its placeholder is left as it is",
    "trimmed": "white space around every question and answer is cut off",
    "word_mark_before_space": "sentencepiece marks a word's beginning also where the text begins with a space",
    "whole_assistant_message": "the assistant's header and what follows the end token are supervised",
    "special_tokens_everywhere": "special tokens are supervised, also those of system text and questions",
    "one_token_early": "every supervised range begins and ends one token too early",
    "sample_ignored": "no token of the sample is supervised",
    "cut_in_an_answer": "a sample that is too long ends at the maximum length and not with its last whole answer",
    "kept_unfinished": "a sample of which no answer ends within the maximum length is kept, and ends there",
}
"""What the authors do, by name; in the order in which they are tried."""


RECORD_RULES = {
    "no_labels": "the record is kept and none of its tokens is supervised",
    "blank_answer": "the record is kept and the blank answer is supervised",
    "error_raised": "reading the record raises an exception, which ends the run",
    "next_record_taken": "the next record is taken in its place",
}
"""What the authors do with a record that preparation repairs or rejects, by name."""

_NO_LIMIT = 100_000
"""A maximum length that no conversation has."""


@dataclass(frozen=True)
class _AuthorsTemplate(Template):
    """Our template with some of the authors' habits; turns are placed and trimmed before they come here."""

    whole_assistant_message: bool = False

    def _question(self, text: str) -> str:
        if self.caption_only:
            return super()._question(text)
        return self.question_format.replace("{text}", text)

    def render(self, messages: Sequence[Any], *, whole_answers: bool = False) -> list[Segment]:
        return super().render(messages, whole_answers=self.whole_assistant_message)


@dataclass(frozen=True)
class _Encoding:
    """The part of an encoding that the processor reads."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


class _WordMarks:
    """A fast Llama tokenizer that treats leading spaces as sentencepiece does: with a word mark of their own.

    It is its own engine (`backend_tokenizer`), which is what the processor asks.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.added_tokens_decoder.values() if tokenizer.legacy else ()
        special = [re.escape(token.content) for token in known if token.content != IMAGE_PLACEHOLDER]
        self._places = re.compile(f"(^{''.join('|' + text for text in special)})(?= )")
        self.backend_tokenizer = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, **options)

    def no_truncation(self) -> None:
        """Part of the interface; nothing is truncated here."""

    def no_padding(self) -> None:
        """Part of the interface; nothing is padded here."""

    def encode(self, text: str, add_special_tokens: bool) -> _Encoding:
        """The text with a mark more at each such place; offsets are those of the text as it came."""
        added = [match.end() + number for number, match in enumerate(self._places.finditer(text))]
        engine = self._tokenizer.backend_tokenizer
        encoded = engine.encode(self._places.sub(r"\1 ", text), add_special_tokens=add_special_tokens)

        def place(character: int) -> int:
            return character - sum(number < character for number in added)

        return _Encoding(encoded.ids, [(place(first), place(last - 1) + 1) for first, last in encoded.offsets])


class Comparison:
    """Our ids and labels of one template and tokenizer, under any set of rules."""

    def __init__(self, template: str, tokenizer: Any, rules: Sequence[str], max_length: int = _NO_LIMIT) -> None:
        self.rules, self.max_length = tuple(rules), max_length
        self._template, self._tokenizer = template, tokenizer
        self._processors: dict[tuple[frozenset[str], int], Processor] = {}
        self._encoded: dict[tuple[int, frozenset[str], int], tuple[list[int], list[int]]] = {}

    def subsets(self) -> Iterator[frozenset[str]]:
        """Sets of this template's rules, smaller ones first."""
        for size in range(len(self.rules) + 1):
            yield from map(frozenset, combinations(self.rules, size))

    def encode(self, record: Conversation, rules: frozenset[str]) -> tuple[list[int], list[int]]:
        """Ids, with IMAGE for each image, and labels of a record; empty for a rejected record."""
        on_labels = rules & {"special_tokens_everywhere", "one_token_early", "sample_ignored"}
        of_length = rules & {"cut_in_an_answer", "kept_unfinished"}
        ids, labels = self._cut(record, rules - on_labels - of_length, of_length)
        if "special_tokens_everywhere" in rules:
            special = {self._id(text) for text in get_template(self._template).released_specials}
            labels = [token if token in special else label for token, label in zip(ids, labels, strict=True)]
        if "one_token_early" in rules:
            shifted = [label != IGNORE for label in labels[1:]] + [False]
            labels = [token if early else IGNORE for token, early in zip(ids, shifted, strict=True)]
        if "sample_ignored" in rules:
            labels = [IGNORE] * len(labels)
        return ids, labels

    def _cut(
        self, record: Conversation, rules: frozenset[str], of_length: frozenset[str]
    ) -> tuple[list[int], list[int]]:
        """A record within the maximum length, as ours cuts or rejects it, or as `of_length` says."""
        whole, ours = (self._kept(record, rules, length) for length in (_NO_LIMIT, self.max_length))
        if len(whole[0]) > self.max_length and ("cut_in_an_answer" if ours[0] else "kept_unfinished") in of_length:
            return whole[0][: self.max_length], whole[1][: self.max_length]
        return ours

    def _kept(self, record: Conversation, rules: frozenset[str], max_length: int) -> tuple[list[int], list[int]]:
        key = (id(record), rules, max_length)
        if key not in self._encoded:
            self._encoded[key] = self._tokens(record, rules, max_length)
        return self._encoded[key]

    def _id(self, text: str) -> int:
        (token,) = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(token)

    def _tokens(self, record: Conversation, rules: frozenset[str], max_length: int) -> tuple[list[int], list[int]]:
        processor = self.processor(rules, max_length)
        messages = [
            Message("user" if turn.speaker == "human" else "assistant", _written(turn, record, rules))
            for turn in record.turns
        ]
        num_images = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages)
        try:
            layout = processor.layout(messages, [(1, 1)] * num_images)
        except SampleRejected:
            return [], []
        ids = [IMAGE if token == layout.image_token_id else int(token) for token in layout.ids]
        return ids, [int(label) for label in layout.labels]

    def processor(self, rules: frozenset[str], max_length: int = _NO_LIMIT) -> Processor:
        """Ours for no rule. One patch a picture: a picture is one token, as before the authors' model widens it."""
        key = rules, max_length
        if key not in self._processors:
            config = ProcessorConfig(
                template=self._template,
                views=ViewsConfig("crop", "crop"),
                grids=AUTHORS_GRIDS,
                tile=336,
                patches_per_side=1,
                max_length=max_length,
            )
            marked = "word_mark_before_space" in rules
            processor = Processor(_WordMarks(self._tokenizer) if marked else self._tokenizer, config)
            if rules:
                ours: dict[str, Any] = asdict(get_template(self._template))
                whole = "whole_assistant_message" in rules
                processor.template = _AuthorsTemplate(**ours, whole_assistant_message=whole)
            self._processors[key] = processor
        return self._processors[key]


def _written(turn: Turn, record: Conversation, rules: frozenset[str]) -> str:
    """A turn's text with its placeholder where these rules have it."""
    text = turn.value
    if not rules or turn.speaker != "human":
        pass  # ours places it itself
    elif "one_picture_a_turn" in rules and IMAGE_PLACEHOLDER in text:
        text = f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
    elif "picture_line_as_written" not in rules or not text.startswith(IMAGE_PLACEHOLDER):
        text = move_image_to_front(text)
    return text.strip() if "trimmed" in rules else text
