"""A picture as the vision tower sees it, as inline SVG: its canvas with what is cut, padded and dropped, and its tiles.

Owns how that looks. Every number comes from `llava_next.inputs.anyres`; the pixels are the sample's own tiles.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_next.config import ProcessorConfig
from llava_next.inputs.anyres import Box, ImageLayout, box_in_square, box_on_canvas, centre_box, decode

_PIXELS_OF_A_PAGE = 24_000_000
_LEAST_SIDE, _MOST_SIDE = 160, 1344
_JPEG_QUALITY = 85
_VIEW_WIDTH, _MOST_WIDTH, _MOST_HEIGHT = 220, 440, 480
"""In CSS pixels: canvas, one view and tiles fit side by side; tiny pictures are enlarged, large ones reduced."""


def side_for(num_pictures: int) -> int:
    """The longest side of an embedded picture, so that a page of many pictures stays a file that opens."""
    return int(np.clip((_PIXELS_OF_A_PAGE / max(1, num_pictures)) ** 0.5, _LEAST_SIDE, _MOST_SIDE))


def draw_picture(
    image: ImageLayout, tiles: np.ndarray, encoded: bytes, config: ProcessorConfig, *, name: str, side: int
) -> str:
    """One picture as HTML.

    Args:
        image: its layout.
        tiles: uint8 [num_tiles, S, S, 3], its views.
        encoded: its bytes; read where the views do not show all of it.
        config: of the processor that cut it.
        name: unique in the page.
        side: the longest side of what is embedded, in pixels.
    """
    canvas = canvas_of(image, tiles, encoded, config)
    parts = [_figure(canvas.svg(name, side), "what is cut, padded and dropped")]
    if image.grid is None:
        parts.append(_figure(_image_svg(tiles[0], f"{name}v", side, _VIEW_WIDTH), "the view"))
        return "".join(parts)
    parts.append(_figure(_image_svg(tiles[0], f"{name}v", side, _VIEW_WIDTH), "base view"))
    rows, cols = image.grid
    size = tiles.shape[1]
    cells = [
        f'<svg viewBox="{col * size} {row * size} {size} {size}"><title>tile {row * cols + col + 1}: row {row + 1}, '
        f'column {col + 1}</title><use href="#{name}"/></svg>'
        for row in range(rows)
        for col in range(cols)
    ]
    width = _shown_width(cols * size, rows * size)
    grid = f'<div class="tiles" style="grid-template-columns:repeat({cols},1fr);width:{width}px">{"".join(cells)}</div>'
    parts.append(_figure(grid, f"{rows * cols} tile{'s' if rows * cols > 1 else ''}"))
    return "".join(parts)


def describe_picture(image: ImageLayout) -> str:
    """Size, grid and where its tokens come from, in words."""
    height, width = image.size_hw
    base = image.patches_per_side**2
    if image.grid is None:
        return f"{height} × {width} pixels (height × width), one view: {base} image tokens"
    rows, cols = (stop - start for start, stop in (image.kept_rows, image.kept_cols))
    return (
        f"{height} × {width} pixels (height × width), grid {image.grid[0]} × {image.grid[1]} (rows × columns), "
        f"{image.num_tiles} tiles: {image.num_tokens:,} image tokens = {base} of the base view + {rows} × {cols} kept "
        f"of {image.grid[0] * image.patches_per_side} × {image.grid[1] * image.patches_per_side} + {rows} newlines"
    )


@dataclass(frozen=True)
class Canvas:
    """What the views are cut from: uint8 pixels, where the picture lies and what is kept of it, and the cuts."""

    pixels: np.ndarray
    picture: Box
    kept: Box
    rows: int = 1
    cols: int = 1

    def svg(self, name: str, side: int) -> str:
        """It with what is dropped shaded, the picture's edge and the cuts drawn over."""
        height, width = self.pixels.shape[:2]
        top, left, bottom, right = self.kept
        outside = f"M0 0H{width}V{height}H0Z M{left} {top}V{bottom}H{right}V{top}Z"
        cuts = "".join(f"M{width * col // self.cols} 0V{height}" for col in range(1, self.cols))
        cuts += "".join(f"M0 {height * row // self.rows}H{width}" for row in range(1, self.rows))
        top, left, bottom, right = self.picture
        drawn = ""
        if self.kept != (0, 0, height, width):
            drawn += f'<path class="dropped" d="{outside}"><title>dropped</title></path>'
        if self.picture != (0, 0, height, width):
            drawn += f'<path class="edge" d="M{left} {top}H{right}V{bottom}H{left}Z"/>'
        if cuts:
            drawn += f'<path class="cuts back" d="{cuts}"/><path class="cuts" d="{cuts}"/>'
        return _image_svg(self.pixels, name, side, _shown_width(width, height), f'<g class="overlay">{drawn}</g>')


def canvas_of(image: ImageLayout, tiles: np.ndarray, encoded: bytes, config: ProcessorConfig) -> Canvas:
    """What the views of a picture are cut from; arguments as for `draw_picture`."""
    size = config.tile
    if image.grid is not None:
        rows, cols = image.grid
        pixels = tiles[1:].reshape(rows, cols, size, size, 3).swapaxes(1, 2).reshape(rows * size, cols * size, 3)
        top, bottom = (_edge(line, image.patches_per_side, size) for line in image.kept_rows)
        left, right = (_edge(line, image.patches_per_side, size) for line in image.kept_cols)
        picture = box_on_canvas(image.size_hw, (rows * size, cols * size))
        return Canvas(pixels, picture, (top, left, bottom, right), rows, cols)
    if config.image_mode == "pad":
        top, left, bottom, right = (line * size // max(image.size_hw) for line in box_in_square(image.size_hw))
        return Canvas(tiles[0], (top, left, bottom, right), (0, 0, size, size))
    if config.image_mode == "squash":
        return Canvas(tiles[0], (0, 0, size, size), (0, 0, size, size))
    (height, width), kept = centre_box(image.size_hw, size)
    pixels = np.asarray(decode(encoded).resize((width, height), Image.Resampling.BICUBIC))
    return Canvas(pixels, (0, 0, height, width), kept)


def _edge(line: int, patches_per_side: int, size: int) -> int:
    """The pixel of a line between patches of the merged map; a tower may leave a strip of each tile unseen."""
    return line // patches_per_side * size + line % patches_per_side * (size // patches_per_side)


def _image_svg(pixels: np.ndarray, name: str, side: int, shown_width: int, drawn: str = "") -> str:
    height, width = pixels.shape[:2]
    return (
        f'<svg viewBox="0 0 {width} {height}" style="width:{shown_width}px">'
        f'<image id="{name}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{_data_uri(pixels, side)}"/>{drawn}</svg>'
    )


def _shown_width(width: int, height: int) -> int:
    return max(40, min(int(np.clip(width, _VIEW_WIDTH, _MOST_WIDTH)), _MOST_HEIGHT * width // height))


def _data_uri(pixels: np.ndarray, side: int) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"
