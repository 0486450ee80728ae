"""Token and tile counts of single images and of sets, compared with stock processors and with measured tables.

Counts depend on sizes only, so most tests make no pixels. The stock processor of LLaVA-OneVision decides by the nesting
of the list of images: a nested list is one sample with several images.
"""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, AUTHORS_GRIDS, Grid, ProcessorConfig, ViewsConfig
from llava_next.inputs.anyres import SizeHW, cut_tiles, image_layout
from llava_next.inputs.processor import Processor
from llava_next.model.build import read_tokenizer
from tests.tiny import PATCH, PATCHES_PER_SIDE, SIZES_HW, TILE, encode_noise_image, tiny_tokenizer

ONEVISION_GRIDS: tuple[Grid, ...] = tuple((rows, cols) for cols in range(1, 7) for rows in range(1, 7))
ONEVISION = ViewsConfig("anyres_max_9", "pad", closing_newline=True)
MEAN_COLOUR = (127, 127, 127)
"""Of a mean of 0.5."""

# (width, height): tokens and tiles that stock LlavaOnevisionProcessor (SigLIP 384, anyres_max_9) gave.
SINGLE = {
    (100, 100): (1485, 2),
    (384, 384): (1485, 2),
    (640, 480): (2929, 5),
    (768, 768): (3699, 5),
    (1024, 768): (4725, 7),
    (899, 1024): (6561, 10),
    (1000, 200): (2123, 4),
    (1152, 1152): (7371, 10),
    (1200, 1200): (7371, 17),
    (2304, 2304): (7371, 37),
    (3000, 3000): (7371, 37),
    (300, 3000): (3645, 7),
    (3000, 300): (3500, 7),
    (2000, 1500): (7309, 25),
    (1153, 944): (8748, 13),
    (1145, 1392): (8765, 13),
}


def _processor(
    folder: Path, views: ViewsConfig, grids: tuple[Grid, ...] = ONEVISION_GRIDS, tile: int = 384, side: int = 27
) -> Processor:
    colour = MEAN_COLOUR if "pad" in views.modes else None
    config = ProcessorConfig("chatml", views, grids, tile, side, max_length=10**9, pad_colour=colour)
    return Processor(read_tokenizer(str(tiny_tokenizer(folder))), config)


def _counts(processor: Processor, sizes_hw: list[SizeHW]) -> tuple[list[int], int]:
    """Tokens of each image, and tiles of all; the ids have the sum of the tokens."""
    message = Message("user", "<image>" * len(sizes_hw) + "What is it?")
    ids, images = processor.prompt([message], sizes_hw)
    tokens = [image.num_tokens for image in images]
    assert int((ids == processor.image_token_id).sum()) == sum(tokens)
    assert [len(image.token_sources()) for image in images] == tokens
    return tokens, sum(image.num_tiles for image in images)


@pytest.mark.parametrize("size_wh", SINGLE)
def test_table_of_onevision(tmp_path: Path, size_wh: tuple[int, int]) -> None:
    """A single image has the measured numbers of tokens and tiles."""
    (tokens,), tiles = _counts(_processor(tmp_path, ONEVISION), [size_wh[::-1]])
    assert (tokens, tiles) == SINGLE[size_wh]


@pytest.mark.parametrize("num_images", [2, 3])
def test_each_of_several_images_has_one_view(tmp_path: Path, num_images: int) -> None:
    """OneVision: 730 tokens and a tile for each image of a set, a closing newline included. Interleave: 729."""
    sizes = [(480, 640), (900, 300), (3000, 3000)][:num_images]
    assert _counts(_processor(tmp_path, ONEVISION), sizes) == ([730] * num_images, num_images)
    assert _counts(_processor(tmp_path, ViewsConfig("anyres", "pad")), sizes) == ([729] * num_images, num_images)


def test_table_of_llava_next_with_several_images(tmp_path: Path) -> None:
    """AnyRes for each image, as in stock LlavaNextProcessor."""
    processor = _processor(tmp_path, ANYRES, AUTHORS_GRIDS, 336, 24)
    single = {(336, 336): 1176, (672, 336): 1752, (640, 480): 2340, (1000, 200): 1598, (300, 900): 2376}
    for size_wh, tokens in single.items():
        assert _counts(processor, [size_wh[::-1]])[0] == [tokens]
    assert sum(_counts(processor, [(480, 640), (900, 300)])[0]) == 4716


def test_largest_count_is_not_the_documented_bound() -> None:
    """A map of up to 1.21 times nine views is not reduced, so that the published 729 * (9 + 1) = 7,290 is exceeded. The
    largest count of a sample of sizes around the largest one is 8,765."""
    sizes = [(height, width) for height in range(1380, 1400) for width in range(1135, 1155)]
    counts = [
        image_layout(size, mode="anyres", grids=ONEVISION_GRIDS, tile=384, patches_per_side=27, max_views=9).num_tokens
        for size in sizes
    ]
    assert max(counts) == 8765
    assert min(counts) < 7371


class _StockOnevision:
    """The counts of stock LlavaOnevisionProcessor. Its constructor requires a video processor, which needs
    torchvision."""

    def __init__(self, side: int, tile: int, grids: tuple[Grid, ...], max_views: int) -> None:
        stock = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        stock.image_processor = SimpleNamespace(image_grid_pinpoints=[[r * tile, c * tile] for r, c in grids])
        stock.num_image_tokens = side * side
        stock.vision_feature_select_strategy = "full"
        stock.vision_aspect_ratio = f"anyres_max_{max_views}"
        stock.image_token = "i"
        self._stock = stock
        self._pixels = np.empty((1, 1, 3, tile, tile))

    def tokens(self, sizes_hw: list[SizeHW]) -> list[int]:
        """Tokens of each image of one sample."""
        inputs = {
            "batch_num_images": [len(sizes_hw)],
            "image_sizes": [list(size) for size in sizes_hw],
            "pixel_values": self._pixels,
        }
        return [len(self._stock.replace_image_token(inputs, index)) for index in range(len(sizes_hw))]


def _random_sets(count: int, seed: int) -> list[list[SizeHW]]:
    """Sets of one to four sizes, half of them of one: small, large, thin and round sizes."""
    generator = np.random.default_rng(seed)
    sets = []
    for number in range(count):
        sizes = []
        for _ in range(1 if number % 2 else int(generator.integers(2, 5))):
            height, width = generator.integers(1, generator.choice([60, 800, 6000]), 2)
            if generator.random() < 0.25:
                height, width = height * 12 // 11 // 24 * 24 + 24, width // 24 * 24 + 24
            sizes.append((int(height), int(width)))
        sets.append(sizes)
    return sets


@pytest.mark.parametrize("count", [400, pytest.param(6000, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("side", "tile", "grids", "max_views"), [(27, 384, ONEVISION_GRIDS, 9), (24, 336, AUTHORS_GRIDS, 2)]
)
def test_counts_of_random_sets_are_the_stock_ones(
    tmp_path: Path, count: int, side: int, tile: int, grids: tuple[Grid, ...], max_views: int
) -> None:
    """Tokens of single images and of sets, with OneVision's grids and with LLaVA-NeXT's."""
    processor = _processor(tmp_path, ViewsConfig(f"anyres_max_{max_views}", "pad", True), grids, tile, side)
    stock = _StockOnevision(side, tile, grids, max_views)
    reduced = 0
    for sizes in _random_sets(count, seed=side):
        assert _counts(processor, sizes)[0] == stock.tokens(sizes), sizes
        layouts = processor.prompt([Message("user", "<image>" * len(sizes))], sizes)[1]
        reduced += layouts[0].num_reduced > 0
    assert count / 20 < reduced < count / 2


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_counts_of_random_sets_with_anyres_each_are_the_stock_ones(tmp_path: Path, count: int) -> None:
    """AnyRes for each image of a set: stock LlavaNextProcessor counts each image alone."""
    processor = _processor(tmp_path, ANYRES, AUTHORS_GRIDS, 336, 24)
    stock = LlavaNextProcessor.__new__(LlavaNextProcessor)
    stock.image_processor = SimpleNamespace(image_grid_pinpoints=[[r * 336, c * 336] for r, c in AUTHORS_GRIDS])
    stock.patch_size = 14
    stock.num_additional_image_tokens = 0
    for sizes in _random_sets(count, seed=1):
        expected = [stock._get_number_of_features(*size, 336, 336) for size in sizes]
        assert _counts(processor, sizes)[0] == expected, sizes


def test_sets_of_single_views_equal_stock_llava(tmp_path: Path) -> None:
    """Interleave as it is served: ids of LlavaProcessor for two images, and the pixels of its views."""
    processor = _processor(tmp_path, ViewsConfig("pad", "pad"), tile=TILE, side=PATCHES_PER_SIDE)
    side = {"height": TILE, "width": TILE}
    stock = LlavaProcessor(
        LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": TILE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
    )
    files = [encode_noise_image(number, size) for number, size in enumerate(SIZES_HW[1:3])]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    text = "<image> and <image>, what changed?"
    inputs = stock(images=images, text=text, return_tensors="np")
    messages = [Message("user", text), Message("assistant", "Nothing.")]
    example = processor.encode(messages, list(SIZES_HW[1:3]), files)
    image_token = processor.image_token_id
    assert (inputs["input_ids"] == image_token).sum() == (example.layout.ids == image_token).sum() == 32
    np.testing.assert_array_equal(example.tiles.transpose(0, 3, 1, 2), _as_bytes(inputs["pixel_values"]))


def _as_bytes(pixels: Any) -> np.ndarray:
    """Pixels before normalization with mean and standard deviation 0.5."""
    return np.rint((np.asarray(pixels) * 0.5 + 0.5) * 255)


@pytest.mark.parametrize("size_hw", [(45, 61), (90, 31), (150, 160), (20, 20)])
def test_pixels_equal_stock_onevision(size_hw: SizeHW) -> None:
    """The views of a single image and of an image in a set are those of stock LlavaOnevisionImageProcessor."""
    grids = ONEVISION_GRIDS
    stock = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, cols * TILE] for rows, cols in grids],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    image = Image.open(io.BytesIO(encode_noise_image(3, size_hw))).convert("RGB")
    for nested, mode in ([[image]], "anyres"), ([[image, image]], "pad"):
        layout = image_layout(size_hw, mode=mode, grids=grids, tile=TILE, patches_per_side=PATCHES_PER_SIDE)  # type: ignore[arg-type]
        tiles = cut_tiles(image, layout, TILE, pad_colour=MEAN_COLOUR)
        pixels = stock(nested, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), _as_bytes(pixels))
