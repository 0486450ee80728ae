"""Photographs with captions and questions (photographs.yaml) and scanned forms, and variations of them."""

import random
from dataclasses import dataclass
from pathlib import Path

import yaml
from llava_json import Turns
from PIL import Image


@dataclass(frozen=True)
class Photograph:
    """One photograph, RGB, with a name, a caption and questions."""

    name: str
    caption: str
    questions: Turns
    image: Image.Image


def read_photographs(cache: Path) -> list[Photograph]:
    """All photographs, in the order of photographs.yaml. `cache` is the folder of the assets."""
    entries = yaml.safe_load(Path(__file__).with_name("photographs.yaml").read_text(encoding="utf-8"))
    photographs = []
    for path, entry in entries.items():
        with Image.open(cache / path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((640, 640))
        photographs.append(Photograph(entry["name"], entry["caption"], list(entry["questions"].items()), image))
    return photographs


def form_paths(synthdog: Path) -> list[Path]:
    """The files of the 50 scanned forms, in the order of their names."""
    return sorted((synthdog / "forms").glob("*.png"))


def vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """The whole image in another size and possibly mirrored, so that its caption stays true."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.choice((160, 224, 300, 400, 560)) / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def join(images: list[Image.Image], down: bool, side: int) -> Image.Image:
    """Images cropped to squares of `side` pixels, side by side or one below the other."""
    squares = []
    for image in images:
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        squares.append(image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge)))
    whole = Image.new("RGB", (side, side * len(squares)) if down else (side * len(squares), side))
    for row, square in enumerate(squares):
        whole.paste(square, (0, row * side) if down else (row * side, 0))
    return whole


def form_part(path: Path, rng: random.Random) -> tuple[str, Image.Image]:
    """A caption and one part of a scanned form, or all of it, at half size."""
    with Image.open(path) as opened:
        form = opened.convert("RGB")
    width, height = form.size
    boxes = {
        "A scanned form.": (0, 0, width, height),
        "The upper half of a scanned form.": (0, 0, width, height // 2),
        "The lower half of a scanned form.": (0, height // 2, width, height),
        "A wide strip from the top of a scanned form.": (0, 0, width, height // 4),
        "The left half of a scanned form.": (0, 0, width // 2, height),
        "The upper left corner of a scanned form.": (0, 0, width // 2, height // 2),
    }
    caption = rng.choice(list(boxes))
    part = form.crop(boxes[caption])
    return caption, part.resize((part.width // 2, part.height // 2), Image.Resampling.LANCZOS)
