"""A sample → ids, labels, tiles and the place of every image token.

`Processor.layout` needs only messages and picture sizes; `Processor.encode` is that same layout plus pixels, so the
length table and the training step can never count differently. Rejections are values with a reason: the caller
counts them. Rows and batches are `batch.py`'s.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

import numpy as np

from llava_next.config import ModelError, ProcessorConfig, check_grids
from llava_next.inputs.anyres import ImageLayout, SizeHW, cut_tiles, decode, image_layout
from llava_next.inputs.chat_template import template_for
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER, NO_SYSTEM_TURN, MessageLike, Segment

IGNORE = -100
"""Label of a position that is not supervised."""

_OTHER_TEMPLATE = "choose a template made for it with stage.template=NAME"


class RejectReason(StrEnum):
    """Why a sound record cannot be trained on with this backbone and this maximum length."""

    TOO_LONG = "too_long"
    NO_SUPERVISED = "no_supervised"
    SYSTEM_TURN = "system_turn"


class SampleRejected(Exception):
    """This sample has no place in this run; `reason` is counted, `detail` says the numbers."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class SampleLayout:
    """The integers of an encoded sample.

    `ids` and `labels` are int32 [T]; labels stand at the position of the token they supervise (IGNORE elsewhere).
    `images` are the layouts of its pictures, in order.
    """

    ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageLayout, ...]
    image_token_id: int
    num_rounds_cut: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that enter the loss: the first token of a sample is predicted by nothing and never counts."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def num_tiles(self) -> int:
        return sum(image.num_tiles for image in self.images)


@dataclass(frozen=True)
class Example:
    """An encoded sample: its layout and its pictures' views, uint8 [num_tiles, S, S, 3]."""

    layout: SampleLayout
    tiles: np.ndarray


class Processor:
    """Encodes samples for one tokenizer, template, geometry and maximum length.

    Args:
        tokenizer: a fast Hugging Face tokenizer that knows the image token as one id.
        config: the rest of what decides the encoding.

    Raises:
        ModelError: the tokenizer is slow, or lacks the image token or a token of the template, or its own chat template
            was asked for and cannot be used.
    """

    def __init__(self, tokenizer: Any, config: ProcessorConfig) -> None:
        check_grids(config.grids)
        if (config.image_mode == "pad") != (config.pad_colour is not None):
            raise ModelError(f"image mode {config.image_mode} and pad_colour={config.pad_colour} do not go together")
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
        self.config = config
        self.tokenizer = tokenizer
        self.template = template_for(config.template, tokenizer)
        self.image_token_id = _single_id(tokenizer, IMAGE_PLACEHOLDER, "image token")
        if self.template.end:
            _single_id(tokenizer, self.template.end, f"end token of template {config.template}")
        self._released_ids = self._find_released_ids()
        self._opening_ids = self._find_opening_ids()
        self._special_text = _special_text(tokenizer)

    def _find_opening_ids(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if not self.template.bos or (bos is None and self.template.caption_only):
            return []  # plain serves every backbone: captions open with the token where the tokenizer has one
        if bos is None:
            raise ModelError(
                f"template {self.config.template} opens with the beginning-of-sequence token, which this tokenizer "
                f"lacks; {_OTHER_TEMPLATE}"
            )
        return [bos]

    def _find_released_ids(self) -> list[int]:
        if not self.config.unmask_special_tokens:
            return []
        if not self.template.released_specials:
            raise ModelError(
                f"stage.unmask_special_tokens: no release of template {self.config.template} supervised special "
                "tokens; leave it false"
            )
        return [_single_id(self.tokenizer, text, "special token") for text in self.template.released_specials]

    @property
    def fingerprint(self) -> str:
        """Changes whenever an encoding could: the configuration, the template's text and the whole tokenizer."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.pop("post_processor")  # adds special tokens, which are never asked for here
        parts = [
            json.dumps(asdict(self.config), sort_keys=True),
            json.dumps(asdict(self.template), sort_keys=True),
            json.dumps(tokenizer, sort_keys=True),
            str(self.tokenizer.bos_token_id),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def layout(self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW]) -> SampleLayout:
        """Ids, labels and image layouts from messages and (height, width) of each picture.

        A sample longer than the maximum is cut after the last answer that fits.

        Raises:
            SampleRejected: no answer fits, nothing is supervised, or the template has no place for a system turn.
            ModelError: placeholders and pictures differ in number.
        """
        if self.template.system_format is None and messages and messages[0].role == "system":
            raise SampleRejected(RejectReason.SYSTEM_TURN, f"template {self.template.name}: {NO_SYSTEM_TURN}")
        images = tuple(self._image_layout(size) for size in sizes_hw)
        ids, labels, round_ends = self._tokens(self._render(messages), images)
        num_rounds = len(round_ends)
        if len(ids) > self.config.max_length:
            length = len(ids)
            round_ends = [end for end in round_ends if end <= self.config.max_length]
            if not round_ends:
                raise SampleRejected(
                    RejectReason.TOO_LONG, f"{length} tokens, no answer ends within {self.config.max_length}"
                )
            ids, labels = ids[: round_ends[-1]], labels[: round_ends[-1]]
            images = images[: self._num_whole_images(ids, images)]
        if not (labels[1:] != IGNORE).any():
            raise SampleRejected(RejectReason.NO_SUPERVISED, f"{len(ids)} tokens, none of them of an answer")
        return SampleLayout(ids, labels, images, self.image_token_id, num_rounds - len(round_ends))

    def encode(self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW], pictures: Sequence[bytes]) -> Example:
        """The layout and the tiles. Errors are those of `layout`, and OSError for bytes that are no picture."""
        layout = self.layout(messages, sizes_hw)
        tile = self.config.tile
        tiles = np.empty((layout.num_tiles, tile, tile, 3), dtype=np.uint8)
        start = 0
        for picture, image in zip(pictures[: len(layout.images)], layout.images, strict=True):
            view = tiles[start : start + image.num_tiles]
            squash = self.config.image_mode == "squash"
            cut_tiles(decode(picture), image, tile, pad_colour=self.config.pad_colour, squash=squash, out=view)
            start += image.num_tiles
        return Example(layout, tiles)

    def prompt(
        self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW]
    ) -> tuple[np.ndarray, tuple[ImageLayout, ...]]:
        """Ids of a conversation that ends with a question, up to where the answer begins: int32 [T]."""
        images = tuple(self._image_layout(size) for size in sizes_hw)
        ids, _, _ = self._tokens(self._render(messages), images)
        return ids, images

    def special_texts(self, messages: Sequence[MessageLike]) -> set[str]:
        """Special tokens whose text is in the messages' own text.

        The tokenizer makes the token of it, as in the authors' code: an end token written in an answer ends that answer
        for the model. The image placeholder is none of them.
        """
        if self.template.caption_only:
            messages = [message for message in messages if message.role == "assistant"]  # questions are not rendered
        return {text for message in messages for text in self._special_text.findall(message.text)}

    def _render(self, messages: Sequence[MessageLike]) -> list[Segment]:
        if not self.config.unmask_special_tokens:
            return self.template.render(messages)
        return self.template.render(messages, whole_answers=True)

    def _image_layout(self, size_hw: SizeHW) -> ImageLayout:
        config = self.config
        return image_layout(
            size_hw,
            mode=config.image_mode,
            grids=config.grids,
            tile=config.tile,
            patches_per_side=config.patches_per_side,
            rounding=config.rounding,
        )

    def _tokens(
        self, segments: Sequence[Segment], images: Sequence[ImageLayout]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids, labels and the positions just after each round.

        The text between two pictures is tokenized once, as the authors do; which of its tokens are supervised
        follows from their character offsets. No span is ever tokenized a second time to find its length.
        """
        text = "".join(segment.text for segment in segments)
        supervised = np.zeros(len(text) + 1, dtype=bool)
        round_end_chars: list[int] = []
        start = 0
        for segment in segments:
            stop = start + len(segment.text)
            supervised[start:stop] = segment.supervised
            if segment.ends_round:
                round_end_chars.append(stop)
            start = stop
        pieces = text.split(IMAGE_PLACEHOLDER)
        if len(pieces) - 1 != len(images):
            raise ModelError(f"{len(pieces) - 1} placeholders {IMAGE_PLACEHOLDER} but {len(images)} pictures")

        num_opening = len(self._opening_ids)
        ids = [np.array(self._opening_ids, dtype=np.int32)]
        answers = [np.zeros(num_opening, dtype=bool)]
        ends = [np.zeros(num_opening, dtype=np.int64)]  # the character just behind each token
        start = 0
        for index, piece in enumerate(pieces):
            if index:
                num_tokens = images[index - 1].num_tokens
                ids.append(np.full(num_tokens, self.image_token_id, dtype=np.int32))
                answers.append(np.zeros(num_tokens, dtype=bool))
                ends.append(np.full(num_tokens, start))
            if piece:
                tokens, first, last = self._encode(piece)
                ids.append(tokens)
                # A token counts as the answer's when its last character is: "▁A" begins with the header's space.
                answers.append((last > first) & supervised[start + last - 1])
                ends.append(start + last)
            start += len(piece) + len(IMAGE_PLACEHOLDER)
        round_ends = np.searchsorted(np.concatenate(ends), round_end_chars, side="right").tolist()
        all_ids, is_answer = np.concatenate(ids), np.concatenate(answers)
        if self._released_ids:
            is_answer |= np.isin(all_ids, self._released_ids)
        return all_ids, np.where(is_answer, all_ids, np.int32(IGNORE)), round_ends

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a text, and the characters between which each stands: int32, int64, int64 [num_tokens].

        Asks the tokenizer's own engine: transformers' wrapper around it costs as much again, and the length table
        asks a million times. What an earlier caller of the wrapper set is undone as the wrapper would.
        """
        engine = self.tokenizer.backend_tokenizer
        engine.no_truncation()
        engine.no_padding()
        encoded = engine.encode(text, add_special_tokens=False)
        spans = np.fromiter(chain.from_iterable(encoded.offsets), dtype=np.int64, count=2 * len(encoded))
        return np.array(encoded.ids, dtype=np.int32), spans[::2], spans[1::2]

    def _num_whole_images(self, ids: np.ndarray, images: Sequence[ImageLayout]) -> int:
        """Pictures whose tokens are all there; a cut falls after an answer, so never inside a picture."""
        remaining = int((ids == self.image_token_id).sum())
        for index, image in enumerate(images):
            if remaining == 0:
                return index
            remaining -= image.num_tokens
        return len(images)


def _special_text(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of every special token but the image placeholder."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special and token.content} - {IMAGE_PLACEHOLDER}
    # The longest first, as the tokenizer matches; with no text at all, what matches nothing.
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _single_id(tokenizer: Any, text: str, what: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # A sentencepiece tokenizer may put its word-begin mark before the first piece.
    if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁":
        ids = ids[1:]
    if len(ids) != 1:
        raise ModelError(
            f"the {what}, {text!r}, is {len(ids)} tokens for this tokenizer; it must be one: {_OTHER_TEMPLATE}"
        )
    return int(ids[0])
