"""AnyRes geometry: from an image size to its tile grid and number of image tokens, and from an image to uint8 tiles.

The processor, the length table, the model and the planner all use this module, so that token counts from image headers
agree with the features. The rules are those of LLaVA-NeXT (`select_best_resolution`, `process_anyres_image`,
`unpad_image`) and OneVision (`anyres_max_N`) as transformers implements them. Sizes are (height, width).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from llava_next.config import Grid, ImageMode, ModelError, Rounding

NEWLINE = -1
"""Entry of `ImageLayout.token_sources` for a token that is the newline vector."""

SizeHW = tuple[int, int]
Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; bottom and right are exclusive."""


@dataclass(frozen=True)
class ImageLayout:
    """Tiles and tokens of one image.

    With AnyRes the tiles are the base view, followed by the tiles of the grid row by row. The tokens are the patches of
    the base view row by row, followed by the unpadded part of the grid's feature map row by row, with a newline after
    each row; a map that is too large is reduced by bilinear interpolation first. In the other modes there is one view,
    and its tokens are its patches, with a newline at the end if the rule says so.

    Attributes:
        size_hw: of the image in pixels.
        mode: how it becomes views.
        grid: of AnyRes; None for one view.
        patches_per_side: patches along a side of a tile.
        kept_rows, kept_cols: half-open ranges of the grid's feature map that are not padding, in patches.
        reduced_hw: size of the reduced feature map in tokens; None if it is not reduced.
        closing_newline: whether a newline follows the patches of one view.
    """

    size_hw: SizeHW
    mode: ImageMode
    grid: Grid | None
    patches_per_side: int
    kept_rows: tuple[int, int] = (0, 0)
    kept_cols: tuple[int, int] = (0, 0)
    reduced_hw: SizeHW | None = None
    closing_newline: bool = False

    @property
    def num_tiles(self) -> int:
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]

    @property
    def kept_hw(self) -> SizeHW:
        """Size of the unpadded part of the grid's feature map, in patches."""
        return self.kept_rows[1] - self.kept_rows[0], self.kept_cols[1] - self.kept_cols[0]

    @property
    def num_reduced(self) -> int:
        """Number of tokens of the reduced feature map, without newlines; 0 if it is not reduced."""
        return 0 if self.reduced_hw is None else self.reduced_hw[0] * self.reduced_hw[1]

    @property
    def num_tokens(self) -> int:
        base = self.patches_per_side**2
        if self.grid is None:
            return base + self.closing_newline
        rows, cols = self.reduced_hw or self.kept_hw
        return base + rows * (cols + 1)

    def kept_features(self) -> np.ndarray:
        """The rows of the image's tile features that are the unpadded part of the grid's feature map.

        Returns:
            int64 [rows, columns] of the map: tile * patches + patch.
        """
        assert self.grid is not None, "one view has no grid"
        side = self.patches_per_side
        rows = np.arange(*self.kept_rows, dtype=np.int64)[:, None]
        cols = np.arange(*self.kept_cols, dtype=np.int64)[None, :]
        tile = 1 + (rows // side) * self.grid[1] + cols // side
        patch = (rows % side) * side + cols % side
        return tile * side * side + patch

    def token_sources(self) -> np.ndarray:
        """The source of each image token.

        Returns:
            int64 [num_tokens]: the row of the image's tile features, tile * patches + patch; or NEWLINE; or
            num_tiles * patches + i for the i-th token of the reduced feature map (`bilinear.py` has its values).
        """
        patches = self.patches_per_side**2
        base = np.arange(patches, dtype=np.int64)
        if self.grid is None:
            return np.append(base, NEWLINE) if self.closing_newline else base
        if self.reduced_hw is None:
            features = self.kept_features()
        else:
            features = self.num_tiles * patches + np.arange(self.num_reduced, dtype=np.int64).reshape(self.reduced_hw)
        newline = np.full((features.shape[0], 1), NEWLINE, dtype=np.int64)
        return np.concatenate([base, np.concatenate([features, newline], axis=1).ravel()])


def grids_from_pinpoints(pinpoints_hw: Sequence[Sequence[int]], tile: int | Sequence[int]) -> tuple[Grid, ...]:
    """Converts `image_grid_pinpoints`, in pixels, to grids in tiles.

    Args:
        pinpoints_hw: (height, width) each.
        tile: the tower's image_size in pixels, a number or one for each side.

    Raises:
        ModelError: a side is not a multiple of the tile, or the tile is not square.
    """
    if not isinstance(tile, int):
        if len(set(tile)) != 1:
            raise ModelError(f"the tower's image_size must be square, got {list(tile)}; use a tower with square images")
        tile = tile[0]
    for pinpoint in pinpoints_hw:
        if len(pinpoint) != 2 or any(side < tile or side % tile for side in pinpoint):
            raise ModelError(
                f"image_grid_pinpoints contains {list(pinpoint)}, but both sides must be multiples of the tower's tile "
                f"of {tile} pixels; correct the list in config.json, or use the tower that it was made for"
            )
    return tuple((height // tile, width // tile) for height, width in pinpoints_hw)


def select_grid(size_hw: SizeHW, grids: tuple[Grid, ...], tile: int) -> Grid:
    """The grid with the most effective pixels of the image, and among equals the least waste; ties go to the first.

    This is `select_best_resolution` (LLaVA, `mm_utils.py`; transformers). It uses the same floating-point arithmetic:
    exact arithmetic would choose another grid for about one size in ten thousand, and inference must use the grid of
    training.
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
    assert best is not None, "check_grids requires at least one grid"
    return best


def unpad_range(
    size_hw: SizeHW, map_hw: SizeHW, rounding: Rounding = "exact"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the grid's feature map that are not padding, as half-open ranges (`unpad_image`).

    Both sides lose the floor of half the padding, so that one more line remains if the padding is odd, as in the
    training of the released weights.

    Args:
        size_hw: of the image in pixels.
        map_hw: of the feature map in patches.
        rounding: see `Rounding`.
    """
    (height, width), (map_h, map_w) = size_hw, map_hw
    if rounding == "authors":  # the floating-point product can be slightly below an integer
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


def reduced_hw(map_hw: SizeHW, max_views: int, patches_per_side: int) -> SizeHW | None:
    """Size of the reduced feature map of anyres_max_N; None if the map is not reduced.

    A map with more than 1.21 times the places of N views is reduced to at most N views. The floating-point arithmetic
    is that of the authors (`prepare_inputs_labels_for_multimodal`) and transformers (`pack_image_features`).

    Args:
        map_hw: of the unpadded feature map in patches.
        max_views: N.
        patches_per_side: patches along a side of a tile.
    """
    height, width = map_hw
    ratio = math.sqrt(height * width / (max_views * patches_per_side**2))
    if ratio <= 1.1:
        return None
    # A side has at least one token; for such thin maps, which no published grids have, transformers raises an error.
    return max(1, int(height // ratio)), max(1, int(width // ratio))


def image_layout(
    size_hw: SizeHW,
    *,
    mode: ImageMode,
    grids: tuple[Grid, ...],
    tile: int,
    patches_per_side: int,
    rounding: Rounding = "exact",
    max_views: int | None = None,
    closing_newline: bool = False,
) -> ImageLayout:
    """The layout of an image of this size. No pixels are needed.

    Args:
        size_hw: of the image in pixels.
        mode: how the image becomes views.
        grids: of mode anyres.
        tile: side of a tile in pixels.
        patches_per_side: patches along a side of a tile.
        rounding: see `Rounding`.
        max_views, closing_newline: see `ViewRule`.

    Raises:
        ModelError: a side is not positive.
    """
    if min(size_hw) < 1:
        raise ModelError(f"an image's height and width must be positive, got {size_hw}")
    if mode != "anyres":
        return ImageLayout(size_hw, mode, None, patches_per_side, closing_newline=closing_newline)
    grid = select_grid(size_hw, grids, tile)
    kept_rows, kept_cols = unpad_range(size_hw, (grid[0] * patches_per_side, grid[1] * patches_per_side), rounding)
    layout = ImageLayout(size_hw, mode, grid, patches_per_side, kept_rows, kept_cols)
    if max_views is None:
        return layout
    return replace(layout, reduced_hw=reduced_hw(layout.kept_hw, max_views, patches_per_side))


def resized_hw(size_hw: SizeHW, canvas_hw: SizeHW) -> SizeHW:
    """Size of the image on the canvas of its grid: one side fills the canvas, the other is rounded up.

    This uses `ceil` of a floating-point product, as the authors and transformers do, so that pixels are identical.
    """
    (height, width), (canvas_h, canvas_w) = size_hw, canvas_hw
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * scale_h), canvas_w)


def box_on_canvas(size_hw: SizeHW, canvas_hw: SizeHW) -> Box:
    """The box of the image on the canvas of its grid; the rest is padding."""
    height, width = resized_hw(size_hw, canvas_hw)
    top, left = (canvas_hw[0] - height) // 2, (canvas_hw[1] - width) // 2
    return top, left, top + height, left + width


def box_in_square(size_hw: SizeHW) -> Box:
    """The box of the image in a square of its longer side (mode pad). The bottom or right side gets an odd pixel
    of padding."""
    height, width = size_hw
    side = max(size_hw)
    top, left = (side - height) // 2, (side - width) // 2
    return top, left, top + height, left + width


def center_box(size_hw: SizeHW, tile: int) -> tuple[SizeHW, Box]:
    """Size of the image after its short side is resized to `tile`, and the box of the center crop (mode crop)."""
    height, width = size_hw
    if height <= width:
        new_h, new_w = tile, int(tile * width / height)
    else:
        new_h, new_w = int(tile * height / width), tile
    top, left = (new_h - tile) // 2, (new_w - tile) // 2
    return (new_h, new_w), (top, left, top + tile, left + tile)


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image to RGB, applies its EXIF orientation, and composites transparent pixels onto white.

    Raises:
        OSError: Pillow cannot read the bytes as an image.
    """
    image: Image.Image = Image.open(io.BytesIO(encoded))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        grey = np.asarray(image)
        pixels = _to_uint8(grey)
        if "transparency" in image.info:  # the value of transparent pixels; Pillow would clip the others at 255
            pixels[grey == image.info["transparency"]] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # `convert` would copy an RGB image, which takes two thirds of the time for a large scan
    return image


def _to_uint8(grey: np.ndarray) -> np.ndarray:
    """Scales gray values of any depth to uint8. Pillow's `convert` clips at 255, which turns 16-bit scans white.

    The files do not store the value of white. It is 1 for fractions, else the smallest of 255, 65535 and 2³² - 1 that
    no value exceeds.
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
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cuts an RGB image into its views.

    Args:
        image: the decoded image.
        layout: of the image.
        tile: side of a tile in pixels.
        pad_colour: of the square of mode pad; the other modes do not use it.
        out: a contiguous uint8 array for the result; None allocates one.

    Returns:
        uint8 [num_tiles, tile, tile, 3]: the base view, then the grid's tiles row by row.

    Raises:
        ModelError: the size of the image is not the layout's.
    """
    if (image.height, image.width) != layout.size_hw:
        raise ModelError(
            f"the image is {image.height}x{image.width} (height x width), but its tokens were counted for "
            f"{layout.size_hw[0]}x{layout.size_hw[1]}; prepare its source again"
        )
    if out is None:
        out = np.empty((layout.num_tiles, tile, tile, 3), dtype=np.uint8)
    if layout.mode == "crop":
        out[0] = np.asarray(_center_crop(image, tile))
        return out
    if layout.mode == "pad":
        assert pad_colour is not None, "the processor has the colour of mode pad"
        out[0] = np.asarray(_padded_square(image, tile, pad_colour))
        return out
    out[0] = np.asarray(image.resize((tile, tile), Image.Resampling.BICUBIC))
    if layout.grid is None:
        return out
    rows, cols = layout.grid
    top, left, bottom, right = box_on_canvas(layout.size_hw, (rows * tile, cols * tile))
    resized = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    _paste_on_tiles(resized, (top, left), out[1:].reshape(rows, cols, tile, tile, 3))
    return out


def _paste_on_tiles(pixels: np.ndarray, corner: tuple[int, int], tiles: np.ndarray) -> None:
    """Pastes pixels on a black canvas that is stored tile by tile.

    Args:
        pixels: uint8 [height, width, 3].
        corner: (top, left) of the pixels on the canvas.
        tiles: uint8 [rows, cols, tile, tile, 3], the canvas, which is written.
    """
    rows, cols, tile = tiles.shape[:3]
    height, width = pixels.shape[:2]
    offset_y, offset_x = corner
    if (height, width) != (rows * tile, cols * tile):
        tiles[:] = 0
    for row, col in np.ndindex(rows, cols):
        top, left = row * tile - offset_y, col * tile - offset_x  # of this tile, relative to the pixels
        part = pixels[max(top, 0) : max(top + tile, 0), max(left, 0) : max(left + tile, 0)]
        at_y, at_x = max(-top, 0), max(-left, 0)
        tiles[row, col, at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part


def _center_crop(image: Image.Image, tile: int) -> Image.Image:
    """Resizes the short side to `tile` and crops the center, as CLIP's processor does in LLaVA-1.5's first stage."""
    (new_h, new_w), (top, left, bottom, right) = center_box((image.height, image.width), tile)
    return image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop((left, top, right, bottom))


_BAND_ROWS = 1024


def _padded_square(image: Image.Image, tile: int, color: tuple[int, int, int]) -> Image.Image:
    """Pads the image to a square and resizes it to `tile`, as the authors' `expand2square` and CLIP's processor do in
    LLaVA-1.5's second stage.

    Pillow resizes along rows, rounds to 8 bits, and resizes along columns. Processing bands of rows gives identical
    pixels without allocating the square, which for a long image has a hundred times its pixels.
    """
    side = max(image.size)
    top, left, _, _ = box_in_square((image.height, image.width))
    resized_rows = Image.new("RGB", (tile, side))
    for first in range(0, side, _BAND_ROWS):
        num_rows = min(_BAND_ROWS, side - first)
        band = Image.new("RGB", (side, num_rows), color)
        band.paste(image, (left, top - first))
        resized_rows.paste(band.resize((tile, num_rows), Image.Resampling.BICUBIC), (0, first))
    return resized_rows.resize((tile, tile), Image.Resampling.BICUBIC)
