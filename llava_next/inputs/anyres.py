"""Geometry of pictures: image size → tile grid → kept map → number of image tokens; and a picture → uint8 tiles.

The one owner of this arithmetic: the processor, the length table, the model and the planner all ask it, so that a
count made from a file header is the count of the features. Sizes are (height, width). Knows nothing of text.

The rules are those of LLaVA-NeXT (`select_best_resolution`, `process_anyres_image`, `unpad_image`) as transformers
computes them: the grid in its floats, unpadding in the exact integers that its rounding amounts to. `ImageLayout`
tells the order of an image's tokens.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from llava_next.config import Grid, ImageMode, ModelError, Rounding

NEWLINE = -1
"""In `ImageLayout.token_sources`: this token is the newline vector and no feature of a tile."""

SizeHW = tuple[int, int]
Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels; bottom and right are just outside."""


@dataclass(frozen=True)
class ImageLayout:
    """How one picture becomes tiles and tokens.

    Tiles: the base view first, then the grid's tiles row by row. Tokens: the base view's patches row by row, then
    the kept part of the merged map row by row, one newline after each of its rows. A single view (`grid` None) has
    only the base view, and no newline.

    `kept_rows` and `kept_cols` are half-open ranges of the merged map, in patches.
    """

    size_hw: SizeHW
    grid: Grid | None
    patches_per_side: int
    kept_rows: tuple[int, int] = (0, 0)
    kept_cols: tuple[int, int] = (0, 0)

    @property
    def num_tiles(self) -> int:
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        base = self.patches_per_side**2
        if self.grid is None:
            return base
        rows = self.kept_rows[1] - self.kept_rows[0]
        cols = self.kept_cols[1] - self.kept_cols[0]
        return base + rows * (cols + 1)

    def token_sources(self) -> np.ndarray:
        """Where each image token comes from: int64 [num_tokens], a row of this picture's tile features
        (tile * patches + patch), or NEWLINE."""
        side = self.patches_per_side
        base = np.arange(side * side, dtype=np.int64)
        if self.grid is None:
            return base
        rows = np.arange(*self.kept_rows, dtype=np.int64)[:, None]
        cols = np.arange(*self.kept_cols, dtype=np.int64)[None, :]
        tile = 1 + (rows // side) * self.grid[1] + cols // side
        patch = (rows % side) * side + cols % side
        kept = tile * side * side + patch
        newline = np.full((kept.shape[0], 1), NEWLINE, dtype=np.int64)
        return np.concatenate([base, np.concatenate([kept, newline], axis=1).ravel()])


def grids_of_pinpoints(pinpoints_hw: Sequence[Sequence[int]], tile: int | Sequence[int]) -> tuple[Grid, ...]:
    """Grids in tiles from the pixels that a configuration on disk lists, (height, width) each.

    Args:
        tile: side of the tower's images, as its config has it: a number, or one for each side.

    Raises:
        ModelError: a side is no multiple of the tile, or the tile is not square; names the rule and the way out.
    """
    if not isinstance(tile, int):
        if len(set(tile)) != 1:
            raise ModelError(f"the tower's image_size is {list(tile)}, and tiles are square; give a square tower")
        tile = tile[0]
    for pinpoint in pinpoints_hw:
        if len(pinpoint) != 2 or any(side < tile or side % tile for side in pinpoint):
            raise ModelError(
                f"image_grid_pinpoints holds {list(pinpoint)}, and both of its sides must be multiples of the tower's "
                f"tile of {tile} pixels: the list was made for another tower; correct it in config.json, or give the "
                "model its own tower"
            )
    return tuple((height // tile, width // tile) for height, width in pinpoints_hw)


def select_grid(size_hw: SizeHW, grids: tuple[Grid, ...], tile: int) -> Grid:
    """The grid that shows most of the picture's own pixels, and among equals wastes least; ties go to the first.

    `select_best_resolution` (LLaVA, `mm_utils.py`; transformers), in its floating point on purpose: where the
    product falls just below a whole number, int() takes a pixel away and about one size in ten thousand goes to
    another grid than exact arithmetic would choose. What is served must be cut as what was trained.
    """
    height, width = size_hw
    best: Grid | None = None
    best_effective, best_waste = 0, math.inf
    for rows, cols in grids:
        canvas_h, canvas_w = rows * tile, cols * tile
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), height * width)
        waste = canvas_h * canvas_w - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (rows, cols), effective, waste
    assert best is not None, "grids are checked when the configuration is read"
    return best


def kept_range(
    size_hw: SizeHW, map_hw: SizeHW, rounding: Rounding = "exact"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the merged map that show picture and not padding (`unpad_image`).

    The same floor is cut from both sides, so one line more is kept when the padding is odd: released weights were
    trained with it.
    """
    (height, width), (map_h, map_w) = size_hw, map_hw
    if rounding == "authors":  # the product of floats may be a hair below the whole number
        if width / height > map_w / map_h:
            padding = (map_h - int(height * (map_w / width))) // 2
            return (padding, map_h - padding), (0, map_w)
        padding = (map_w - int(width * (map_h / height))) // 2
        return (0, map_h), (padding, map_w - padding)
    if width * map_h > map_w * height:
        padding = (map_h - height * map_w // width) // 2
        return (padding, map_h - padding), (0, map_w)
    padding = (map_w - width * map_h // height) // 2
    return (0, map_h), (padding, map_w - padding)


def image_layout(
    size_hw: SizeHW,
    *,
    mode: ImageMode,
    grids: tuple[Grid, ...],
    tile: int,
    patches_per_side: int,
    rounding: Rounding = "exact",
) -> ImageLayout:
    """The layout of a picture of this size; from the header alone, no pixel is read.

    Raises:
        ModelError: a side is not positive.
    """
    if min(size_hw) < 1:
        raise ModelError(f"a picture's height and width must be positive, got {size_hw}")
    if mode != "anyres":
        return ImageLayout(size_hw, None, patches_per_side)
    grid = select_grid(size_hw, grids, tile)
    kept_rows, kept_cols = kept_range(size_hw, (grid[0] * patches_per_side, grid[1] * patches_per_side), rounding)
    return ImageLayout(size_hw, grid, patches_per_side, kept_rows, kept_cols)


def resized_hw(size_hw: SizeHW, canvas_hw: SizeHW) -> SizeHW:
    """Size of the picture on its canvas: one side filled, the other rounded up.

    In floating point on purpose: the authors and transformers both take `ceil` of a float product, and equal pixels
    need an equal size.
    """
    (height, width), (canvas_h, canvas_w) = size_hw, canvas_hw
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * scale_h), canvas_w)


def box_on_canvas(size_hw: SizeHW, canvas_hw: SizeHW) -> Box:
    """Where the picture lies on the canvas of its grid; what is around it is padding."""
    height, width = resized_hw(size_hw, canvas_hw)
    top, left = (canvas_hw[0] - height) // 2, (canvas_hw[1] - width) // 2
    return top, left, top + height, left + width


def box_in_square(size_hw: SizeHW) -> Box:
    """Where the picture lies in the square of its longer side (image mode pad); an odd pixel of padding lies at the
    bottom or right."""
    height, width = size_hw
    side = max(size_hw)
    top, left = (side - height) // 2, (side - width) // 2
    return top, left, top + height, left + width


def centre_box(size_hw: SizeHW, tile: int) -> tuple[SizeHW, Box]:
    """The picture's size when its short side is `tile`, and the square that is seen of it (image mode square)."""
    height, width = size_hw
    if height <= width:
        new_h, new_w = tile, int(tile * width / height)
    else:
        new_h, new_w = int(tile * height / width), tile
    top, left = (new_h - tile) // 2, (new_w - tile) // 2
    return (new_h, new_w), (top, left, top + tile, left + tile)


def decode(picture: bytes) -> Image.Image:
    """RGB pixels of an encoded picture, turned as its EXIF orientation says; transparency lies on white.

    Raises:
        OSError: the bytes are no picture that Pillow reads.
    """
    image: Image.Image = Image.open(io.BytesIO(picture))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        grey = np.asarray(image)
        pixels = _to_8_bits(grey)
        if "transparency" in image.info:  # one value that stands for clear; Pillow would clip the others at 255
            pixels[grey == image.info["transparency"]] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # `convert` would copy what is RGB already: two thirds of the time of a large scan
    return image


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values of any depth as uint8. Pillow clips them at 255 when it converts, which turns 16-bit scans white.

    What white is cannot be read from a file: 1 for fractions, else the least of 255, 65535 and 2³² - 1 that no
    value exceeds.
    """
    values = np.nan_to_num(grey.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    largest = float(values.max(initial=0.0))
    if np.issubdtype(grey.dtype, np.floating) and largest <= 1:
        white = 1.0
    elif grey.dtype.itemsize == 2 or largest > 255:
        white = 65535.0 if largest <= 65535 else 2.0**32 - 1
    else:
        white = 255.0
    return (values * (255.0 / white)).astype(np.uint8)


def cut_tiles(
    image: Image.Image,
    layout: ImageLayout,
    tile: int,
    *,
    pad_colour: tuple[int, int, int] | None = None,
    squash: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The views of one RGB picture: uint8 [num_tiles, tile, tile, 3], base view first, then row by row.

    A single view shows the whole picture on a square of `pad_colour` (image mode pad), or without one its centre
    (square).

    Args:
        squash: a single view is the whole image resized to a square (image mode squash), as the base view is.
        out: where they are written, if given: a contiguous array of that shape.

    Raises:
        ModelError: the picture's size is not the one the layout was made for.
    """
    if (image.height, image.width) != layout.size_hw:
        raise ModelError(
            f"the picture is {image.height}x{image.width} but was counted as {layout.size_hw[0]}x"
            f"{layout.size_hw[1]} (height x width): its store was made from other bytes, prepare it again"
        )
    if out is None:
        out = np.empty((layout.num_tiles, tile, tile, 3), dtype=np.uint8)
    if layout.grid is None and not squash:
        view = _centre_crop(image, tile) if pad_colour is None else _padded_square(image, tile, pad_colour)
        out[0] = np.asarray(view)
        return out
    out[0] = np.asarray(image.resize((tile, tile), Image.Resampling.BICUBIC))
    if layout.grid is None:
        return out
    rows, cols = layout.grid
    top, left, bottom, right = box_on_canvas(layout.size_hw, (rows * tile, cols * tile))
    shown = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    _spread(shown, (top, left), out[1:].reshape(rows, cols, tile, tile, 3))
    return out


def _spread(shown: np.ndarray, corner: tuple[int, int], tiles: np.ndarray) -> None:
    """Writes a picture to a place on a black canvas that lies there tile by tile: [rows, cols, tile, tile, 3]."""
    rows, cols, tile = tiles.shape[:3]
    height, width = shown.shape[:2]
    above, before = corner
    if (height, width) != (rows * tile, cols * tile):
        tiles[:] = 0
    for row, col in np.ndindex(rows, cols):
        top, left = row * tile - above, col * tile - before  # of this tile, in the picture
        part = shown[max(top, 0) : max(top + tile, 0), max(left, 0) : max(left + tile, 0)]
        at_y, at_x = max(-top, 0), max(-left, 0)
        tiles[row, col, at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part


def _centre_crop(image: Image.Image, tile: int) -> Image.Image:
    """Short side to `tile`, then the centre square: what the CLIP processor does for LLaVA-1.5's first stage."""
    (new_h, new_w), (top, left, bottom, right) = centre_box((image.height, image.width), tile)
    return image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop((left, top, right, bottom))


_BAND_ROWS = 1024


def _padded_square(image: Image.Image, tile: int, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square as long as its longer side, resized to `tile`: the authors' `expand2square`
    and the CLIP processor, for LLaVA-1.5's second stage.

    Pillow resizes along the rows first, then along the columns, with 8 bits in between. Done in bands of rows that is
    the same bit for bit, and the square, a hundred times the pixels of a long picture, is never held as a whole.
    """
    side = max(image.size)
    top, left, _, _ = box_in_square((image.height, image.width))
    narrowed = Image.new("RGB", (tile, side))
    for first in range(0, side, _BAND_ROWS):
        num_rows = min(_BAND_ROWS, side - first)
        band = Image.new("RGB", (side, num_rows), colour)
        band.paste(image, (left, top - first))
        narrowed.paste(band.resize((tile, num_rows), Image.Resampling.BICUBIC), (0, first))
    return narrowed.resize((tile, tile), Image.Resampling.BICUBIC)
