"""The data of the tiny model on both sides: raw folders of images and conversations, gradient cases, three runs.

Imported by the programs in authors/ and by ours. Every run has twenty optimizer steps; the order of its samples is that
of `data_recipes.mixture.order`, which needs numpy only.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from data_recipes.mixture.order import samples_of_step
from tests.oracles import tiny_model

ImageMode = Literal["anyres", "square"]
Record = dict[str, Any]
"""A record of LLaVA's JSON: id, conversations, and `image`, a file name or a list of them, where there are any."""

NUM_STEPS, BATCH_SIZE, NUM_SAMPLES, SEED = 20, 8, 64, 3
EPOCHS = NUM_STEPS * BATCH_SIZE / NUM_SAMPLES
WARMUP_RATIO = 0.1
"""Two steps; the authors' 0.03 of twenty would be one, whose rate is 0."""
CLIP_NORM = 1.0
"""The default of the authors' trainer."""

SIZES_HW = ((20, 20), (31, 90), (90, 31), (56, 56), (45, 61), (61, 45), (28, 140), (40, 33))
"""(height, width): they choose every one of the five grids."""

_WORDS = (
    "red", "round", "two", "seven", "bicycles", "a", "wall", "near", "water", "and", "old", "boats", "with", "sails",
    "green", "umbrella", "7", "12", "clock", "at", "noon", "street", "in", "rain", "quiet", "harbour",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run under both trainers. `rates` are ours: a part that is not named is frozen.

    `sources` are raw folders. Our loss is weighed by sample, as one sample a micro-batch weighs it on their side.
    """

    name: str
    image_mode: ImageMode
    template: str
    rates: dict[str, float]
    sources: tuple[str, ...]

    @property
    def is_align(self) -> bool:
        """Stage 1: the language model is frozen."""
        return "language_model" not in self.rates


RUNS = (
    Run("align_square", "square", "plain", {"projector": 1e-2}, ("captions",)),
    Run("align_anyres", "anyres", "plain", {"projector": 1e-2}, ("captions",)),
    Run(
        "finetune_anyres",
        "anyres",
        "vicuna_v1",
        {"projector": 1e-3, "image_newline": 4e-3, "language_model": 4e-3},
        ("chats", "instructions"),
    ),
)
"""Theirs freezes image_newline in stage 1, trains it at the language model's rate in stage 2, and the tower never."""


@dataclass(frozen=True)
class Case:
    """Samples in one micro-batch of the authors' and in one row of ours: (source, number in it)."""

    name: str
    image_mode: ImageMode
    samples: tuple[tuple[str, int], ...]

    @property
    def template(self) -> str:
        """Captions are stage 1's."""
        return "plain" if self.samples[0][0] == "captions" else "vicuna_v1"

    @property
    def records(self) -> list[Record]:
        """The records, in order."""
        return [records(source)[number] for source, number in self.samples]


CASES = (
    Case("one_picture", "anyres", (("instructions", 13),)),
    Case("several_pictures", "anyres", (("instructions", 8),)),
    Case("text_only", "anyres", (("chats", 5),)),
    Case("one_picture_square", "square", (("instructions", 13),)),
    Case("several_pictures_square", "square", (("instructions", 8),)),
    Case("caption_square", "square", (("captions", 6),)),
    Case("padded_batch", "anyres", (("instructions", 5), ("chats", 3), ("instructions", 10), ("instructions", 6))),
)


def _words(seed: str, fewest: int, most: int) -> str:
    digest = hashlib.sha256(seed.encode()).digest()
    count = fewest + digest[0] % (most - fewest + 1)
    return " ".join(_WORDS[byte % len(_WORDS)] for byte in digest[1 : 1 + count])


def _turns(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    pairs = zip(questions, answers, strict=True)
    return [turn for q, a in pairs for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def records(source: str) -> list[Record]:
    """The records of a raw folder.

    captions: one image each. chats: text only. instructions: by turns an image and one round, an image and three
    rounds, and two images, the second one shown in the second round (a turn with two is a listed difference).
    """
    made = []
    for number in range({"captions": NUM_SAMPLES, "chats": 16, "instructions": NUM_SAMPLES - 16}[source]):
        name = f"{source}_{number:03d}"
        record: Record = {"id": name}
        if source == "captions":
            record |= {"image": f"{name}_0.png"}
            questions, answers = ["<image>\nDescribe it."], [_words(name, 1, 9).capitalize() + "."]
        else:
            kind = number % 3 if source == "instructions" else 3
            rounds = (1, 3, 2, 1 + number % 3)[kind]
            places = ([0], [0], [0, 1], [])[kind]
            questions = [f"What is at {_words(f'{name} question {r}', 1, 4)}?" for r in range(rounds)]
            answers = [_words(f"{name} answer {r}", 1, 1 + 3 * (number % 4)).capitalize() + "." for r in range(rounds)]
            for place in places:
                questions[place] = f"<image>\n{questions[place]}"
            if places:
                names = [f"{name}_{place}.png" for place in places]
                record |= {"image": names if len(names) > 1 else names[0]}
        made.append(record | {"conversations": _turns(questions, answers)})
    return made


def image_names(record: Record) -> list[str]:
    """The file names of a record's images."""
    names = record.get("image", [])
    return [names] if isinstance(names, str) else list(names)


def image_size_hw(name: str) -> tuple[int, int]:
    """(height, width) of the image with this file name."""
    return SIZES_HW[hashlib.sha256(name.encode()).digest()[0] % len(SIZES_HW)]


def draw_image(name: str) -> Image.Image:
    """The image with this file name: noise, so that every pixel matters."""
    height, width = image_size_hw(name)
    return Image.frombytes("RGB", (width, height), hashlib.shake_256(name.encode()).digest(height * width * 3))


def write_raw(folder: Path, made: Sequence[Record]) -> None:
    """Writes records as a raw folder: `records.json` and the images."""
    folder.mkdir(parents=True)
    (folder / "records.json").write_text(json.dumps(made), encoding="utf-8")
    for record in made:
        for name in image_names(record):
            draw_image(name).save(folder / name)


def visited(run: Run) -> list[Record]:
    """The records of a run in the order of training, eight per step."""
    every = [record for source in run.sources for record in records(source)]
    assert len(every) == NUM_SAMPLES
    return [
        every[number]
        for step in range(NUM_STEPS)
        for number in samples_of_step(step, NUM_SAMPLES, BATCH_SIZE, SEED, EPOCHS)
    ]


def _image_digest(name: str) -> str:
    return hashlib.sha256(draw_image(name).tobytes()).hexdigest()[:16]


def inputs(what: Sequence[Run] | Sequence[Case]) -> Iterator[object]:
    """Everything that determines the outputs of these runs or cases, for the digest of a fixture."""
    yield [tiny_model.TOWER, tiny_model.LANGUAGE_MODEL, tiny_model.CHARACTERS, tiny_model.PINPOINTS_WH]
    yield [tiny_model.FEATURE_LAYER, tiny_model.MAX_LENGTH, WARMUP_RATIO, CLIP_NORM]
    for name in ("language_model.model.norm.weight", "language_model.lm_head.weight", "image_newline", "a.bias"):
        yield tiny_model.weight(name, (16,)).tolist()
    for each in what:
        yield asdict(each)
        for record in visited(each) if isinstance(each, Run) else each.records:
            yield [record, [_image_digest(name) for name in image_names(record)]]
