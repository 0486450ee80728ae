"""The images of easy-VQA: the shape and colour that each shows, by its questions, and collages of several.

Only the training split is used, and of it only images whose sha256 starts with 8 to f: sources hold out the images with
the smallest hashes, so that up to half of easy-VQA can be held out and no collage shows one of those.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from llava_json import Turns
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BACKDROPS = ((255, 255, 255), (243, 240, 232), (226, 232, 238), (60, 64, 72), (24, 26, 30), (205, 222, 208))


@dataclass(frozen=True)
class Shape:
    """One image of easy-VQA: a shape of one colour on a pale background."""

    path: Path
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def colour_and_shape(questions: list[tuple[str, str]]) -> tuple[str, str] | None:
    """Colour and shape by the questions and answers of one image; None if they leave one of them open."""
    true_words: set[str] = set()
    for question, answer in questions:
        words = set(re.findall(r"[a-z]+", question))
        if (answer == "yes" and not words & {"not", "no"}) or (answer == "no" and words & {"not", "no"}):
            true_words |= words
        elif answer not in ("yes", "no"):
            true_words |= words | {answer}
    colours, shapes = [c for c in COLOURS if c in true_words], [s for s in SHAPES if s in true_words]
    return (colours[0], shapes[0]) if len(colours) == len(shapes) == 1 else None


def read_shapes(easy_vqa: Path) -> list[Shape]:
    """The usable images of the training split, by number. `easy_vqa` is the folder of the cache."""
    folder = easy_vqa / "data" / "train"
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        by_image[number].append((question, answer))
    usable = []
    for number, questions in sorted(by_image.items()):
        facts = colour_and_shape(questions)
        path = folder / "images" / f"{number}.png"
        if facts and hashlib.sha256(path.read_bytes()).hexdigest()[0] in "89abcdef":
            usable.append(Shape(path, *facts))
    return usable


def with_article(noun: str) -> str:
    """'a red circle', 'an apple'."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def collage(shapes: list[Shape], grid_hw: tuple[int, int], cell: int, rng: random.Random) -> Image.Image:
    """The shapes in reading order on a plain background, in cells of `cell` pixels with margins."""
    rows, columns = grid_hw
    gap = cell // 12
    image = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), rng.choice(BACKDROPS))
    for index, shape in enumerate(shapes):
        with Image.open(shape.path) as opened:
            tile = opened.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
        image.paste(tile, (gap + index % columns * (cell + gap), gap + index // columns * (cell + gap)))
    return image


def cell_names(grid_hw: tuple[int, int]) -> list[str]:
    """Names of the cells of a grid in reading order: 'left', 'top right', 'central' ..."""
    rows, columns = grid_hw
    down = {1: [""], 2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}[rows]
    along = {1: [""], 2: ["left", "right"], 3: ["left", "middle", "right"]}[columns]
    names = [f"{row} {column}".strip() for row in down for column in along]
    return ["central" if name == "middle middle" else name for name in names]


def collage_turns(shapes: list[Shape], grid_hw: tuple[int, int], rng: random.Random) -> Turns:
    """Four questions about a collage, in random order."""
    names = cell_names(grid_hw)
    kinds, colours = Counter(s.shape for s in shapes), Counter(s.colour for s in shapes)
    turns: Turns = [("How many shapes are there?", NUMBERS[len(shapes)].capitalize() + ".")]
    for row in rng.sample(range(len(shapes)), min(2, len(shapes))):
        turns.append((f"What colour is the {names[row]} shape?", shapes[row].colour.capitalize() + "."))
        turns.append((f"Which shape is at the {names[row]}?", f"{with_article(str(shapes[row])).capitalize()}."))
    kind = rng.choice(SHAPES)
    turns.append((f"How many {kind}s do you see?", NUMBERS[kinds[kind]].capitalize() + "."))
    colour = rng.choice(COLOURS)
    turns.append((f"Is there {with_article(colour)} shape?", "Yes." if colours[colour] else "No."))
    unique = [row for row, shape in enumerate(shapes) if colours[shape.colour] == 1]
    if unique:
        row = rng.choice(unique)
        turns.append((f"Where is the {shapes[row].colour} shape?", f"At the {names[row]}."))
        turns.append(
            (
                f"What is the shape of the {shapes[row].colour} one?",
                f"{with_article(shapes[row].shape).capitalize()}.",
            )
        )
    first, second = sorted(rng.sample(range(len(shapes)), 2)) if grid_hw[0] == 1 else (0, 0)
    if first != second and str(shapes[first]) != str(shapes[second]):
        pair = rng.sample((str(shapes[first]), str(shapes[second])), 2)
        if all([str(shape) for shape in shapes].count(name) == 1 for name in pair):
            question = f"Which is further left, the {pair[0]} or the {pair[1]}?"
            turns.append((question, f"The {shapes[first]}."))
    return rng.sample(turns, min(4, len(turns)))


def describe_collage(shapes: list[Shape], grid_hw: tuple[int, int]) -> str:
    """'A red circle, a blue triangle and a teal rectangle side by side.'"""
    listed = [with_article(str(shape)) for shape in shapes]
    text = ", ".join(listed[:-1]) + " and " + listed[-1]
    order = "side by side" if grid_hw[0] == 1 else "one above the other" if grid_hw[1] == 1 else "in a grid"
    return f"{text[0].upper()}{text[1:]} {order}."
