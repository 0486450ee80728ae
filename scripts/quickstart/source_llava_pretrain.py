"""Writes the source llava_pretrain: shapes, letters, photographs, forms and charts with one caption each, for
stage 1, in the layout of BLIP-558K.
"""

import random
from pathlib import Path

from charts import choose_style, describe, draw_chart, font_files
from easy_vqa_shapes import Shape, collage, describe_collage, read_shapes, with_article
from llava_json import LlavaJson
from photographs import form_part, form_paths, join, read_photographs, vary
from source_small_letters import LETTERS, QUESTION, draw_page, letter_fonts
from vega_tables import read_tables, shuffled

# In place of the authors' eleven prompts, which ask for a short description.
PROMPTS = (
    "Describe the picture briefly.",
    "What is in this picture?",
    "Say in a few words what can be seen.",
    "Give a short caption.",
    "What does the picture show?",
)
STRIPS_HW = ((1, 2), (1, 3), (2, 1), (3, 1))


def write_captions(cache: Path, folder: Path, scale: float, seed: int, patch: int) -> int:
    """Writes the source; returns the number of records. `patch`: see `draw_page`."""
    out = LlavaJson(folder / "images")
    rng = random.Random(f"{seed}/llava_pretrain")
    shapes = read_shapes(cache / "easy_vqa")
    rng.shuffle(shapes)
    counts = {key: max(2, round(count * scale)) for key, count in _COUNTS.items()}
    _add_single_shapes(out, shapes[: counts["shape"]], seed)
    _add_letters(out, cache, counts["letter"], seed, patch)
    _add_strips(out, shapes, counts["strip"], seed)
    _add_photographs(out, cache, counts["photograph"], counts["pair"], seed)
    _add_forms(out, cache, counts["form"], seed)
    _add_charts(out, cache, counts["chart"], seed)
    rng.shuffle(out.records)
    out.save(folder / "blip_laion_cc_sbu_558k.json")
    return len(out.records)


_COUNTS = {"shape": 1200, "letter": 1600, "strip": 200, "photograph": 140, "pair": 60, "form": 40, "chart": 60}


def _add(out: LlavaJson, kind: str, number: int, suffix: str, image: object, caption: str, rng: random.Random) -> None:
    # As in the real source, images are distributed over numbered folders.
    name = f"{number % 10:05d}/{kind}_{number:05d}.{suffix}"
    out.add(name, image, [(rng.choice(PROMPTS), caption)])  # type: ignore[arg-type]


def _add_single_shapes(out: LlavaJson, shapes: list[Shape], seed: int) -> None:
    for number, shape in enumerate(shapes):
        # Copied byte by byte, so that the image has one hash in all sources.
        caption = f"{with_article(str(shape)).capitalize()}."
        _add(out, "shape", number, "png", shape.path, caption, random.Random(f"{seed}/shape/{number}"))


def _add_letters(out: LlavaJson, cache: Path, count: int, seed: int, patch: int) -> None:
    """Pages of one tile, on which the letters are as large as in the tiles of stage 2."""
    fonts = letter_fonts(cache)
    for number in range(count):
        rng = random.Random(f"{seed}/letter/{number}")
        letter = LETTERS[number % len(LETTERS)]
        name = f"{number % 10:05d}/letter_{number:05d}.png"
        out.add(name, draw_page(letter, 1, patch, fonts, rng), [(QUESTION, letter)])


def _add_strips(out: LlavaJson, shapes: list[Shape], count: int, seed: int) -> None:
    for number in range(count):
        rng = random.Random(f"{seed}/strip/{number}")
        grid_hw = rng.choice(STRIPS_HW)
        chosen = rng.sample(shapes, grid_hw[0] * grid_hw[1])
        image = collage(chosen, grid_hw, rng.choice((64, 96, 128, 192)), rng)
        _add(out, "strip", number, "png", image, describe_collage(chosen, grid_hw), rng)


def _add_photographs(out: LlavaJson, cache: Path, num_single: int, num_pairs: int, seed: int) -> None:
    photographs = read_photographs(cache)
    for number in range(num_single):
        rng = random.Random(f"{seed}/photograph/{number}")
        photograph = photographs[number % len(photographs)]
        _add(out, "photograph", number, "jpg", vary(photograph.image, rng), photograph.caption, rng)
    for number in range(num_pairs):
        rng = random.Random(f"{seed}/pair/{number}")
        first, second = rng.sample(photographs, 2)
        down = rng.random() < 0.5
        words = (" above ", ".") if down else (" on the left and ", " on the right.")
        caption = first.name + words[0] + second.name + words[1]
        image = join([first.image, second.image], down, rng.choice((120, 180, 256)))
        _add(out, "pair", number, "jpg", image, caption[0].upper() + caption[1:], rng)


def _add_forms(out: LlavaJson, cache: Path, count: int, seed: int) -> None:
    forms = form_paths(cache / "synthdog")
    for number in range(count):
        rng = random.Random(f"{seed}/form/{number}")
        caption, part = form_part(forms[number % len(forms)], rng)
        _add(out, "form", number, "png", part, caption, rng)


def _add_charts(out: LlavaJson, cache: Path, count: int, seed: int) -> None:
    fonts = font_files(cache)
    tables = shuffled(read_tables(cache / "vega_datasets"), seed, "captions")
    for number in range(count):
        rng = random.Random(f"{seed}/caption_chart/{number}")
        table = tables[number % len(tables)]
        style = choose_style(table, fonts, rng)
        _add(out, "chart", number, "png", draw_chart(table, style), describe(table, style), rng)
