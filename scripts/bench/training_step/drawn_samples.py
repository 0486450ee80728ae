"""Draws samples whose image sizes and text lengths are those of the published mixture (published_mixture.py).

Deterministic: the same arguments give the same bytes.
"""

import io
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_recipes.schema.published_mixture import SOURCES, SYSTEM_TOKENS, draw_shapes
from data_recipes.schema.sample import Message, Sample

SizeHW = tuple[int, int]

_WORDS = (
    *("the", "a", "of", "on", "in", "with", "two", "red", "small", "large", "left", "right", "street", "table", "man"),
    *("woman", "dog", "sign", "chart", "value", "year", "total", "page", "line", "colour", "blue", "green", "window"),
    *("people", "standing", "holding", "near", "behind", "title", "number", "percent", "what", "which", "where", "how"),
    *("many", "name", "text", "written", "shown", "picture", "background", "light", "wooden", "white", "black", "cup"),
)
"""A word is about a token of Vicuna's."""

_DRAWN_AS_PNG = ("chartqa", "dvqa", "ai2d")


def draw_samples(
    num_samples: int,
    seed: int,
    accept: Callable[[tuple[Message, ...], Sequence[SizeHW]], bool],
    shrink: int = 1,
    images_per_set: Sequence[int] = (1,),
) -> list[Sample]:
    """Draws samples with images until enough of them are accepted.

    Args:
        num_samples: number of samples to return.
        accept: decides by the messages and the (height, width) of each image.
        shrink: divides the sides of the images and the number of words (for tiny tiles).
        images_per_set: numbers of images of every other sample, in turn; the images of a set have the same size. The
            others have one image.

    Raises:
        ValueError: fewer than one sample in a hundred is accepted.
    """
    num_drawn = 100 * num_samples
    shapes = draw_shapes(num_drawn, seed)
    dice = random.Random(seed)
    accepted: list[Sample] = []
    for number in range(num_drawn):
        source = SOURCES[shapes.sources[number]]
        if not source.sizes_hw:
            continue
        height, width = (max(1, int(side) // shrink) for side in shapes.sizes_hw[number])
        num_answer = int(shapes.supervised[number])
        num_question = int(shapes.text_tokens[number]) - SYSTEM_TOKENS - num_answer
        rounds = max(1, min(round(source.mean_rounds), num_question // 8, num_answer // 2) // shrink)
        num_images = images_per_set[len(accepted) // 2 % len(images_per_set)] if len(accepted) % 2 else 1
        messages = _conversation(dice, rounds, num_question // shrink, num_answer // shrink, num_images)
        if accept(messages, [(height, width)] * num_images):
            file_format = "PNG" if source.name in _DRAWN_AS_PNG else "JPEG"
            first_seed = (num_drawn * seed + number) * max(images_per_set)
            images = tuple(
                _encode_noise_image(first_seed + image, (height, width), file_format) for image in range(num_images)
            )
            accepted.append(Sample(f"{source.name}_{number:06d}", messages, images, f"{source.name}:{number}"))
            if len(accepted) == num_samples:
                return accepted
    raise ValueError(f"of {num_drawn} drawn samples only {len(accepted)} of {num_samples} were accepted")


def _conversation(
    dice: random.Random, rounds: int, num_question: int, num_answer: int, num_images: int
) -> tuple[Message, ...]:
    messages = []
    for turn in range(rounds):
        placeholder = "<image>\n" * num_images if turn == 0 else ""
        messages.append(Message("user", placeholder + _sentence(dice, num_question // rounds - 6) + "?"))
        messages.append(Message("assistant", _sentence(dice, num_answer // rounds - 2) + "."))
    return tuple(messages)


def _sentence(dice: random.Random, num_words: int) -> str:
    return " ".join(dice.choice(_WORDS) for _ in range(max(1, num_words))).capitalize()


def _encode_noise_image(seed: int, size_hw: SizeHW, file_format: str) -> bytes:
    """Smooth coloured shapes with noise: about as many bytes as a photograph of this size."""
    height, width = size_hw
    noise = np.random.Generator(np.random.PCG64(seed))
    coarse = noise.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-6, 7, (height, width, 1), dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(stream, file_format, quality=90)
    return stream.getvalue()
