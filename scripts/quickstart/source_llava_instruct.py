"""Writes the sources llava_instruct (several turns about one image) and text_chats (no image), for stage 2."""

import random
import re
from pathlib import Path

from easy_vqa_shapes import collage, collage_turns, read_shapes
from llava_json import LlavaJson, Turns
from photographs import form_part, form_paths, join, read_photographs, vary
from vega_tables import Table, read_tables, shuffled

# Wide, tall and square collages, small and large, so that every AnyRes grid occurs.
GRIDS_HW = ((1, 3), (3, 1), (1, 2), (2, 1), (2, 2), (3, 3), (2, 3), (3, 2))
CELLS = (64, 112, 168, 224)


def write_conversations(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Writes llava_v1_5_mix.json and its images; returns the number of records."""
    out = LlavaJson(folder)
    num_collages, num_photos, num_joined, num_forms = (max(2, round(count * scale)) for count in (220, 100, 50, 30))
    shapes = read_shapes(cache / "easy_vqa")
    for number in range(num_collages):
        rng = random.Random(f"{seed}/collage/{number}")
        grid_hw = GRIDS_HW[number % len(GRIDS_HW)]
        chosen = rng.sample(shapes, grid_hw[0] * grid_hw[1])
        image = collage(chosen, grid_hw, CELLS[number // len(GRIDS_HW) % len(CELLS)], rng)
        out.add(f"shapes/collage_{number:05d}.png", image, collage_turns(chosen, grid_hw, rng))
    _add_photographs(out, cache, num_photos, num_joined, seed)
    forms = form_paths(cache / "synthdog")
    for number in range(num_forms):
        rng = random.Random(f"{seed}/asked_form/{number}")
        caption, part = form_part(forms[number % len(forms)], rng)
        turns = [
            ("Is this a photograph or a scanned document?", "A scanned document."),
            ("Which part is shown?", caption),
        ]
        out.add(f"forms/form_{number:05d}.png", part, [*turns, ("Is it in colour?", "No, it is black and white.")])
    random.Random(f"{seed}/llava_instruct").shuffle(out.records)
    out.save(folder / "llava_v1_5_mix.json")
    return len(out.records)


def _add_photographs(out: LlavaJson, cache: Path, num_single: int, num_joined: int, seed: int) -> None:
    photographs = read_photographs(cache)
    for number in range(num_single):
        rng = random.Random(f"{seed}/asked_photograph/{number}")
        photograph = photographs[number % len(photographs)]
        turns = [*rng.sample(photograph.questions, len(photograph.questions))]
        turns.append(("Describe the picture in one sentence.", photograph.caption))
        out.add(f"photographs/photograph_{number:05d}.jpg", vary(photograph.image, rng), turns)
    for number in range(num_joined):
        rng = random.Random(f"{seed}/joined/{number}")
        chosen = rng.sample(photographs, rng.choice((2, 3)))
        down = rng.random() < 0.5
        image = join([photograph.image for photograph in chosen], down, rng.choice((112, 168, 256)))
        ends = ("at the top", "at the bottom") if down else ("on the left", "on the right")
        names = [photograph.name[0].upper() + photograph.name[1:] + "." for photograph in chosen]
        turns = [(f"What is {ends[0]}?", names[0]), (f"What is {ends[1]}?", names[-1])]
        if len(chosen) == 3:
            turns.append(("What is in the middle?", names[1]))
        turns.append(("How many pictures were joined?", {2: "Two.", 3: "Three."}[len(chosen)]))
        out.add(f"photographs/joined_{number:05d}.jpg", image, rng.sample(turns, len(turns)))


def write_text_chats(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Writes text_chats.json, records without `image`; returns the number of records."""
    out = LlavaJson(folder)
    tables = shuffled(read_tables(cache / "vega_datasets"), seed, "text_chats")
    articles = definitions((cache / "synthdog" / "enwiki.txt").read_text(encoding="utf-8"))
    for number in range(max(2, round(200 * scale))):
        rng = random.Random(f"{seed}/text_chats/{number}")
        if number % 3 == 2:
            turns = _define(*articles[number // 3 % len(articles)], rng)
        else:
            turns = _calculate(tables[number % len(tables)], rng)
        out.add(f"text_{number:05d}", None, turns)
    out.save(folder / "text_chats.json")
    return len(out.records)


def definitions(text: str) -> list[tuple[str, str]]:
    """(subject, first sentence) of every article whose first sentence defines its subject."""
    pairs = []
    for article in text.splitlines():
        first = re.match(r"(?P<subject>[A-Z][A-Za-z' ]{2,40}?) (?:is|was) (?:an?|the) [^.()]{20,200}\.", article)
        if first:
            pairs.append((first["subject"], first[0]))
    return pairs


def _define(subject: str, sentence: str, rng: random.Random) -> Turns:
    asked = rng.choice(
        (f"What does an encyclopaedia say about {subject}?", f"Tell me in one sentence about {subject}.")
    )
    turns = [(asked, sentence)]
    turns.append(("How many words was that?", f"{len(sentence.split())} words."))
    turns.append(("What was the first word?", f'"{sentence.split()[0]}".'))
    return turns[: rng.choice((1, 2, 3))]


def _calculate(table: Table, rng: random.Random) -> Turns:
    """The rows of the table as text, and questions about them."""
    unit = f" ({table.unit})" if table.unit else ""
    rows = "; ".join(f"{label}: {table.shown(row)}" for row, label in enumerate(table.labels))
    listing = f"{table.title}{unit}. {rows}."
    a, b = rng.sample(range(len(table.labels)), 2)
    turns: Turns = []
    if table.values[a] != table.values[b]:
        higher = table.labels[a if table.values[a] > table.values[b] else b]
        question = f"Which {table.category} has the larger {table.quantity}, {table.labels[a]} or {table.labels[b]}?"
        turns.append((question, f"{higher}."))
        gap = table.show(round(abs(table.values[a] - table.values[b]), 2))
        turns.append((f"By how much do {table.labels[a]} and {table.labels[b]} differ?", f"By {gap}."))
    total = table.show(round(table.values[a] + table.values[b], 2))
    turns.append((f"What is the sum for {table.labels[a]} and {table.labels[b]}?", f"{total}."))
    if table.values.count(max(table.values)) == 1:
        turns.append(
            (
                f"Which {table.category} has the highest {table.quantity}?",
                f"{table.labels[table.values.index(max(table.values))]}.",
            )
        )
    turns.append(("How many entries does the list have?", f"{len(table.labels)}."))
    chosen = rng.sample(turns, rng.randint(2, 4) if len(turns) >= 4 else 2)
    first, *rest = chosen
    return [(f"{listing}\n{first[0]}", first[1]), *rest]
