"""Writes the source synthdog-en: small printed pages in the layout of SynthDoG, sentences on photographed paper."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from charts import Font, font_files, load_font
from llava_json import save_image
from PIL import Image, ImageDraw

SIZES_HW = ((224, 336), (256, 256), (336, 224), (224, 448), (300, 400), (400, 300), (336, 336))
MARGIN = 14


@dataclass(frozen=True)
class PageResources:
    """The material of the pages: sentences, font files, images of paper (RGB)."""

    sentences: list[str]
    fonts: list[Path]
    papers: list[Image.Image]

    @staticmethod
    def read(synthdog: Path) -> "PageResources":
        """Reads the cache's synthdog folder."""
        papers = []
        for path in sorted((synthdog / "paper").glob("*.jpg")):
            with Image.open(path) as opened:
                paper = opened.convert("RGB")
            paper.thumbnail((900, 900))
            papers.append(paper)
        text = (synthdog / "enwiki.txt").read_text(encoding="utf-8")
        return PageResources(sentences(text), font_files(synthdog.parent), papers)


def sentences(text: str, least: int = 8, most: int = 25) -> list[str]:
    """The plain sentences of `least` to `most` words: ASCII, without formulas and brackets."""
    # The corpus joins paragraphs without a space ("socialism.Humans"): a full stop before a capital ends a sentence.
    parts = re.split(r"(?<=[.!?])\s+|(?<=[a-z0-9]\.)(?=[A-Z])", text)
    plain_sentences = []
    for part in parts:
        words = part.split()
        plain = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'%$&\-]*[A-Za-z0-9][.!?]", part)
        if plain and least <= len(words) <= most and max(map(len, words)) <= 16:
            plain_sentences.append(" ".join(words))
    return list(dict.fromkeys(plain_sentences))


def wrap(words: list[str], font: Font, width: float) -> list[str] | None:
    """Lines of at most `width` pixels; None if a word is wider."""
    lines: list[str] = []
    for word in words:
        if font.getlength(word) > width:
            return None
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def draw_page(text: str, resources: PageResources, rng: random.Random) -> Image.Image:
    """A page with exactly `text`, in the largest font size that fits."""
    height, width = rng.choice(SIZES_HW)
    paper = rng.choice(resources.papers)
    # A random crop of the paper with the page's aspect ratio, at least six tenths as large as possible.
    zoom = rng.uniform(0.6, 1.0) * min(paper.width / width, paper.height / height)
    left, top = rng.uniform(0, paper.width - width * zoom), rng.uniform(0, paper.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    page = paper.resize((width, height), Image.Resampling.BICUBIC, box)
    # The papers are photographed in hard light; blending with white keeps the print readable.
    page = Image.blend(page, Image.new("RGB", page.size, (255, 255, 255)), 0.6)
    path = rng.choice(resources.fonts)
    for size in range(rng.choice((26, 30, 34)), 7, -1):
        font = load_font(path, size)
        lines = wrap(text.split(), font, width - 2 * MARGIN)
        pitch = round(size * 1.32)
        if lines and pitch * len(lines) <= height - 2 * MARGIN:
            break
    else:
        raise ValueError(f"{text!r} does not fit into {width}x{height} pixels")
    draw = ImageDraw.Draw(page)
    y = MARGIN + rng.randint(0, height - 2 * MARGIN - pitch * len(lines))
    ink = tuple(rng.randint(0, 45) for _ in range(3))
    for row, line in enumerate(lines):
        draw.text((MARGIN, y + row * pitch), line, ink, font)
    return page


def write_pages(synthdog: Path, folder: Path, num_pages: int, seed: int) -> int:
    """Writes `folder`/train/metadata.jsonl and its images; returns the number of pages."""
    resources = PageResources.read(synthdog)
    texts = random.Random(f"{seed}/synthdog").sample(resources.sentences, num_pages)
    lines = []
    for number, text in enumerate(texts):
        name = f"image_{number}.jpg"
        page = draw_page(text, resources, random.Random(f"{seed}/synthdog/{number}"))
        save_image(page, folder / "train" / name)
        truth = json.dumps({"gt_parse": {"text_sequence": text}})
        lines.append(json.dumps({"file_name": name, "ground_truth": truth}) + "\n")
    (folder / "train" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)
