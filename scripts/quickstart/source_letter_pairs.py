"""Writes the source letter_pairs: two pages that differ in one half, and the question which letter is new.

A page fills one tile, and its halves are printed with rows of one letter each. The second page has the paper, the font
and one half of the first; the other half has a new letter. The answer needs both pages: either letter of the second may
be the new one.
"""

import random
from pathlib import Path

from llava_json import save_image, write_json_lines_list
from PIL import Image
from source_small_letters import INK, LETTER_HEIGHT, LETTERS, PAPERS, PATCHES_PER_SIDE, draw_letter, letter_fonts

QUESTION = "Which letter is new on the second page?"


def draw_halves(letters: tuple[str, str], patch: int, fonts: list[Path], rng: random.Random) -> Image.Image:
    """A page of one tile, with rows of the first letter in the upper half and of the second in the lower half.

    Args:
        letters: two capital letters.
        patch: side of a patch of the tower in pixels.
        fonts: of which one is chosen.
        rng: decides paper, font, distances and the places of the first letters.
    """
    side = PATCHES_PER_SIDE * patch
    page = Image.new("RGB", (side, side), rng.choice(PAPERS))
    font = rng.choice(fonts)
    for half, letter in enumerate(letters):
        stamp = draw_letter(letter, LETTER_HEIGHT * patch, font)
        gap, left, top = rng.randint(2, 4), rng.randint(0, 5), rng.randint(0, 3)
        for row in range(2):
            y = half * side // 2 + top + row * (stamp.height + 3)
            for x in range(left, side - stamp.width, stamp.width + gap):
                page.paste(INK, (x, y), stamp)
    return page


def write_pairs(cache: Path, folder: Path, scale: float, seed: int, patch: int) -> int:
    """Writes pairs.json and its images; returns the number of records. The answers are equally frequent."""
    fonts, records = letter_fonts(cache), []
    for number in range(max(2, round(4000 * scale))):
        rng = random.Random(f"{seed}/pairs/{number}")
        new = LETTERS[number % len(LETTERS)]
        before = rng.sample([letter for letter in LETTERS if letter != new], 2)
        changed = rng.randrange(2)
        after = [new if half == changed else letter for half, letter in enumerate(before)]
        names = [f"pairs/pair_{number:05d}_{page}.png" for page in (1, 2)]
        state = rng.getstate()
        for name, (upper, lower) in zip(names, (before, after), strict=True):
            rng.setstate(state)  # the pages differ in the letter alone
            save_image(draw_halves((upper, lower), patch, fonts, rng), folder / name)
        turns = [("human", f"<image>\n<image>\n{QUESTION}"), ("gpt", new)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": f"pair_{number:05d}", "image": names, "conversations": conversation})
    write_json_lines_list(folder / "pairs.json", records)
    return len(records)
