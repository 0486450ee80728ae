"""Grids, kept maps, token counts, token order and tile pixels of the released package.

    python -m tests.oracles.authors.anyres [--check]

Runs in the environment that scripts/oracles.sh makes.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from llava import mm_utils  # type: ignore[import-not-found]
from llava.constants import IMAGE_TOKEN_INDEX  # type: ignore[import-not-found]
from llava.model.llava_arch import LlavaMetaForCausalLM, unpad_image  # type: ignore[import-not-found]
from PIL import Image
from transformers import CLIPImageProcessor  # type: ignore[import-not-found]

from tests.oracles.digests import NUM_WHOLE_SIZES, block_digests, bytes_digest, numbers_digest, size_line
from tests.oracles.inputs import IMAGES_HW, image_bytes, sizes_hw
from tests.oracles.save_fixture import save

TILE, SIDE = 336, 24
# (width, height), in the order of the released configurations.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NUM_ORDERED = 40
"""Of how many sizes the order of the tokens is kept, by the authors' own merging code."""


def geometry(size_hw: tuple[int, int]) -> str:
    """The line of one size: the grid of their choice, and the part that unpad_image keeps of a map of its indices."""
    height, width = size_hw
    columns, rows = mm_utils.get_anyres_image_grid_shape((width, height), PINPOINTS, TILE)
    index_map = torch.arange(rows * SIDE * columns * SIDE, dtype=torch.int32).view(1, rows * SIDE, columns * SIDE)
    kept_map = unpad_image(index_map, (width, height))
    kept_h, kept_w = kept_map.shape[1:]
    first = int(kept_map.flatten()[0]) if kept_map.numel() else -1
    return size_line(size_hw, (rows, columns), (kept_h, kept_w), first, SIDE * SIDE + kept_h * (kept_w + 1))


class _Indices(LlavaMetaForCausalLM):  # type: ignore[misc]
    """Their merging code with a tower whose features are their numbers, and a newline of -1."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS
        )
        self.model = SimpleNamespace(
            image_newline=torch.full((1,), -1.0), embed_tokens=lambda ids: torch.zeros(len(ids), 1)
        )
        self.device = torch.device("cpu")

    def get_model(self) -> Any:
        return self.model

    def get_vision_tower(self) -> Any:
        return SimpleNamespace(num_patches_per_side=SIDE, config=SimpleNamespace(image_size=TILE))

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(images) * SIDE * SIDE, dtype=torch.float32).view(len(images), SIDE * SIDE, 1)


def token_order(size_hw: tuple[int, int]) -> list[int]:
    """The source of each image token in prepare_inputs_labels_for_multimodal: the number of a feature, or -1."""
    height, width = size_hw
    columns, rows = mm_utils.get_anyres_image_grid_shape((width, height), PINPOINTS, TILE)
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX]])  # a sequence of one token is taken for a step of generation
    views = torch.zeros(1 + rows * columns, 3, 1, 1)
    merged = _Indices().prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, [views], image_sizes=[(width, height)]
    )[4]
    return [int(value) for value in merged.flatten()[1:]]


def pixels(index: int, processor: Any) -> dict[str, Any]:
    """Digests of one image's uint8 tiles: AnyRes in their order, stage 1's single view, LLaVA-1.5's padded one."""
    height, width = IMAGES_HW[index]
    image = Image.frombytes("RGB", (width, height), image_bytes(index))
    tiles = mm_utils.process_anyres_image(image, processor, PINPOINTS)
    single = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    padded = mm_utils.process_images([image], processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert tiles.dtype == single.dtype == padded.dtype == torch.uint8
    views = [*tiles, single[0], padded[0]]
    digests = [bytes_digest(view.permute(1, 2, 0).contiguous().numpy().tobytes()) for view in views]
    return {"anyres": digests[:-2], "square": digests[-2], "pad": digests[-1]}


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sizes = sizes_hw()
    lines = [geometry(size) for size in sizes]
    outputs = {
        "blocks": block_digests(lines),
        "whole": lines[:NUM_WHOLE_SIZES],
        "order": [numbers_digest(token_order(size)) for size in sizes[:NUM_ORDERED]],
    }
    right = save("anyres_sizes", "llava.mm_utils, llava.model.llava_arch", sizes, outputs, check=check)
    processor = CLIPImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_rescale=False, do_normalize=False
    )
    tiles = {"pictures": [pixels(index, processor) for index in range(len(IMAGES_HW))]}
    right &= save("anyres_pixels", "llava.mm_utils", IMAGES_HW, tiles, check=check)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
