"""AnyRes geometry compared with published numbers and with transformers' functions."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_next.config import AUTHORS_GRIDS, Grid, ModelError, check_grids
from llava_next.inputs import anyres
from llava_next.inputs.anyres import (
    NEWLINE,
    ImageLayout,
    cut_tiles,
    grids_from_pinpoints,
    image_layout,
    resized_hw,
    select_grid,
    unpad_range,
)

BLOG_GRIDS: tuple[Grid, ...] = (*AUTHORS_GRIDS, (1, 4), (4, 1))
TILE, SIDE = 336, 24


def _layout(size_hw: tuple[int, int], grids: tuple[Grid, ...] = AUTHORS_GRIDS) -> ImageLayout:
    return image_layout(size_hw, mode="anyres", grids=grids, tile=TILE, patches_per_side=SIDE)


def _pinpoints(grids: tuple[Grid, ...], tile: int = TILE) -> list[list[int]]:
    """The grids as transformers reads them: (height, width) in pixels, in the authors' order."""
    return [[rows * tile, cols * tile] for rows, cols in grids]


# (width, height), grid as columns x rows, unpadded map as width x height, tokens, as published (recipe 2.8).
PUBLISHED = [
    ((336, 336), (1, 2), (24, 24), 1176),
    ((224, 224), (1, 2), (24, 24), 1176),
    ((100, 100), (1, 2), (24, 24), 1176),
    ((300, 200), (1, 2), (24, 16), 976),
    ((333, 500), (1, 2), (24, 36), 1476),
    ((448, 448), (2, 2), (48, 48), 2928),
    ((672, 672), (2, 2), (48, 48), 2928),
    ((500, 375), (2, 2), (48, 36), 2340),
    ((640, 480), (2, 2), (48, 36), 2340),
    ((800, 600), (2, 2), (48, 36), 2340),
    ((1024, 768), (2, 2), (48, 36), 2340),
    ((640, 427), (2, 2), (48, 32), 2144),
    ((480, 640), (2, 2), (36, 48), 2352),
    ((1280, 720), (2, 2), (48, 28), 1948),
    ((1920, 1080), (2, 2), (48, 28), 1948),
    ((1080, 1920), (2, 2), (28, 48), 1968),
    ((600, 900), (2, 2), (32, 48), 2160),
    ((850, 1100), (2, 2), (38, 48), 2448),
    ((1654, 2339), (2, 2), (34, 48), 2256),
    ((2480, 3508), (2, 2), (34, 48), 2256),
    ((1024, 899), (2, 2), (48, 42), 2634),
    ((899, 1024), (2, 2), (42, 48), 2640),
    ((1000, 300), (3, 1), (72, 22), 2182),
    ((300, 1000), (1, 3), (22, 72), 2232),
    ((1008, 336), (3, 1), (72, 24), 2328),
    ((2000, 400), (3, 1), (72, 14), 1598),
    ((1344, 336), (3, 1), (72, 18), 1890),
    ((336, 1344), (1, 3), (18, 72), 1944),
    ((2000, 10), (3, 1), (72, 0), 576),
]


@pytest.mark.parametrize(("size_wh", "grid", "map_wh", "num_tokens"), PUBLISHED)
def test_published_token_table(
    size_wh: tuple[int, int], grid: tuple[int, int], map_wh: tuple[int, int], num_tokens: int
) -> None:
    """Grid, unpadded map and token count of every size in the published table with five grids."""
    layout = _layout(size_wh[::-1])
    unpadded_wh = (layout.kept_cols[1] - layout.kept_cols[0], layout.kept_rows[1] - layout.kept_rows[0])
    assert (layout.grid, unpadded_wh, layout.num_tokens) == (grid[::-1], map_wh, num_tokens)


@pytest.mark.parametrize(("size_wh", "grid", "map_wh", "num_tokens"), PUBLISHED)
def test_published_token_table_with_seven_grids(
    size_wh: tuple[int, int], grid: tuple[int, int], map_wh: tuple[int, int], num_tokens: int
) -> None:
    """The two longer grids of the blog change three rows of the table, and the grid of the thinnest image."""
    changed = {(2000, 400): ((4, 1), 2516), (1344, 336): ((4, 1), 2904), (336, 1344): ((1, 4), 2976)}
    layout = _layout(size_wh[::-1], BLOG_GRIDS)
    if size_wh == (2000, 10):
        assert layout.num_tokens >= 576
        return
    expected_grid, expected = changed.get(size_wh, (grid, num_tokens))
    assert (layout.grid, layout.num_tokens) == (expected_grid[::-1], expected)


@pytest.mark.parametrize(
    ("size_wh", "num_tokens"),
    [
        ((88, 55), 976),  # the authors' rounding gives 926
        ((656, 205), 1360),  # 1262
        ((110, 352), 1392),  # 1296
        ((748, 352), 1848),  # 1800
        ((1, 5000), 624),
        ((5000, 1), 576),
        ((2000, 10), 576),
        ((345, 1037), 2376),
    ],
)
def test_boundary_sizes_in_exact_arithmetic(size_wh: tuple[int, int], num_tokens: int) -> None:
    """Where the authors' int() of a floating-point product is below the exact floor, the exact value is used."""
    assert _layout(size_wh[::-1]).num_tokens == num_tokens


@pytest.mark.parametrize(("grid", "most"), [
    ((2, 2), 2928), ((1, 3), 2328), ((3, 1), 2376), ((1, 2), 1752), ((2, 1), 1776), ((1, 4), 2904), ((4, 1), 2976),
])  # fmt: skip
def test_maximum_tokens_of_a_grid(grid: Grid, most: int) -> None:
    """An image that fills its grid has the published number of tokens, which is the maximum."""
    assert _layout((grid[0] * TILE, grid[1] * TILE), (grid,)).num_tokens == most
    sizes = np.random.default_rng(0).integers(1, 3000, (300, 2))
    assert max(_layout((int(h), int(w)), (grid,)).num_tokens for h, w in sizes) <= most


def _random_sizes(count: int) -> list[tuple[int, int]]:
    """Small, large, thin and round sizes."""
    generator = np.random.default_rng(7)
    quarter = count // 4
    small = generator.integers(1, 340, (quarter, 2))
    large = generator.integers(300, 4000, (quarter, 2))
    thin = np.stack([generator.integers(1, 60, quarter), generator.integers(200, 6000, quarter)], axis=1)
    thin[::2] = thin[::2, ::-1]
    even = generator.integers(1, 60, (quarter, 2)) * generator.choice([8, 11, 14, 21, 28, 42, 56, 112], (quarter, 1))
    return [(int(h), int(w)) for h, w in np.concatenate([small, large, thin, even])]


@pytest.mark.parametrize(
    ("grids", "tile", "patch", "count"),
    [(AUTHORS_GRIDS, 336, 14, 20_000), (BLOG_GRIDS, 336, 14, 4_000), (AUTHORS_GRIDS, 384, 14, 4_000),
     (AUTHORS_GRIDS, 224, 14, 4_000), (AUTHORS_GRIDS, 28, 7, 4_000)],
)  # fmt: skip
def test_equals_stock_functions_at_random_sizes(grids: tuple[Grid, ...], tile: int, patch: int, count: int) -> None:
    """Grid, canvas size, unpadded map and token count equal those of transformers' functions."""
    side, points = tile // patch, _pinpoints(grids, tile)
    stock = LlavaNextProcessor.__new__(LlavaNextProcessor)  # counting tokens needs three attributes only
    stock.patch_size, stock.num_additional_image_tokens = patch, 0
    stock.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=points)
    for size in _random_sizes(count):
        layout = image_layout(size, mode="anyres", grids=grids, tile=tile, patches_per_side=side)
        assert layout.grid is not None
        canvas = (layout.grid[0] * tile, layout.grid[1] * tile)
        assert tuple(select_best_resolution(size, points)) == canvas, size
        blank = np.broadcast_to(np.uint8(0), (1, *size))
        assert get_patch_output_size(blank, canvas, "channels_first") == resized_hw(size, canvas), size
        feature_map = torch.empty(1, layout.grid[0] * side, layout.grid[1] * side, device="meta")
        unpadded = unpad_image(feature_map, size).shape[1:]
        rows, cols = layout.kept_rows, layout.kept_cols
        assert tuple(unpadded) == (rows[1] - rows[0], cols[1] - cols[0]), size
        assert stock._get_number_of_features(*size, tile, tile) == layout.num_tokens, size


def test_unpad_range_equals_unpad_image() -> None:
    """The same rows and columns remain: unpad_image is applied to a map of its own indices."""
    for size in [(200, 300), (300, 200), (480, 640), (1000, 301), (17, 23), (899, 1024), (55, 88), (1, 50)]:
        index_map = torch.arange(48 * 48).view(1, 48, 48)
        rows, cols = unpad_range(size, (48, 48))
        assert torch.equal(unpad_image(index_map, size), index_map[:, slice(*rows), slice(*cols)]), size


def test_grid_selection_uses_the_published_float_arithmetic() -> None:
    """At these sizes exact arithmetic would select another grid than the authors' int() of a floating-point product."""
    for size, grid in [((1226, 2451), (1, 2)), ((1141, 570), (2, 1)), ((2433, 1217), (2, 1)), ((1200, 2398), (1, 2))]:
        assert tuple(select_best_resolution(size, _pinpoints(AUTHORS_GRIDS))) == (grid[0] * TILE, grid[1] * TILE)
        assert select_grid(size, AUTHORS_GRIDS, TILE) == grid


def test_ties_go_to_the_first_grid() -> None:
    """A small square image gets the first of two equal grids, one column of two tiles, as in the authors' code."""
    assert select_grid((100, 100), AUTHORS_GRIDS, TILE) == (2, 1)
    assert select_grid((100, 100), AUTHORS_GRIDS[1::-1], TILE) == (1, 2)


IMAGE_SIZES_HW = [(300, 200), (200, 300), (333, 500), (640, 427), (427, 641), (899, 1024), (301, 1000), (1000, 299),
               (17, 23), (1, 1), (1, 97), (97, 1), (336, 336), (673, 671), (55, 88)]  # fmt: skip


def _noise(size_hw: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8))


def test_tile_pixels_equal_the_stock_processor() -> None:
    """Before rescaling, every tile of every grid is bitwise that of LlavaNextImageProcessorPil."""
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=_pinpoints(AUTHORS_GRIDS), do_rescale=False, do_normalize=False,
    )  # fmt: skip
    grids = set()
    for seed, size in enumerate(IMAGE_SIZES_HW):
        image, layout = _noise(size, seed), _layout(size)
        grids.add(layout.grid)
        tiles = cut_tiles(image, layout, TILE)
        assert tiles.dtype == np.uint8
        assert tiles.shape == (layout.num_tiles, TILE, TILE, 3)
        expected = np.asarray(stock(image, return_tensors="np")["pixel_values"][0])
        np.testing.assert_array_equal(tiles, expected.transpose(0, 2, 3, 1), err_msg=str(size))
    assert grids == set(AUTHORS_GRIDS)


def test_square_mode_equals_the_clip_processor() -> None:
    """Resized short side and center crop are bitwise those of CLIPImageProcessorPil; one tile, no newline."""
    stock = CLIPImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE},
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    for seed, size in enumerate(IMAGE_SIZES_HW):
        layout = image_layout(size, mode="crop", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=SIDE)
        assert (layout.num_tiles, layout.num_tokens) == (1, SIDE * SIDE)
        np.testing.assert_array_equal(layout.token_sources(), np.arange(SIDE * SIDE))
        image = _noise(size, seed)
        expected = np.asarray(stock(image, return_tensors="np")["pixel_values"])
        np.testing.assert_array_equal(cut_tiles(image, layout, TILE), expected.transpose(0, 2, 3, 1), err_msg=str(size))


@pytest.mark.parametrize(
    "size", [*IMAGE_SIZES_HW, (480, 640), (1, 1), (1, 97), (97, 1), (3, 50), (40, 1500), (1100, 31)]
)
def test_squash_mode_equals_the_stock_processors(size: tuple[int, int]) -> None:
    """The view is bitwise that of SiglipImageProcessorPil, of an export's LlavaImageProcessorPil, and of the AnyRes
    base view; one tile, no newline."""
    square = {"height": TILE, "width": TILE}
    plain: dict[str, Any] = {"size": square, "do_rescale": False, "do_normalize": False}
    layout = image_layout(size, mode="squash", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=SIDE)
    assert (layout.num_tiles, layout.num_tokens) == (1, SIDE * SIDE)
    np.testing.assert_array_equal(layout.token_sources(), np.arange(SIDE * SIDE))
    image = _noise(size, sum(size))
    view = cut_tiles(image, layout, TILE)
    assert view.shape == (1, TILE, TILE, 3)
    for stock in (SiglipImageProcessorPil(**plain), LlavaImageProcessorPil(do_center_crop=False, **plain)):
        expected = np.asarray(stock(image, return_tensors="np")["pixel_values"])
        np.testing.assert_array_equal(view, expected.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(view[0], cut_tiles(image, _layout(size), TILE)[0])


def _padded(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pads the image to a square of this color with array indexing; the bottom or right side gets an odd pixel."""
    side = max(image.size)
    square = np.full((side, side, 3), colour, dtype=np.uint8)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(square)


@pytest.mark.parametrize(
    ("colour", "band_rows"), [((122, 116, 104), 1024), ((127, 127, 127), 50)], ids=["clip", "siglip"]
)
def test_pad_mode_equals_the_stock_processors(
    monkeypatch: pytest.MonkeyPatch, colour: tuple[int, int, int], band_rows: int
) -> None:
    """The view is bitwise that of CLIPImageProcessorPil on a padded image and of LlavaImageProcessorPil, whatever the
    band size."""
    monkeypatch.setattr(anyres, "_BAND_ROWS", band_rows)
    options: dict[str, Any] = {
        "size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE},
        "do_rescale": False, "do_normalize": False,
    }  # fmt: skip
    clip = CLIPImageProcessorPil(**options)
    llava = LlavaImageProcessorPil(do_pad=True, image_mean=[(value + 0.5) / 255 for value in colour], **options)
    for seed, size in enumerate([*IMAGE_SIZES_HW[-9:], (40, 1500), (1100, 31), (335, 336)]):
        layout = image_layout(size, mode="pad", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=SIDE)
        assert (layout.num_tiles, layout.num_tokens) == (1, SIDE * SIDE)
        image = _noise(size, seed)
        view = cut_tiles(image, layout, TILE, pad_colour=colour)
        assert view.shape == (1, TILE, TILE, 3)
        for expected in (clip(_padded(image, colour), return_tensors="np"), llava(image, return_tensors="np")):
            np.testing.assert_array_equal(
                view, np.asarray(expected["pixel_values"]).transpose(0, 2, 3, 1), err_msg=str(size)
            )


def test_order_of_tiles() -> None:
    """Four colored quadrants: base view, top left, top right, bottom left, bottom right."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    pixels = np.zeros((672, 672, 3), dtype=np.uint8)
    for index, colour in enumerate(colours):
        top, left = (index // 2) * 336, (index % 2) * 336
        pixels[top : top + 336, left : left + 336] = colour
    tiles = cut_tiles(Image.fromarray(pixels), _layout((672, 672)), TILE)
    for tile, colour in zip(tiles[1:], colours, strict=True):
        assert (tile == np.array(colour, dtype=np.uint8)).all()
    base = tiles[0]
    assert [tuple(base[y, x]) for y in (80, 250) for x in (80, 250)] == colours


def test_padding_is_black_and_centered() -> None:
    """Padding is 0 before normalization, and the bottom or right side gets an odd pixel."""
    layout = image_layout((10, 16), mode="anyres", grids=((2, 2),), tile=TILE, patches_per_side=SIDE)
    white = Image.new("RGB", (16, 10), (255, 255, 255))
    canvas = cut_tiles(white, layout, TILE)[1:].reshape(2, 2, TILE, TILE, 3).swapaxes(1, 2).reshape(672, 672, 3)
    shown = np.flatnonzero(canvas.any(axis=(1, 2)))
    assert set(np.unique(canvas)) == {0, 255}
    assert (shown[0], 671 - shown[-1]) == (126, 126)
    odd = image_layout((401, 640), mode="anyres", grids=((2, 2),), tile=TILE, patches_per_side=SIDE)
    canvas = cut_tiles(Image.new("RGB", (640, 401), (255, 255, 255)), odd, TILE)[1:]
    rows = canvas.reshape(2, 2, TILE, TILE, 3).swapaxes(1, 2).reshape(672, 672, 3).any(axis=(1, 2))
    above, below = int(np.flatnonzero(rows)[0]), 671 - int(np.flatnonzero(rows)[-1])
    assert (above, below) == (125, 125 + (672 - resized_hw((401, 640), (672, 672))[0]) % 2)


@pytest.mark.parametrize("size", [(480, 640), (200, 300), (1000, 299), (301, 1000), (899, 1024)])
def test_newlines_end_every_row(size: tuple[int, int]) -> None:
    """Newlines are at 576 + (i + 1) * (width + 1) - 1 for row i, and nowhere else."""
    layout = _layout(size)
    rows = layout.kept_rows[1] - layout.kept_rows[0]
    cols = layout.kept_cols[1] - layout.kept_cols[0]
    expected = SIDE * SIDE + (np.arange(rows) + 1) * (cols + 1) - 1
    np.testing.assert_array_equal(np.flatnonzero(layout.token_sources() == NEWLINE), expected)


@pytest.mark.parametrize("size", [(20, 20), (31, 90), (90, 31), (56, 56), (45, 61), (28, 140), (1, 200), (200, 1)])
def test_token_sources_equal_the_unpadded_map(size: tuple[int, int]) -> None:
    """Feature rows equal those of merging tiles, unpadding and flattening in transformers."""
    side, tile = 4, 28
    layout = image_layout(size, mode="anyres", grids=AUTHORS_GRIDS, tile=tile, patches_per_side=side)
    assert layout.grid is not None
    rows, cols = layout.grid
    tiles = torch.arange(side * side, layout.num_tiles * side * side).view(rows, cols, side, side)
    merged = unpad_image(tiles.permute(0, 2, 1, 3).reshape(1, rows * side, cols * side), size)[0]
    with_newlines = torch.cat([merged, torch.full((merged.shape[0], 1), NEWLINE)], dim=1).flatten()
    expected = torch.cat([torch.arange(side * side), with_newlines])
    assert torch.equal(torch.from_numpy(layout.token_sources()), expected)
    assert len(expected) == layout.num_tokens


@pytest.mark.parametrize("size", [(10, 2000), (1, 5000), (1, 50)])
def test_thin_image_has_base_view_only(size: tuple[int, int]) -> None:
    """Without a remaining row, an image has the tokens of its base view and all tiles."""
    layout = _layout(size)
    if layout.kept_rows[0] == layout.kept_rows[1]:
        assert layout.num_tokens == SIDE * SIDE
    assert len(layout.token_sources()) == layout.num_tokens
    assert len(cut_tiles(_noise(size), layout, TILE)) == layout.num_tiles


def test_image_of_another_size_is_an_error() -> None:
    """An image whose size is not the layout's is an error with both sizes."""
    with pytest.raises(ModelError, match=r"10x20 .* 20x10"):
        cut_tiles(_noise((10, 20)), _layout((20, 10)), TILE)


def test_grids_from_pinpoints() -> None:
    """The published list in (height, width) gives the authors' grids for any tile."""
    for tile in (336, 384):
        pinpoints = [[rows * tile, cols * tile] for rows, cols in AUTHORS_GRIDS]
        assert grids_from_pinpoints(pinpoints, tile) == AUTHORS_GRIDS
        assert grids_from_pinpoints(pinpoints, [tile, tile]) == AUTHORS_GRIDS
    with pytest.raises(ModelError, match=r"image_size must be square, got \[336, 384\]"):
        grids_from_pinpoints([[336, 672]], [336, 384])


@pytest.mark.parametrize("pinpoint", [[672, 340], [168, 336], [0, 336], [336]])
def test_pinpoints_of_another_tower_are_an_error(pinpoint: list[int]) -> None:
    """The message has the pinpoint, the tile and the fix."""
    with pytest.raises(
        ModelError, match=r"image_grid_pinpoints contains .* tile of 336 pixels.*config\.json"
    ) as caught:
        grids_from_pinpoints([[672, 336], pinpoint], 336)
    assert str(pinpoint) in str(caught.value)


def test_sizes_and_grids_are_checked() -> None:
    """A size of zero pixels, and an empty list, duplicates and grids without tiles are errors."""
    with pytest.raises(ModelError, match="positive"):
        _layout((0, 10))
    for grids, message in [((), "at least one"), (((0, 1),), "at least 1"), (((1, 2), (1, 2)), "once")]:
        with pytest.raises(ModelError, match=message):
            check_grids(grids)  # type: ignore[arg-type]
