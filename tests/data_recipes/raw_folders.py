"""Small raw folders in the published layouts, made here and never copied from a real set; and stores from
samples.  Owns the generators that the tests of data_recipes share; the tests themselves own what they prove.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_recipes.sample import Message, Reject, Sample
from data_recipes.source import SourceInfo
from data_recipes.store import Store
from data_recipes.store_writer import write_store

PROMPT = "<image>\nWhat is it?"


def picture(number: int, height: int = 12, width: int = 16, kind: str = "PNG") -> bytes:
    """A picture of noise; another `number`, other bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def llava_record(number: int, image: Any = None, **changes: Any) -> dict[str, Any]:
    """One record of LLaVA's conversation JSON."""
    prompt = "What is it?" if image is None else PROMPT
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"Thing {number}."}]
    record: dict[str, Any] = {"id": f"{number:09d}", "conversations": turns}
    if image is not None:
        record["image"] = image
    return record | changes


def write_llava(root: Path, num_samples: int = 20, extra: Sequence[dict[str, Any]] = ()) -> Path:
    """A folder of LLaVA JSON, `mix.json` and `images/`; every fourth record is text only."""
    records = []
    for number in range(num_samples):
        name = None if number % 4 == 3 else f"{number:05d}.png"
        if name:
            put(root / "images" / name, picture(number))
        records.append(llava_record(number, name))
    put(root / "mix.json", json.dumps([*records, *extra]))
    return root


def write_chartqa(root: Path) -> Path:
    """ChartQA with three charts: a human and an augmented question on the first, one on each other."""
    folder = root / "ChartQA Dataset" / "train"
    for number in range(3):
        put(folder / "png" / f"two_col_{number}.png", picture(100 + number))
    human = [{"imgname": "two_col_0.png", "query": "Which year is highest?", "label": "2016"}]
    augmented = [
        {"imgname": "two_col_1.png", "query": "How many bars?", "label": "4"},
        {"imgname": "two_col_0.png", "query": "What is the value in 2016?", "label": "37.5"},
        {"imgname": "two_col_2.png", "query": "What colour is the line?", "label": ["Blue"]},
    ]
    put(folder / "train_human.json", json.dumps(human))
    put(folder / "train_augmented.json", json.dumps(augmented))
    return root


def write_synthdog(root: Path, num_pages: int = 3) -> Path:
    """The SynthDoG generator's own form."""
    lines = []
    for number in range(num_pages):
        put(root / "train" / f"image_{number}.jpg", picture(200 + number, kind="JPEG"))
        truth = json.dumps({"gt_parse": {"text_sequence": f"early  morning\nin harbour {number}"}})
        lines.append(json.dumps({"file_name": f"image_{number}.jpg", "ground_truth": truth}))
    put(root / "train" / "metadata.jsonl", "\n".join(lines) + "\n")
    return root


def write_easy_vqa(root: Path, num_pictures: int = 4) -> Path:
    """easy-VQA with three questions a picture, listed in blocks as the package does."""
    for number in range(num_pictures):
        put(root / "data" / "train" / "images" / f"{number}.png", picture(300 + number))
    questions = [
        [f"{text}?", answer, number]
        for text, answer in [("what shape is it", "circle"), ("is it red", "yes"), ("what colour", "red")]
        for number in range(num_pictures)
    ]
    put(root / "data" / "train" / "questions.json", json.dumps(questions))
    return root


def conversation(sample_id: str, *pictures: bytes | Path, answer: str = "A thing.") -> Sample:
    """A sample of one question about its pictures."""
    prompt = "<image>\n" * len(pictures) + "What is it?"
    return Sample(sample_id, (Message("user", prompt), Message("assistant", answer)), pictures)


def make_store(path: Path, samples: Iterable[Sample | Reject], **source: Any) -> Store:
    """Write and open a store named as its folder."""
    write_store(path, SourceInfo(name=path.name, reader="test", root=".", **source), samples)
    return Store.open(path)
