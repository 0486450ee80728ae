"""What lmms-eval asks of its task `llava_next_store`: a prepared source's pictures, first questions and truths.

Runs in lmms-eval's environment, where nothing of this repository is installed: a store opens with plain `datasets`.
"""

import io
from functools import lru_cache
from typing import Any

import datasets
from PIL import Image

Sample = dict[str, Any]


@lru_cache
def _pictures() -> datasets.Dataset:
    return datasets.load_from_disk("store/pictures")


def with_pictures(samples: datasets.Dataset) -> datasets.Dataset:
    """The samples that show a picture."""
    return samples.filter(lambda sample: bool(sample["pictures"]))


def pictures(sample: Sample) -> list[Image.Image]:
    """The sample's pictures, decoded."""
    return [Image.open(io.BytesIO(_pictures()[row]["bytes"])).convert("RGB") for row in sample["pictures"]]


def question(sample: Sample) -> str:
    """The first question; lmms-eval puts the placeholders of the pictures in front of it, as training had them."""
    text = next(str(message["text"]) for message in sample["messages"] if message["role"] == "user")
    return text.replace("<image>", "").strip()


def truth(sample: Sample) -> str:
    """Its answer."""
    return next(str(message["text"]) for message in sample["messages"] if message["role"] == "assistant")


def judge(sample: Sample, answers: list[str]) -> dict[str, float]:
    """1 for the truth but for case, outer white space and a final period, as `train/evaluate/metrics.py` has it."""
    given, wanted = (text.strip().rstrip(".").lower() for text in (answers[0], truth(sample)))
    return {"exact_match": float(given == wanted)}
