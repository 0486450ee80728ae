"""The packed model with the views of LLaVA-OneVision, compared with stock transformers one sample at a time."""

import pytest
import torch

from llava_next.config import PARTS, Grid, ViewsConfig
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import (
    Encoded,
    encoded,
    gradients,
    row,
    stock_onevision_inputs,
    stock_onevision_twin,
    with_grids,
    worst_difference,
)
from tests.tiny import TowerName

GRIDS: tuple[Grid, ...] = tuple((rows, cols) for cols in range(1, 5) for rows in range(1, 5))
MAX_VIEWS = 2
VIEWS = ViewsConfig(f"anyres_max_{MAX_VIEWS}", "pad", closing_newline=True)
TOWERS: tuple[TowerName, ...] = ("siglip", "clip")


def _samples(backbone: Backbone) -> list[Encoded]:
    """Single images with and without a reduced map, sets of two and three, and text only."""
    sizes: list[list[tuple[int, int]]] = [
        [(100, 90)],
        [(45, 61), (90, 31)],
        [],
        [(20, 20)],
        [(28, 110)],
        [(61, 45), (20, 20), (100, 100)],
        [(120, 61)],
    ]
    return [encoded(backbone, each, seed=seed, rounds=1 + seed % 3, views=VIEWS) for seed, each in enumerate(sizes)]


def _built(make_backbone: MakeBackbone, tower: TowerName, dtype: torch.dtype) -> tuple[Backbone, LlavaNext]:
    backbone = with_grids(make_backbone(tower), GRIDS)
    model = build_model(backbone, dtype=dtype, seed=3, num_sources=8)
    set_trained_parts(model, PARTS)
    return backbone, model


@pytest.mark.parametrize("tower", TOWERS)
def test_packed_row_equals_stock_onevision(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """The loss of each sample and the sums of all gradients agree to 1e-5 with the stock model, which gets one sample
    at a time, its images as a nested list. Two rows instead of one change nothing."""
    backbone, model = _built(make_backbone, tower, torch.float32)
    stock = stock_onevision_twin(model, backbone, MAX_VIEWS)
    samples = _samples(backbone)
    reduced = [image.num_reduced > 0 for sample in samples for image in sample.example.layout.images]
    assert (sum(reduced), len(reduced)) == (3, 9)
    losses = []
    for sample in samples:
        loss = stock(**stock_onevision_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
        loss.backward()
        losses.append(float(loss.detach()))
    expected = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    examples = [sample.example for sample in samples]
    for parts in ([examples], [examples[:4], examples[4:]]):
        model.zero_grad()
        by_sample: list[float] = []
        for part in parts:
            total, sources, _ = model(row(backbone, part))
            total.backward()
            by_sample += sources[: len(part)].tolist()
        assert by_sample == pytest.approx(losses, rel=1e-5)
        actual = gradients(model)
        assert worst_difference(actual, expected, actual) < 1e-5
        newline = actual["hf.model.image_newline"]
        assert newline is not None
        assert newline.any()


def test_a_samples_gradient_is_bitwise_reproducible(make_backbone: MakeBackbone) -> None:
    """Two backward passes of a row with reduced maps give the same bits."""
    backbone, model = _built(make_backbone, "siglip", torch.float32)
    batch = row(backbone, [sample.example for sample in _samples(backbone)])
    assert len(batch.reduced_rows) > 0
    seen = []
    for _ in range(2):
        model.zero_grad()
        model(batch)[0].backward()
        seen.append(gradients(model))
    for name, gradient in seen[0].items():
        other = seen[1][name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=0, atol=0, msg=name)
