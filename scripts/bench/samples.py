"""Samples like those of the second stage's mixture: picture sizes, rounds and lengths of text, source by source.

Owns the numbers of the 779K mixture's sources (counts as published per folder, sizes and lengths typical of each) and
the drawing of samples from them. Deterministic: the same number and seed give the same bytes. Which samples a bench
keeps is its own choice (`accept`).
"""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_recipes.sample import Message, Sample

Span = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """One folder of the mixture: how many records it has, and what they look like.

    `sizes` are (height, width) of its pictures, each as likely as the next; `rounds`, `question` and `answer` are the
    least and the most questions, words in a question and words in an answer.
    """

    name: str
    count: int
    sizes: tuple[Span, ...]
    rounds: Span
    question: Span
    answer: Span
    file_format: str = "JPEG"


_PHOTOS = ((480, 640), (480, 640), (480, 640), (640, 480), (427, 640), (426, 640), (640, 427), (375, 500), (500, 375))

SOURCES = (
    Source("coco", 391_219, _PHOTOS, (1, 5), (6, 14), (2, 60)),
    Source("vg", 86_417, (*_PHOTOS, (600, 800), (768, 1024)), (3, 8), (8, 16), (1, 8)),
    Source("ocr_vqa", 80_000, ((500, 333), (475, 316), (500, 400), (500, 500)), (3, 6), (6, 12), (1, 8)),
    Source("gqa", 72_140, _PHOTOS, (4, 12), (6, 12), (1, 2)),
    Source("synthdog-en", 40_093, ((1280, 960), (960, 1280), (1100, 1540), (768, 1024)), (1, 1), (4, 8), (40, 160)),
    Source("dvqa", 20_000, ((448, 448),), (2, 10), (8, 16), (1, 3), "PNG"),
    Source("chartqa", 18_317, ((600, 850), (557, 800), (797, 600)), (1, 3), (8, 16), (1, 4), "PNG"),
    Source("docvqa", 10_194, ((2200, 1700), (1754, 1240), (1600, 1236)), (1, 6), (6, 14), (1, 8)),
    Source("laion-gpt4v", 8_048, ((1024, 1024), (768, 1024), (1350, 1080)), (1, 1), (6, 12), (90, 220)),
    Source("llava_pretrain_lcs558k", 6_989, ((336, 500), (500, 500), (640, 427)), (1, 1), (6, 12), (90, 220)),
    Source("ai2d", 3_247, ((445, 600), (600, 800), (382, 588)), (1, 5), (12, 30), (1, 4), "PNG"),
    Source("sharegpt4v", 1_926, ((683, 1024), (1024, 768)), (1, 1), (6, 12), (90, 220)),
)
"""Its sources with pictures. The 40,688 conversations without one are no part of it."""

_WORDS = (
    *("the", "a", "of", "on", "in", "with", "two", "red", "small", "large", "left", "right", "street", "table", "man"),
    *("woman", "dog", "sign", "chart", "value", "year", "total", "page", "line", "colour", "blue", "green", "window"),
    *("people", "standing", "holding", "near", "behind", "title", "number", "percent", "what", "which", "where", "how"),
    *("many", "name", "text", "written", "shown", "picture", "background", "light", "wooden", "white", "black", "cup"),
)


def draw(
    num_samples: int, seed: int, accept: Callable[[tuple[Message, ...], Span], bool], shrink: int = 1
) -> list[Sample]:
    """Draws sources by their counts, a sample from each, and keeps those that `accept` wants.

    Args:
        num_samples: how many are kept.
        seed: of everything.
        accept: told messages and the picture's (height, width).
        shrink: divides the sides of every picture, and the words of every text (for tiny models).
    """
    dice = random.Random(seed)
    weights = [source.count for source in SOURCES]
    kept: list[Sample] = []
    for _ in range(200 * num_samples):
        if len(kept) == num_samples:
            return kept
        source = dice.choices(SOURCES, weights)[0]
        height, width = dice.choice(source.sizes)
        size = (max(1, height // shrink), max(1, width // shrink))
        messages = _conversation(source, dice, shrink)
        if accept(messages, size):
            number = len(kept)
            picture = _picture(1000 * seed + number, size, source.file_format)
            kept.append(Sample(f"{source.name}_{number:05d}", messages, (picture,), f"{source.name}:{number}"))
    raise ValueError(f"of {200 * num_samples} drawn samples only {len(kept)} of {num_samples} were accepted")


def _conversation(source: Source, dice: random.Random, shrink: int) -> tuple[Message, ...]:
    messages = []
    for turn in range(max(1, dice.randint(*source.rounds) // shrink)):
        place = "<image>\n" if turn == 0 else ""
        messages.append(Message("user", place + _sentence(dice, source.question, shrink) + "?"))
        messages.append(Message("assistant", _sentence(dice, source.answer, shrink) + "."))
    return tuple(messages)


def _sentence(dice: random.Random, num_words: Span, shrink: int) -> str:
    words = [dice.choice(_WORDS) for _ in range(max(1, dice.randint(*num_words) // shrink))]
    return " ".join(words).capitalize()


def _picture(seed: int, size_hw: Span, file_format: str) -> bytes:
    """Soft coloured shapes with some grain: about as many bytes as a photograph of this size."""
    height, width = size_hw
    noise = np.random.Generator(np.random.PCG64(seed))
    coarse = noise.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-6, 7, (height, width, 1), dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(stream, file_format, quality=90)
    return stream.getvalue()
