"""Encodes a sample as token ids, labels, tiles and image layouts.

`Processor.layout` needs only messages and image sizes, and `Processor.encode` adds the pixels to that layout, so that
the length table and the training step count the same tokens. A sample that cannot be trained on raises
`SampleRejected` with a reason, which callers count.
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

from llava_next.config import ModelError, ProcessorConfig, check_grids, check_views
from llava_next.inputs.anyres import ImageLayout, SizeHW, cut_tiles, decode, image_layout
from llava_next.inputs.chat_template import resolve_template
from llava_next.inputs.conversation import IMAGE_PLACEHOLDER, NO_SYSTEM_TURN, MessageLike, Segment

IGNORE = -100
"""Label of a position that is not supervised."""

_OTHER_TEMPLATE = "choose another template with stage.template=NAME"


class RejectReason(StrEnum):
    """The reason why a valid record cannot be trained on with this model, these views and this maximum length."""

    SEVERAL_IMAGES = "several_images"
    TOO_LONG = "too_long"
    NO_SUPERVISED = "no_supervised"
    SYSTEM_TURN = "system_turn"


class SampleRejected(Exception):
    """The sample cannot be trained on. `reason` is counted by callers, `detail` gives the numbers."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class SampleLayout:
    """An encoded sample without its tiles.

    Attributes:
        ids: int32 [T].
        labels: int32 [T], equal to `ids` at supervised tokens and IGNORE elsewhere.
        images: layouts of the images, in order.
        image_token_id: id of the image token.
        num_rounds_cut: rounds removed because of the maximum length.
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
        """Tokens in the loss. The first token of a sample has no preceding position and is not counted."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def num_tiles(self) -> int:
        return sum(image.num_tiles for image in self.images)


@dataclass(frozen=True)
class Example:
    """An encoded sample.

    Attributes:
        layout: ids, labels and image layouts.
        tiles: uint8 [num_tiles, S, S, 3], the views of all images.
    """

    layout: SampleLayout
    tiles: np.ndarray


class Processor:
    """Encodes samples for one tokenizer, template, views and maximum length.

    Args:
        tokenizer: a fast Hugging Face tokenizer in whose vocabulary the image token is one id.
        config: the other settings of the encoding.

    Raises:
        ModelError: the tokenizer is slow, the image token or a token of the template is not in its vocabulary, its chat
            template is selected and not supported, or `config` is inconsistent.
    """

    def __init__(self, tokenizer: Any, config: ProcessorConfig) -> None:
        check_grids(config.grids)
        check_views(config.views)
        if ("pad" in config.views.modes) != (config.pad_colour is not None):
            raise ModelError(
                f"pad_colour must be set if an image is padded and only then, got pad_colour={config.pad_colour} with "
                f"views {config.views}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{type(tokenizer).__name__} has no character offsets; use a fast tokenizer")
        self.config = config
        self.tokenizer = tokenizer
        self.template = resolve_template(config.template, tokenizer)
        self.image_token_id = _single_id(tokenizer, IMAGE_PLACEHOLDER, "image token")
        if self.template.end:
            _single_id(tokenizer, self.template.end, f"end token of template {self.template.name}")
        self._released_ids = self._find_released_ids()
        self._opening_ids = self._find_opening_ids()
        self._special_text = _special_text(tokenizer)
        self._single_rule, self._several_rule = config.views.rule(1), config.views.rule(2)

    def _find_opening_ids(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if not self.template.bos or (bos is None and self.template.caption_only):
            return []  # template plain supports tokenizers with and without a beginning-of-sequence token
        if bos is None:
            raise ModelError(
                f"template {self.template.name} begins with the beginning-of-sequence token, which this tokenizer "
                f"does not have; {_OTHER_TEMPLATE}"
            )
        return [bos]

    def _find_released_ids(self) -> list[int]:
        if not self.config.unmask_special_tokens:
            return []
        if not self.template.released_specials:
            raise ModelError(
                f"stage.unmask_special_tokens=true: no released model with template {self.template.name} was "
                "supervised on special tokens; set it to false"
            )
        return [_single_id(self.tokenizer, text, "special token") for text in self.template.released_specials]

    @property
    def fingerprint(self) -> str:
        """A SHA-256 hash of everything that determines the encoding: configuration, template and tokenizer."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.pop("post_processor")  # it only adds special tokens, and encoding uses add_special_tokens=False
        parts = [
            json.dumps(self.config.fingerprint_values(), sort_keys=True),
            json.dumps(asdict(self.template), sort_keys=True),
            json.dumps(tokenizer, sort_keys=True),
            str(self.tokenizer.bos_token_id),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def layout(self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW]) -> SampleLayout:
        """Ids, labels and image layouts of a conversation.

        A sample longer than the maximum is truncated after the last answer that ends within it.

        Args:
            messages: the turns, ending with an answer.
            sizes_hw: (height, width) of each image in pixels.

        Raises:
            SampleRejected: no answer ends within the maximum length, no token is supervised, the template does not
                support a system turn, or the views have no rule for several images.
            ModelError: the numbers of placeholders and images differ.
        """
        if self.template.system_format is None and messages and messages[0].role == "system":
            raise SampleRejected(RejectReason.SYSTEM_TURN, f"template {self.template.name}: {NO_SYSTEM_TURN}")
        images = self._image_layouts(sizes_hw)
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
            images = images[: self._num_complete_images(ids, images)]
        if not (labels[1:] != IGNORE).any():
            raise SampleRejected(RejectReason.NO_SUPERVISED, f"{len(ids)} tokens, none is supervised")
        return SampleLayout(ids, labels, images, self.image_token_id, num_rounds - len(round_ends))

    def encode(self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW], images: Sequence[bytes]) -> Example:
        """The layout and the tiles of a sample.

        Args:
            messages: the turns, ending with an answer.
            sizes_hw: (height, width) of each image in pixels.
            images: the encoded images, for example the bytes of JPEG files.

        Raises:
            SampleRejected, ModelError: as `layout` does.
            OSError: Pillow cannot read an image.
        """
        layout = self.layout(messages, sizes_hw)
        tile = self.config.tile
        tiles = np.empty((layout.num_tiles, tile, tile, 3), dtype=np.uint8)
        start = 0
        for encoded, image in zip(images[: len(layout.images)], layout.images, strict=True):
            view = tiles[start : start + image.num_tiles]
            cut_tiles(decode(encoded), image, tile, pad_colour=self.config.pad_colour, out=view)
            start += image.num_tiles
        return Example(layout, tiles)

    def prompt(
        self, messages: Sequence[MessageLike], sizes_hw: Sequence[SizeHW], *, num_images: int | None = None
    ) -> tuple[np.ndarray, tuple[ImageLayout, ...]]:
        """Encodes a conversation that ends with a question.

        Args:
            messages: the turns, ending with a question.
            sizes_hw: (height, width) of each image in pixels.
            num_images: number of images of the sample that the turns are the beginning of, which decides on their
                views; None: the turns are all of it.

        Returns:
            The ids up to the beginning of the answer, int32 [T], and the layouts of the images.

        Raises:
            SampleRejected: the views have no rule for several images.
        """
        images = self._image_layouts(sizes_hw, num_images)
        ids, _, _ = self._tokens(self._render(messages), images)
        return ids, images

    def special_texts(self, messages: Sequence[MessageLike]) -> set[str]:
        """The texts of special tokens that occur in the messages, without the image placeholder.

        They are tokenized as special tokens, as in the authors' code: the text of an end token inside an answer ends
        the answer for the model.
        """
        if self.template.caption_only:
            messages = [message for message in messages if message.role == "assistant"]  # questions are not rendered
        return {text for message in messages for text in self._special_text.findall(message.text)}

    def _render(self, messages: Sequence[MessageLike]) -> list[Segment]:
        if not self.config.unmask_special_tokens:
            return self.template.render(messages)
        return self.template.render(messages, whole_answers=True)

    def _image_layouts(self, sizes_hw: Sequence[SizeHW], num_images: int | None = None) -> tuple[ImageLayout, ...]:
        """The layouts of images of a sample. Their rule depends on the number of its images, by default that of
        `sizes_hw`."""
        if not sizes_hw:
            return ()
        if num_images is None:
            num_images = len(sizes_hw)
        config, rule = self.config, self._single_rule if num_images == 1 else self._several_rule
        if rule is None:
            raise SampleRejected(
                RejectReason.SEVERAL_IMAGES, f"{num_images} images, and stage.views.several has no value"
            )
        return tuple(
            image_layout(
                size_hw,
                mode=rule.mode,
                grids=config.grids,
                tile=config.tile,
                patches_per_side=config.patches_per_side,
                rounding=config.rounding,
                max_views=rule.max_views,
                closing_newline=rule.closing_newline,
            )
            for size_hw in sizes_hw
        )

    def _tokens(
        self, segments: Sequence[Segment], images: Sequence[ImageLayout]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids, labels and the position after each round.

        The text between two images is tokenized once, as in the authors' code; character offsets determine which of its
        tokens are supervised.
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
            raise ModelError(f"{len(pieces) - 1} placeholders {IMAGE_PLACEHOLDER} but {len(images)} images")

        num_opening = len(self._opening_ids)
        ids = [np.array(self._opening_ids, dtype=np.int32)]
        answers = [np.zeros(num_opening, dtype=bool)]
        ends = [np.zeros(num_opening, dtype=np.int64)]  # position of the character after each token
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
                # A token is supervised if its last character is: "▁A" begins with the header's space.
                answers.append((last > first) & supervised[start + last - 1])
                ends.append(start + last)
            start += len(piece) + len(IMAGE_PLACEHOLDER)
        round_ends = np.searchsorted(np.concatenate(ends), round_end_chars, side="right").tolist()
        all_ids, is_answer = np.concatenate(ids), np.concatenate(answers)
        if self._released_ids:
            is_answer |= np.isin(all_ids, self._released_ids)
        return all_ids, np.where(is_answer, all_ids, np.int32(IGNORE)), round_ends

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenizes a text.

        This calls the backend tokenizer, because transformers' wrapper doubles the time, which matters for the length
        table. Truncation and padding that an earlier call of the wrapper set are reset, as the wrapper does.

        Returns:
            ids int32, and the first and the exclusive last character of each token int64, [num_tokens] each.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode(text, add_special_tokens=False)
        spans = np.fromiter(chain.from_iterable(encoded.offsets), dtype=np.int64, count=2 * len(encoded))
        return np.array(encoded.ids, dtype=np.int32), spans[::2], spans[1::2]

    def _num_complete_images(self, ids: np.ndarray, images: Sequence[ImageLayout]) -> int:
        """Number of images in truncated ids. Ids are truncated after an answer, so no image is incomplete."""
        remaining = int((ids == self.image_token_id).sum())
        for index, image in enumerate(images):
            if remaining == 0:
                return index
            remaining -= image.num_tokens
        return len(images)


def _special_text(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of the texts of all special tokens except the image placeholder."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special and token.content} - {IMAGE_PLACEHOLDER}
    # Longer texts come first, as in the tokenizer. Without special tokens the pattern matches nothing.
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _single_id(tokenizer: Any, text: str, what: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # A sentencepiece tokenizer can insert its word separator before the first piece.
    if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁":
        ids = ids[1:]
    if len(ids) != 1:
        raise ModelError(
            f"the {what} {text!r} must be one token, but this tokenizer encodes it as {len(ids)}; {_OTHER_TEMPLATE}"
        )
    return int(ids[0])
