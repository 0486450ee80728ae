"""Writes the source small_letters: pages that are printed with one small letter, and the question which letter it is.

A page fills a grid of 2 x 2 tiles, and a letter is half as high as a patch of the tower. In the base view, which shows
the page at half the size, a letter has three to four pixels, so that the answer has to be read from the tiles.
"""

import random
from pathlib import Path

from charts import Colour, font_files, load_font
from llava_json import LlavaJson
from PIL import Image, ImageDraw

LETTERS = ("A", "E", "O", "T", "X", "Z")
QUESTION = "Which letter is on the page?"
PATCHES_PER_SIDE = 4
"""Of a tile of the quickstart's towers."""
PAPERS: tuple[Colour, ...] = (
    (250, 250, 250),
    (250, 235, 160),
    (250, 205, 160),
    (195, 235, 190),
    (185, 215, 250),
    (250, 205, 225),
)
INK: Colour = (15, 15, 20)
_FONTS = ("Inter-Regular", "NotoSans-Regular", "Rubik-Regular", "WorkSans-Regular")
_OVERSAMPLING = 4
LETTER_HEIGHT = 0.5  # in patches


def letter_fonts(cache: Path) -> list[Path]:
    """The plain sans-serif fonts of the cache's synthdog folder."""
    return [path for path in font_files(cache) if path.stem in _FONTS]


def draw_page(letter: str, num_tiles: int, patch: int, fonts: list[Path], rng: random.Random) -> Image.Image:
    """A square page of `num_tiles` tiles per side, with rows of one letter.

    Args:
        letter: one capital letter.
        num_tiles: 1 or 2.
        patch: side of a patch of the tower in pixels.
        fonts: of which one is chosen.
        rng: decides paper, font, distances and the place of the first letter.
    """
    side = num_tiles * PATCHES_PER_SIDE * patch
    page = Image.new("RGB", (side, side), rng.choice(PAPERS))
    stamp = draw_letter(letter, LETTER_HEIGHT * patch, rng.choice(fonts))
    across, down = stamp.width + rng.randint(2, 4), stamp.height + rng.randint(2, 5)
    left, top = rng.randint(0, across - 1), rng.randint(0, down - 1)
    for y in range(top, side - stamp.height, down):
        for x in range(left, side - stamp.width, across):
            page.paste(INK, (x, y), stamp)
    return page


def draw_letter(letter: str, height: float, font: Path) -> Image.Image:
    """A letter of this height in pixels, as a mask; drawn larger and reduced."""
    drawn = load_font(font, round(height * _OVERSAMPLING * 1.4))
    left, top, right, bottom = drawn.getbbox(letter)
    scale = height / (bottom - top)
    mask = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), letter, 255, drawn)
    return mask.resize((round(mask.width * scale), round(height)), Image.Resampling.LANCZOS)


def write_letters(cache: Path, folder: Path, scale: float, seed: int, patch: int) -> int:
    """Writes letters.json and its images; returns the number of records. The letters are equally frequent."""
    out = LlavaJson(folder)
    fonts = letter_fonts(cache)
    for number in range(max(2, round(2600 * scale))):
        rng = random.Random(f"{seed}/letters/{number}")
        letter = LETTERS[number % len(LETTERS)]
        out.add(f"letters/letter_{number:05d}.png", draw_page(letter, 2, patch, fonts, rng), [(QUESTION, letter)])
    out.save(folder / "letters.json")
    return len(out.records)
