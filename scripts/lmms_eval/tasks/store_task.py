"""The functions of lmms-eval's task `llava_next_store`: images, first questions and first answers of a prepared source.

Runs in lmms-eval's environment, where this repository is not installed: a store is opened with plain `datasets`.
"""

import io
from functools import lru_cache
from typing import Any

import datasets
from PIL import Image

Sample = dict[str, Any]


@lru_cache
def _image_table() -> datasets.Dataset:
    return datasets.load_from_disk("store/pictures")


def with_images(samples: datasets.Dataset) -> datasets.Dataset:
    """The samples with at least one image."""
    return samples.filter(lambda sample: bool(sample["pictures"]))


def images(sample: Sample) -> list[Image.Image]:
    """The decoded images of a sample."""
    return [Image.open(io.BytesIO(_image_table()[row]["bytes"])).convert("RGB") for row in sample["pictures"]]


def question(sample: Sample) -> str:
    """The first question; lmms-eval puts the placeholders of the images before it, as in training."""
    text = next(str(message["text"]) for message in sample["messages"] if message["role"] == "user")
    return text.replace("<image>", "").strip()


def first_answer(sample: Sample) -> str:
    """The answer to the first question."""
    return next(str(message["text"]) for message in sample["messages"] if message["role"] == "assistant")


def score(sample: Sample, answers: list[str]) -> dict[str, float]:
    """1 for an equal answer, without case, outer white space and a final period, as in `train/evaluate/metrics.py`."""
    given, expected = (text.strip().rstrip(".").lower() for text in (answers[0], first_answer(sample)))
    return {"exact_match": float(given == expected)}
