"""Reduced feature maps as weighted sums, compared with transformers' interpolation: values and gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_next.config import AUTHORS_GRIDS, Grid
from llava_next.inputs.anyres import ImageLayout, SizeHW, image_layout
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.bilinear import WeightedRows, by_row, reduced_map
from llava_next.inputs.processor import Example, SampleLayout
from llava_next.model import weighted_rows as weighted_rows_module
from llava_next.model.weighted_rows import weighted_rows

GRIDS: tuple[Grid, ...] = tuple((rows, cols) for cols in range(1, 7) for rows in range(1, 7))
WIDTH = 3


def _layout(size_hw: SizeHW, grids: tuple[Grid, ...], tile: int, side: int, max_views: int) -> ImageLayout:
    return image_layout(size_hw, mode="anyres", grids=grids, tile=tile, patches_per_side=side, max_views=max_views)


def _example(layouts: list[ImageLayout]) -> Example:
    """Images only, with tiles of one pixel: the features are given."""
    ids = np.full(sum(layout.num_tokens for layout in layouts), 7, dtype=np.int32)
    tiles = np.zeros((sum(layout.num_tiles for layout in layouts), 1, 1, 3), dtype=np.uint8)
    return Example(SampleLayout(ids, ids, tuple(layouts), 7), tiles)


def _image_tokens(batch: Batch, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """The embeddings of a row's image tokens, as the model computes them."""
    reduced = weighted_rows(
        features, batch.reduced_rows, batch.reduced_weights, batch.reduced_uses, batch.reduced_use_weights
    )
    return torch.cat([features, newline[None], reduced])[batch.image_sources]


def _stock_tokens(
    layout: ImageLayout,
    grids: tuple[Grid, ...],
    tile: int,
    max_views: int,
    features: torch.Tensor,
    newline: torch.Tensor,
) -> torch.Tensor:
    """What transformers' LLaVA-OneVision makes of the features of the image's tiles."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=tile // layout.patches_per_side),
        image_grid_pinpoints=[[rows * tile, cols * tile] for rows, cols in grids],
    )
    tiles = features.view(layout.num_tiles, layout.patches_per_side**2, -1)
    (tokens,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [tiles],
        torch.tensor([layout.size_hw]),
        image_newline=newline,
        vision_aspect_ratio=f"anyres_max_{max_views}",
    )
    return tokens


def _compare(size_hw: SizeHW, grids: tuple[Grid, ...], tile: int, side: int, max_views: int) -> bool:
    """Compares values and gradients; returns whether the map was reduced."""
    layout = _layout(size_hw, grids, tile, side, max_views)
    generator = torch.Generator().manual_seed(sum(size_hw))
    num_rows = layout.num_tiles * side * side
    features = torch.randn(num_rows, WIDTH, generator=generator, requires_grad=True)
    newline = torch.randn(WIDTH, generator=generator, requires_grad=True)
    batch = collate([_example([layout])], tile=1, patches_per_tile=side * side)
    ours = _image_tokens(batch, features, newline)
    stock = _stock_tokens(layout, grids, tile, max_views, features, newline)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6, msg=f"{size_hw}")
    seed = torch.randn(ours.shape, generator=generator)
    num_lines = (layout.reduced_hw or layout.kept_hw)[0]
    for actual, expected, num_terms in zip(
        torch.autograd.grad(ours, (features, newline), seed),
        torch.autograd.grad(stock, (features, newline), seed),
        (1, num_lines),  # the newline's gradient is a sum over lines, which may nearly cancel
        strict=True,
    ):
        scale = max(1.0, float(num_terms), float(expected.abs().max()))
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-6, msg=f"{size_hw}")
    return layout.num_reduced > 0


def _sizes(count: int, seed: int, largest: int) -> list[SizeHW]:
    generator = np.random.default_rng(seed)
    return [(int(h), int(w)) for h, w in generator.integers(1, largest, (count, 2))]


@pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.full)])
def test_values_and_gradients_are_the_stock_ones(count: int) -> None:
    """For OneVision's tower and grids, sizes of the published table included."""
    published = [(1500, 2000), (3000, 3000), (944, 1153), (1024, 899)]
    reduced = [_compare(size, GRIDS, 384, 27, 9) for size in (*published, *_sizes(count, 0, 3000))]
    assert sum(reduced) > count / 4


@pytest.mark.parametrize("max_views", [1, 2, 4])
def test_other_geometries(max_views: int) -> None:
    """Few patches, other numbers of views, and the authors' five grids."""
    reduced = [_compare(size, GRIDS, 28, 4, max_views) for size in _sizes(60, max_views, 250)]
    reduced += [_compare(size, AUTHORS_GRIDS, 336, 24, max_views) for size in _sizes(10, max_views, 1200)]
    assert sum(reduced) > 10


def test_thin_maps_keep_a_row() -> None:
    """A map that would have less than one row keeps one; transformers raises an error there."""
    layout = _layout((4, 4000), ((1, 36),), 384, 27, 1)
    assert (layout.kept_hw, layout.reduced_hw) == ((1, 972), (1, 841))
    tokens = reduced_map(layout)
    np.testing.assert_allclose(tokens.weights.sum(axis=1), 1, atol=1e-6)


def test_sums_by_row_are_the_transposed_sums() -> None:
    """As matrices; each row of a reduced map is part of at most four tokens."""
    layout = _layout((256, 256), ((4, 4),), 64, 8, 9)
    assert layout.reduced_hw == (24, 24)
    tokens, num_rows = reduced_map(layout), layout.num_tiles * 64
    uses = by_row(tokens, num_rows)
    assert uses.rows.shape == (num_rows, 4)
    forward, backward = np.zeros((layout.num_reduced, num_rows)), np.zeros((num_rows, layout.num_reduced))
    np.add.at(forward, (np.arange(layout.num_reduced)[:, None], tokens.rows), tokens.weights)
    np.add.at(backward, (np.arange(num_rows)[:, None], uses.rows), uses.weights)
    np.testing.assert_array_equal(backward, forward.T)
    none = by_row(WeightedRows(np.zeros((0, 4), dtype=np.int64), np.zeros((0, 4), dtype=np.float32)), 5)
    assert none.rows.shape == none.weights.shape == (5, 0)


def _sums(seed: int, num_rows: int = 12, num_sums: int = 20) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    sums = WeightedRows(
        generator.integers(0, num_rows, (num_sums, 4)), generator.standard_normal((num_sums, 4)).astype(np.float32)
    )
    uses = by_row(sums, num_rows)
    return [torch.from_numpy(array) for array in (sums.rows, sums.weights, uses.rows, uses.weights)]


def test_the_backward_pass_is_the_derivative() -> None:
    """In fp64, with rows that are used several times in one sum."""
    table = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_rows, (table, *_sums(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Sums are computed in fp32, a part of them at a time, and rounded to the dtype of the table."""
    table = torch.randn(12, 5).to(dtype)
    rows, weights, *uses = _sums(3)
    expected = (table[rows].float() * weights[..., None]).sum(1).to(dtype)
    for at_once in (8192, 7):
        monkeypatch.setattr(weighted_rows_module, "_ROWS_AT_ONCE", at_once)
        actual = weighted_rows(table, rows, weights, *uses)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_maps_of_several_examples_are_reduced_once() -> None:
    """Examples with the same tiles share the reduced tokens; other examples have their own, with the same values."""
    layout, other = _layout((120, 150), GRIDS, 28, 4, 1), _layout((56, 90), GRIDS, 28, 4, 1)
    first = _example([layout, other])
    batch = collate([first, _example([other]), first, _example([layout])], tile=1, patches_per_tile=16)
    assert min(layout.num_reduced, other.num_reduced) > 0
    assert len(batch.reduced_rows) == 2 * (layout.num_reduced + other.num_reduced)
    features, newline = torch.randn(len(batch.reduced_uses), WIDTH), torch.randn(WIDTH)
    tokens = _image_tokens(batch, features, newline).split(
        [first.layout.num_tokens, other.num_tokens, first.layout.num_tokens, layout.num_tokens]
    )
    torch.testing.assert_close(tokens[0], tokens[2], rtol=0, atol=0)
    last = features[-layout.num_tiles * 16 :]
    alone = collate([_example([layout])], tile=1, patches_per_tile=16)
    torch.testing.assert_close(tokens[3], _image_tokens(alone, last, newline), rtol=0, atol=0)


def test_rows_without_reduced_maps_have_no_sums() -> None:
    """Their tensors are empty, so that the model skips them."""
    batch = collate([_example([_layout((20, 20), GRIDS, 28, 4, 9)])], tile=1, patches_per_tile=16)
    assert len(batch.reduced_rows) == len(batch.reduced_weights) == batch.reduced_uses.numel() == 0
