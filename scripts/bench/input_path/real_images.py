"""The data of the input benchmarks: photographs, pages and text of the quickstart's assets, in the mixture's sizes.

Also stores of them, and rows of a length table of any size by `data_recipes.schema.published_mixture`. Deterministic.
"""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.published_mixture import SOURCES, draw_shapes
from data_recipes.schema.sample import Message, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.cache_root import cache_root
from llava_next.config import ANYRES, AUTHORS_GRIDS, ProcessorConfig
from llava_next.inputs.anyres import ImageLayout, decode, image_layout
from llava_next.inputs.processor import Processor
from llava_next.model.build import read_tokenizer
from train.data.length_table import ROW

TILE, PATCHES_PER_SIDE = 336, 24
ASSETS = cache_root()
PAGES = {"docvqa", "synthdog_en", "chartqa", "dvqa", "ai2d"}
"""Sources of scans and drawings, written as PNG; the images of all others are photographs, written as JPEG."""


def photographs() -> list[Image.Image]:
    """Four photographs, RGB."""
    paths = [*sorted(ASSETS.glob("sklearn/*.jpg"))]
    paths += [ASSETS / "skimage/photos" / name for name in ("coffee.png", "rocket.jpg")]
    return [decode(path.read_bytes()) for path in paths]


def encode_noise_images(num_images: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """(kind, encoded image) with the mixture's sizes: photographs and scanned forms, resized."""
    photos = photographs()
    forms = [decode(path.read_bytes()) for path in sorted(ASSETS.glob("synthdog/forms/*.png"))[:8]]
    shapes = draw_shapes(2 * num_images, seed)
    made = []
    for number in np.flatnonzero(shapes.sizes_hw[:, 0])[:num_images].tolist():
        height, width = shapes.sizes_hw[number].tolist()
        is_page = SOURCES[shapes.sources[number]].name in PAGES
        base = forms if is_page else photos
        stream = io.BytesIO()
        shown = base[number % len(base)].resize((width, height), Image.Resampling.BICUBIC)
        shown.save(stream, "PNG" if is_page else "JPEG", quality=90)
        made.append(("pages" if is_page else "photographs", stream.getvalue()))
    return made


def layout_of(size_hw: tuple[int, int]) -> ImageLayout:
    """Tiles and tokens of an image of this size."""
    return image_layout(size_hw, mode="anyres", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=PATCHES_PER_SIDE)


def plain_images(num_images: int, seed: int = 0) -> list[bytes]:
    """Images with the mixture's sizes and one colour each, of which only the headers are read."""
    made: list[bytes] = []
    for number, (height, width) in enumerate(draw_shapes(2 * num_images, seed).sizes_hw.tolist()):
        if height and len(made) < num_images:
            stream = io.BytesIO()
            Image.new("RGB", (width, height), (number % 256, number // 256, 0)).save(stream, "PNG")
            made.append(stream.getvalue())
    return made


def conversations(num_samples: int, images: list[bytes], seed: int = 0) -> Iterator[Sample]:
    """Samples with one image each: three rounds on average, sentences from an encyclopedia."""
    words = (ASSETS / "synthdog/enwiki.txt").read_text(encoding="utf-8").split()
    dice = random.Random(seed)

    def words_of(num_words: int) -> str:
        start = dice.randrange(len(words) - num_words)
        return " ".join(words[start : start + num_words]).replace("<image>", "")

    for number in range(num_samples):
        messages = []
        for turn in range(1 + min(19, int(dice.expovariate(1 / 2.5)))):
            placeholder = "<image>\n" if turn == 0 else ""
            messages.append(Message("user", placeholder + words_of(dice.randint(5, 25))))
            messages.append(Message("assistant", words_of(1 + int(dice.expovariate(1 / 45)))))
        yield Sample(f"{number:07d}", tuple(messages), (images[number % len(images)],), f"bench:{number}")


def write_mixture(folder: Path, name: str, num_samples: int, images: list[bytes]) -> None:
    """Writes one store of conversations below `folder`."""
    source = SourceInfo(name=name, reader="messages_jsonl", root=name)
    write_store(folder / name, source, conversations(num_samples, images))


def open_mixture(folder: Path, name: str, count: int | None = None) -> Mixture:
    """The store as a mixture, with all samples or `count` of them."""
    return Mixture.open(MixtureConfig(name, 0, {name: SourceShare(count)}), folder)


def processor() -> Processor:
    """AnyRes tiles of 336 pixels and SmolLM2's tokenizer."""
    config = ProcessorConfig(
        template="chatml",
        views=ANYRES,
        tile=TILE,
        patches_per_side=PATCHES_PER_SIDE,
        grids=AUTHORS_GRIDS,
        max_length=4096,
    )
    return Processor(read_tokenizer(str(ASSETS / "smollm2_six_layers")), config)


def write_published_rows(path: Path, num_samples: int) -> None:
    """The length table's rows of the published mixture, as `train.data.length_table` stores them."""
    shapes = draw_shapes(num_samples)
    rows = np.zeros(num_samples, dtype=ROW)
    rows["sample"], rows["source"] = np.arange(num_samples), shapes.sources
    rows["tokens"], rows["supervised"] = shapes.text_tokens, shapes.supervised
    sizes, which = np.unique(shapes.sizes_hw, axis=0, return_inverse=True)
    counts = np.zeros((len(sizes), 2), dtype=np.int64)
    for number, (height, width) in enumerate(sizes.tolist()):
        if height:
            layout = layout_of((height, width))
            counts[number] = layout.num_tokens, layout.num_tiles
    rows["tokens"] = np.minimum(rows["tokens"] + counts[which.ravel(), 0], 4096)
    rows["tiles"] = counts[which.ravel(), 1]
    np.save(path, rows)
