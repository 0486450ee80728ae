"""Grids, kept maps, token counts, token order and tile pixels against the authors' own, over 20,500 sizes.

The fixtures are made by ./scripts/oracles.sh, which runs the authors' code in a separate environment.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from llava_next.config import AUTHORS_GRIDS, ImageMode
from llava_next.inputs.anyres import ImageLayout, SizeHW, cut_tiles, decode, image_layout
from tests.oracles.digests import BLOCK, block_digests, bytes_digest, numbers_digest, size_line
from tests.oracles.image_files import image_files
from tests.oracles.inputs import GENERATOR, IMAGES_HW, SQUASHED_HW, image_bytes, inputs_sha256, sizes_hw

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"
HINT = "make the fixtures again: ./scripts/oracles.sh"
TILE, SIDE = 336, 24
MEAN_COLOUR = (122, 116, 104)
"""int(255 * mean) of CLIP: what the authors pad with."""
SIGLIP_TILE = 384
SIGLIP_YAML = Path(__file__).parents[2] / "configs" / "model" / "vision_tower" / "siglip_so400m_384.yaml"

Layout = Callable[[SizeHW], ImageLayout]


def _fixture(name: str, inputs: Any) -> dict[str, Any]:
    fixture: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(inputs)}, HINT
    return fixture


def _ours(size_hw: SizeHW, mode: ImageMode = "anyres") -> ImageLayout:
    return image_layout(size_hw, mode=mode, grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=SIDE)


def _with_authors_rounding(size_hw: SizeHW) -> ImageLayout:
    return image_layout(
        size_hw, mode="anyres", grids=AUTHORS_GRIDS, tile=TILE, patches_per_side=SIDE, rounding="authors"
    )


def _line(layout: ImageLayout) -> str:
    assert layout.grid is not None
    rows, cols = layout.kept_rows, layout.kept_cols
    kept_hw = (rows[1] - rows[0], cols[1] - cols[0])
    first = rows[0] * layout.grid[1] * SIDE + cols[0] if min(kept_hw) else -1
    return size_line(layout.size_hw, layout.grid, kept_hw, first, layout.num_tokens)


def _listed(fixture: str, rule: str) -> tuple[int, int]:
    """How many pictures of how many differences.md names under a rule."""
    text = (FOLDER / "differences.md").read_text(encoding="utf-8")
    row = re.search(rf"`{fixture}` \| `{rule}` \| (\d+) of (\d+) ", text)
    assert row is not None, (fixture, rule)
    return int(row[1]), int(row[2])


def _listed_sizes() -> set[tuple[int, int]]:
    """The sizes that differences.md names under authors_rounding, as (height, width)."""
    text = (FOLDER / "differences.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `anyres_sizes` \| `authors_rounding` \| (\d+) of 20500 \|(.*)$", text, re.MULTILINE)
    assert row is not None
    sizes = {(int(h), int(w)) for h, w in re.findall(r"(\d+)x(\d+)", row[2])}
    assert len(sizes) == int(row[1])
    return sizes


def test_with_their_rounding_every_size_is_the_authors() -> None:
    """Grid, kept rows and columns and token count of every size, where int() takes a float product as they do."""
    sizes = sizes_hw()
    fixture = _fixture("anyres_sizes", sizes)
    lines = [_line(_with_authors_rounding(size)) for size in sizes]
    for ours, authors in zip(lines, fixture["whole"], strict=False):  # the first ones stand there whole
        assert ours == authors
    differing = [n for n, (a, b) in enumerate(zip(block_digests(lines), fixture["blocks"], strict=True)) if a != b]
    assert not differing, f"sizes {[(n * BLOCK, (n + 1) * BLOCK) for n in differing]} of inputs.sizes_hw() differ"


def test_without_it_only_the_listed_sizes_differ() -> None:
    """Exact integers keep one line more than the authors' floats at the listed sizes, in the same grid."""
    differing = set()
    for size in sizes_hw():
        ours, authors = _ours(size), _with_authors_rounding(size)
        if ours != authors:
            differing.add(size)
            assert ours.grid == authors.grid
            assert ours.num_tokens > authors.num_tokens
    assert differing == _listed_sizes()


def test_tokens_stand_in_the_authors_order() -> None:
    """Each image token's source is the one that their prepare_inputs_labels_for_multimodal puts there."""
    sizes = sizes_hw()
    orders = _fixture("anyres_sizes", sizes)["order"]
    assert len(orders) == 40
    for size, order in zip(sizes, orders, strict=False):
        assert numbers_digest(_with_authors_rounding(size).token_sources().tolist()) == order, size


@pytest.mark.parametrize("index", range(len(IMAGES_HW)))
def test_tile_pixels_are_the_authors(index: int) -> None:
    """Bit for bit, before normalisation: every tile of process_anyres_image, stage 1's single view, and the padded view
    of LLaVA-1.5's stage 2."""
    authors = _fixture("anyres_pixels", IMAGES_HW)["pictures"][index]
    height, width = IMAGES_HW[index]
    image = Image.frombytes("RGB", (width, height), image_bytes(index))
    tiles = cut_tiles(image, _ours((height, width)), TILE)
    assert [bytes_digest(tile.tobytes()) for tile in tiles] == authors["anyres"]
    padded = cut_tiles(image, _ours((height, width), "pad"), TILE, pad_colour=MEAN_COLOUR)[0]
    if max(height, width) > 1:
        assert bytes_digest(padded.tobytes()) == authors["pad"]
    else:  # a single pixel is a square already, and misread as below
        assert authors["pad"] == authors["square"]
    single = cut_tiles(image, _ours((height, width), "crop"), TILE)[0]
    misread = height == 1
    assert (bytes_digest(single.tobytes()) == authors["square"]) == (not misread)
    if misread:  # rule `height_taken_for_channels`: one channel, as high as it is wide, three pixels wide
        grey = Image.frombytes("L", (3, width), image_bytes(index)).convert("RGB")
        single = cut_tiles(grey, _ours((width, 3), "crop"), TILE)[0, :, :, 0]
        assert bytes_digest(single.tobytes()) == authors["square"]


@pytest.mark.parametrize("index", range(len(SQUASHED_HW)))
def test_squashed_pixels_are_the_authors(index: int) -> None:
    """Bit for bit, before normalisation: the single view of the authors' SigLIP tower, whose size, mean and standard
    deviation are those of the tower's YAML file."""
    fixture = _fixture("squash_pixels", SQUASHED_HW)
    tower = yaml.safe_load(SIGLIP_YAML.read_text(encoding="utf-8"))
    assert (fixture["mean"], fixture["std"]) == (tower["image_mean"], tower["image_std"])
    assert fixture["size"] == [SIGLIP_TILE, SIGLIP_TILE]
    authors = fixture["pictures"][index]
    size = height, width = SQUASHED_HW[index]
    pixels = image_bytes(index, size)
    view = _squashed(Image.frombytes("RGB", (width, height), pixels))
    if height == 1:  # rule `height_taken_for_channels`: one channel, which their three means do not fit
        assert re.search("1 elements.* got 3", authors["error"])
    elif height == 3:  # the same rule: rows are the channels of an image as high as this one is wide
        assert bytes_digest(view.tobytes()) != authors["squash"]
        rows = np.frombuffer(pixels, dtype=np.uint8).reshape(3, width, 3)
        misread = _squashed(Image.fromarray(np.ascontiguousarray(rows.transpose(1, 2, 0))))
        assert bytes_digest(misread.tobytes()) == authors["squash"]
    else:
        assert bytes_digest(view.tobytes()) == authors["squash"]


@pytest.mark.parametrize("index", range(len(image_files())), ids=lambda index: image_files()[index].kind)
def test_image_files_are_read_as_the_authors_but_for_the_listed_rules(index: int) -> None:
    """EXIF orientation, transparency and 16-bit values change what our tower sees; without the one that a file has, its
    view is the authors' bit for bit."""
    files = image_files()
    authors = _fixture("image_files", [file.about for file in files])["square"][index]
    assert _digest_of_view(decode(files[index].data)) != authors
    assert _digest_of_view(decode(files[index].plain)) == authors
    num_listed, num_files = _listed("image_files", files[index].rule)
    assert num_listed == sum(file.rule == files[index].rule for file in files)
    assert num_files == len(files)


def _digest_of_view(image: Image.Image) -> str:
    view = cut_tiles(image, _ours((image.height, image.width), "crop"), TILE)[0]
    return bytes_digest(view.tobytes())


def _squashed(image: Image.Image) -> np.ndarray:
    layout = image_layout(
        (image.height, image.width), mode="squash", grids=AUTHORS_GRIDS, tile=SIGLIP_TILE, patches_per_side=27
    )
    return cut_tiles(image, layout, SIGLIP_TILE)[0]


def test_the_images_choose_every_grid() -> None:
    """No grid of the authors' list is left out, and as many pictures are one pixel high as are listed."""
    assert {_ours(size).grid for size in IMAGES_HW} == set(AUTHORS_GRIDS)
    misread = {"anyres_pixels": (IMAGES_HW, (1,)), "squash_pixels": (SQUASHED_HW, (1, 3))}
    for fixture, (sizes, heights) in misread.items():
        assert _listed(fixture, "height_taken_for_channels") == (sum(h in heights for h, _ in sizes), len(sizes))
