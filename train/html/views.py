"""An image as the vision tower sees it: the canvas that its views are cut from, and what is cut, padded and dropped.

Every number comes from `llava_next.inputs.anyres`; the pixels are those of the sample's own tiles.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_next.inputs.anyres import Box, ImageLayout, box_in_square, box_on_canvas, center_box, decode

_PIXELS_PER_PAGE = 24_000_000
_MIN_SIDE, _MAX_SIDE = 160, 1344
_MIN_WIDTH, _MAX_WIDTH, _MAX_HEIGHT = 220, 440, 480
"""In CSS pixels: canvas, one view and tiles fit side by side; small images are enlarged, large ones reduced."""


def side_for(num_images: int) -> int:
    """The longest side of an embedded image, so that a page of many images remains a file that opens."""
    return int(np.clip((_PIXELS_PER_PAGE / max(1, num_images)) ** 0.5, _MIN_SIDE, _MAX_SIDE))


@dataclass(frozen=True)
class Canvas:
    """What the views are cut from: uint8 pixels [H, W, 3], the box of the image, the box that is kept, and the grid of
    tiles, (1, 1) where there is one view."""

    pixels: np.ndarray
    image: Box
    kept: Box
    grid: tuple[int, int] = (1, 1)

    @property
    def css_width(self) -> int:
        """Its width on the page, in CSS pixels."""
        height, width = self.pixels.shape[:2]
        return max(40, min(int(np.clip(width, _MIN_WIDTH, _MAX_WIDTH)), _MAX_HEIGHT * width // height))


def canvas_of(image: ImageLayout, tiles: np.ndarray, encoded: bytes) -> Canvas:
    """What the views of an image are cut from.

    Args:
        image: its layout.
        tiles: uint8 [num_tiles, S, S, 3], its views.
        encoded: its bytes; read where the views do not show all of it.
    """
    size = tiles.shape[1]
    if image.grid is not None:
        rows, cols = image.grid
        pixels = tiles[1:].reshape(rows, cols, size, size, 3).swapaxes(1, 2).reshape(rows * size, cols * size, 3)
        # A tower may leave a strip of each tile unseen, so a line between patches is not at a multiple of their size.
        per_side = image.patches_per_side
        (top, bottom), (left, right) = (
            [line // per_side * size + line % per_side * (size // per_side) for line in kept]
            for kept in (image.kept_rows, image.kept_cols)
        )
        return Canvas(
            pixels, box_on_canvas(image.size_hw, (rows * size, cols * size)), (top, left, bottom, right), image.grid
        )
    if image.mode == "pad":
        top, left, bottom, right = (line * size // max(image.size_hw) for line in box_in_square(image.size_hw))
        return Canvas(tiles[0], (top, left, bottom, right), (0, 0, size, size))
    if image.mode == "squash":
        return Canvas(tiles[0], (0, 0, size, size), (0, 0, size, size))
    (height, width), kept = center_box(image.size_hw, size)
    pixels = np.asarray(decode(encoded).resize((width, height), Image.Resampling.BICUBIC))
    return Canvas(pixels, (0, 0, height, width), kept)
