"""The packed model compared with single samples and with stock transformers: losses and gradients."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from llava_next.config import PARTS, ModelError, ViewsConfig
from llava_next.inputs.batch import Batch
from llava_next.inputs.processor import IGNORE, Example
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import num_parameters, part_of, set_recompute, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import (
    encoded,
    gradients,
    is_key_bias,
    key_bias_share,
    mixed,
    row,
    stock_inputs,
    stock_square_inputs,
    stock_square_twin,
    stock_twin,
    worst_difference,
)
from tests.tiny import TowerName, tiny_model

TOWERS: tuple[TowerName, ...] = ("clip", "siglip", "dinov2")
EVERY_TOWER: tuple[TowerName, ...] = get_args(TowerName)


def _model(backbone: Backbone, dtype: torch.dtype = torch.float32, parts: Sequence[str] = PARTS) -> LlavaNext:
    model = build_model(backbone, dtype=dtype, seed=3, num_sources=8)
    set_trained_parts(model, parts)
    return model


def _with_layer(backbone: Backbone, layer: int) -> Backbone:
    backbone.hf_config.vision_feature_layer = layer
    return backbone


def _backward(model: LlavaNext, batches: Sequence[Batch]) -> tuple[float, torch.Tensor, dict[str, torch.Tensor | None]]:
    """Sum of the rows' losses, their per-source sums, and the gradients."""
    model.zero_grad()
    total, by_source = 0.0, torch.zeros(model.num_sources, dtype=torch.float64)
    for batch in batches:
        loss_sum, sources, _ = model(batch)
        loss_sum.backward()
        total += float(loss_sum.detach())
        by_source += sources.double()
    return total, by_source, gradients(model)


def _one_by_one(backbone: Backbone, examples: Sequence[Example]) -> list[Batch]:
    rows = [row(backbone, [example]) for example in examples]
    return [
        replace(each, target_sources=torch.full_like(each.target_sources, number)) for number, each in enumerate(rows)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_row_equals_single_samples(make_backbone: MakeBackbone, tower: TowerName, dtype: torch.dtype) -> None:
    """The loss, its sums per sample and every gradient agree to 1e-10 (fp64) and 1e-5 (fp32) per tensor.

    The samples have images in several grids, two images, or none. Neither their order in the row nor a split into two
    rows matters. Key biases of towers, whose true gradient is zero, contain only rounding.
    """
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    backbone = make_backbone(tower, attention_bias=True)
    model = _model(backbone, dtype)
    samples = mixed(backbone)
    assert sorted({len(sample.images) for sample in samples}) == [0, 1, 2]
    examples = [sample.example for sample in samples]
    whole = row(backbone, examples)
    assert whole.input_ids.shape == (1, sum(example.layout.num_tokens for example in examples))
    single = _backward(model, _one_by_one(backbone, examples))
    turned = row(backbone, examples[::-1])
    turned = replace(turned, target_sources=len(examples) - 1 - turned.target_sources)
    halves = [row(backbone, examples[:3]), row(backbone, examples[3:])]
    halves[1] = replace(halves[1], target_sources=3 + halves[1].target_sources)
    for rows in ([whole], [turned], halves):
        total, by_sample, actual = _backward(model, rows)
        assert total == pytest.approx(single[0], rel=bound)
        torch.testing.assert_close(by_sample, single[1], rtol=bound, atol=0)
        assert worst_difference(actual, single[2], actual) < bound
        assert max(key_bias_share(actual), key_bias_share(single[2])) < bound
    compared = {name for name, gradient in single[2].items() if gradient is not None and not is_key_bias(name)}
    assert {part_of(name) for name in compared} == set(PARTS)
    assert any("language_model" in name and name.endswith("k_proj.bias") for name in compared)


def test_loss_does_not_depend_on_other_samples(make_backbone: MakeBackbone) -> None:
    """A sample's loss is the same whatever is before or after it in the row."""
    backbone = make_backbone()
    model = _model(backbone, torch.float64)
    middle = encoded(backbone, [(45, 61)], seed=4).example
    losses = []
    for seed, sizes in [(1, [(20, 20)]), (2, []), (3, [(90, 31), (56, 56)])]:
        other = encoded(backbone, sizes, seed=seed).example
        losses.append(float(model(row(backbone, [other, middle, other]))[1][1]))
    losses.append(float(model(row(backbone, [middle]))[1][0]))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)


def _changed(example: Example) -> Example:
    """The example with other text and other pixels at the same positions."""
    layout = example.layout
    is_text = layout.ids != layout.image_token_id
    ids = np.where(is_text, (layout.ids + 7) % 500, layout.ids).astype(layout.ids.dtype)
    labels = np.where(layout.labels == IGNORE, layout.labels, ids).astype(layout.labels.dtype)
    return replace(example, layout=replace(layout, ids=ids, labels=labels), tiles=255 - example.tiles)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tower", TOWERS)
def test_samples_are_bitwise_independent(make_backbone: MakeBackbone, tower: TowerName, dtype: torch.dtype) -> None:
    """With other text and pixels in the samples around it, a sample's loss and the gradients of that loss are bitwise
    equal."""
    backbone = make_backbone(tower)
    model = _model(backbone, dtype)
    before, middle, after = (
        encoded(backbone, sizes, seed=seed).example
        for seed, sizes in enumerate([[(90, 31), (56, 56)], [(45, 61)], [(20, 20)]])
    )
    losses, seen = [], []
    for examples in ([before, middle, after], [_changed(before), middle, _changed(after)]):
        batch = row(backbone, examples)
        losses.append(_backward(model, [batch])[1])
        alone = replace(batch, target_weights=(batch.target_samples == 1).to(batch.target_weights.dtype))
        seen.append(_backward(model, [alone])[2])
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] != losses[1][0]
    assert losses[0][2] != losses[1][2]
    for name, gradient in seen[0].items():
        other = seen[1][name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None and not is_key_bias(name):
            torch.testing.assert_close(gradient, other, rtol=0, atol=0, msg=name)


CASES = {
    "one_image": [(45, 61)],
    "another_grid": [(28, 90)],
    "two_images": [(90, 31), (20, 20)],
    "thin": [(1, 80)],
    "text_only": [],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tower", TOWERS)
def test_equals_stock_transformers(make_backbone: MakeBackbone, tower: TowerName, case: str) -> None:
    """Loss and gradients equal those of the stock model's forward pass with labels, on pixels of its processor."""
    backbone = make_backbone(tower)
    assert (backbone.hf_config.vision_feature_select_strategy == "full") == (tower == "siglip")
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, CASES[case], seed=5, rounds=2)
    total, _, actual = _backward(model, [row(backbone, [sample.example])])
    expected = stock(**stock_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    reference = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    assert worst_difference(actual, reference, actual) < 1e-5
    assert sum(map(is_key_bias, actual)) == model.num_tower_layers
    assert key_bias_share(actual) < 1e-4
    assert key_bias_share(reference) < 1e-4
    trained_there = {n for n, g in reference.items() if g is not None and g.any() and not is_key_bias(n)}
    assert trained_there <= set(actual)  # no layer that stock transformers trains was removed


@pytest.mark.parametrize("case", ["one_image", "two_images"])
@pytest.mark.parametrize("tower", TOWERS)
def test_square_mode_equals_stock_llava_1_5(make_backbone: MakeBackbone, tower: TowerName, case: str) -> None:
    """With one view per image, loss and gradients, including the tower's, equal those of the stock LLaVA-1.5; the
    newline, which it lacks, has a zero gradient."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    stock = stock_square_twin(model, backbone)
    sample = encoded(backbone, CASES[case], seed=5, rounds=2, views=ViewsConfig("crop", "crop"))
    total, _, actual = _backward(model, [row(backbone, [sample.example])])
    expected = stock(**stock_square_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    reference = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    newline = actual.pop("hf.model.image_newline")
    assert newline is not None
    assert not newline.any()
    assert worst_difference(actual, reference, actual) < 1e-5
    assert key_bias_share(actual) < 1e-4
    assert key_bias_share(reference) < 1e-4


@pytest.mark.parametrize("layer", [-1, -3, 1, 2, 3])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_feature_layer_equals_stock(make_backbone: MakeBackbone, tower: TowerName, layer: int) -> None:
    """The output of the shortened tower is the hidden state of that index of the stock tower, counted from either
    end."""
    backbone = _with_layer(make_backbone(tower), layer)
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, [(45, 61)], seed=6)
    with torch.no_grad():
        total = float(model(row(backbone, [sample.example]))[0].detach())
        expected = float(stock(**stock_inputs(backbone, sample)).loss) * sample.example.layout.num_supervised
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layer", [-5, 0, 4])
def test_invalid_feature_layer_is_an_error(make_backbone: MakeBackbone, layer: int) -> None:
    """Layers beyond the tower's three, and layer 0, are errors with the valid range."""
    with pytest.raises(ModelError, match="feature_layer"):
        _model(_with_layer(make_backbone(), layer))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_equal_stock(make_backbone: MakeBackbone, tied: bool) -> None:
    """A tied head adds its gradient to the embedding's and is counted once."""
    backbone = make_backbone(tied=tied)
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, [(45, 61)], seed=7)
    _, _, actual = _backward(model, [row(backbone, [sample.example])])
    (stock(**stock_inputs(backbone, sample)).loss * sample.example.layout.num_supervised).backward()
    expected = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    assert worst_difference(actual, expected, actual) < 1e-5
    head = model.hf.lm_head.weight.numel()
    in_parts = sum(num_parameters(model, part) for part in PARTS)
    assert in_parts == num_parameters(model) == sum(p.numel() for p in model.parameters())
    assert num_parameters(_model(make_backbone())) - num_parameters(model) == (head if tied else 0)


@pytest.mark.parametrize("kind", ["empty", "text_only"])
@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_rows_without_images_have_zero_gradients(make_backbone: MakeBackbone, tower: TowerName, kind: str) -> None:
    """Gradients are never None, because gradient reduction is collective. The tower's are zero, and loss sums are
    correct."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    examples = [] if kind == "empty" else [encoded(backbone, []).example]
    total, by_source, actual = _backward(model, [row(backbone, examples)])
    for name, parameter in model.named_parameters():
        gradient = actual[name]
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None and (kind == "empty" or part_of(name) != "language_model"):
            assert not gradient.any(), name
    assert (total == 0.0) == (kind == "empty")
    assert float(by_source.sum()) == pytest.approx(total)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_every_trained_parameter_has_a_gradient(make_backbone: MakeBackbone, tower: TowerName, layer: int) -> None:
    """A trained but unused parameter would decay: in a row with images every one has a gradient."""
    backbone = _with_layer(make_backbone(tower), layer)
    model = _model(backbone)
    _, _, actual = _backward(model, [row(backbone, [sample.example for sample in mixed(backbone)])])
    for name, parameter in model.named_parameters():
        gradient = actual[name]
        if parameter.requires_grad and not is_key_bias(name):
            assert gradient is not None, name
            assert gradient.any(), name
        assert parameter.requires_grad or gradient is None, name
    assert num_parameters(model, "vision_tower", trained=True) > 0


@pytest.mark.parametrize(
    "parts", [("projector",), ("projector", "image_newline"), ("language_model",), ("vision_tower",), PARTS, ()]
)
def test_exactly_the_named_parts_train(make_backbone: MakeBackbone, parts: tuple[str, ...]) -> None:
    """Parts are frozen independently; gradients of trained parts do not depend on which others are frozen."""
    backbone = make_backbone()
    examples = [sample.example for sample in mixed(backbone)]
    everything = _backward(_model(backbone), [row(backbone, examples)])[2]
    model = _model(make_backbone(), parts=parts)
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(parts)
    if parts:
        actual = _backward(model, [row(backbone, examples)])[2]
        assert worst_difference(actual, everything, [n for n, g in actual.items() if g is not None]) < 1e-5
        assert {part_of(name) for name, gradient in actual.items() if gradient is not None} == set(parts)


def test_unknown_part_is_an_error(make_backbone: MakeBackbone) -> None:
    """The message lists the parts, and every parameter belongs to a part."""
    model = _model(make_backbone())
    with pytest.raises(ModelError, match=r"'connector'.*vision_tower, projector"):
        set_trained_parts(model, ["connector"])
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)
    with pytest.raises(ModelError, match="none of the parts"):
        part_of("hf.model.somewhere.weight")


def test_shared_tiles_equal_separate_tiles(make_backbone: MakeBackbone) -> None:
    """Two questions about one image give the same losses and gradients with shared and with separate tiles."""
    backbone = make_backbone()
    model = _model(backbone)
    first = encoded(backbone, [(45, 61)], seed=1).example
    layout = encoded(backbone, [(45, 61)], seed=2).example.layout
    shared = _backward(model, [row(backbone, [first, Example(layout, first.tiles)])])
    separate = _backward(model, [row(backbone, [first, Example(layout, first.tiles.copy())])])
    torch.testing.assert_close(shared[1], separate[1], rtol=1e-5, atol=0)
    assert worst_difference(shared[2], separate[2], shared[2]) < 1e-5


def test_sample_weighting_is_the_sum_of_means(make_backbone: MakeBackbone) -> None:
    """loss_weighting sample: the row's loss is the sum of its samples' mean losses; token counts do not change."""
    backbone = make_backbone()
    model = _model(backbone)
    examples = [sample.example for sample in mixed(backbone)]
    total, by_source, tokens = model(row(backbone, examples, per_sample=True))
    _, sums, counts = model(row(backbone, examples))
    assert torch.equal(tokens, counts)
    assert counts[: len(examples)].tolist() == [example.layout.num_supervised for example in examples]
    means = sums[: len(examples)] / counts[: len(examples)]
    torch.testing.assert_close(by_source[: len(examples)], means)
    assert float(total.detach()) == pytest.approx(float(means.sum()), rel=1e-5)


def test_scores(make_backbone: MakeBackbone) -> None:
    """`score` gives each token's loss, and whether it is the most likely token of stock transformers."""
    backbone = make_backbone()
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)], rounds=3)
    batch = row(backbone, [sample.example])
    scores = model.score(batch)
    assert float(scores.losses.sum()) == pytest.approx(float(model(batch)[0].detach()), rel=1e-5)
    inputs = stock_inputs(backbone, sample)
    with torch.no_grad():
        logits = stock_twin(model, backbone)(**inputs).logits[0, batch.target_positions]
    # Make half of the targets hits, so that both values occur.
    best = logits.argmax(-1)
    batch = replace(batch, target_ids=torch.where(torch.arange(len(best)) % 2 == 0, best, (best + 1) % 500))
    assert model.score(batch).hits.tolist() == [index % 2 == 0 for index in range(len(best))]


def test_tiles_are_normalized_as_in_the_stock_processor(make_backbone: MakeBackbone) -> None:
    """(x / 255 - mean) / std as one multiply-add gives the stock processor's pixels up to rounding."""
    backbone = make_backbone()
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)])
    tiles = torch.from_numpy(sample.example.tiles)
    actual = tiles.permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
    expected = stock_inputs(backbone, sample)["pixel_values"][0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_recompute_gives_equal_gradients(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """Losses and gradients are bitwise equal, and fewer tensors are saved."""
    backbone = make_backbone(tower)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])

    def run(parts: tuple[str, ...]) -> tuple[float, dict[str, torch.Tensor | None], int]:
        model = _model(backbone).eval()  # the mode of pretrained parts
        set_recompute(model, parts)
        saved: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, _, _ = model(batch)
        total.backward()
        return float(total.detach()), gradients(model), sum(saved)

    plain = run(())
    for parts in (("language_model",), ("vision_tower",), ("vision_tower", "language_model")):
        again = run(parts)
        assert again[0] == plain[0]
        for name, gradient in plain[1].items():
            other = again[1][name]
            if gradient is None or other is None:
                assert gradient is other, name
            else:
                assert torch.equal(gradient, other), name
        assert again[2] < plain[2]


def test_recompute_of_a_projector_is_an_error(make_backbone: MakeBackbone) -> None:
    """A projector has no blocks."""
    with pytest.raises(ModelError, match="recompute: 'projector' does not consist of blocks"):
        set_recompute(_model(make_backbone("clip")), ("projector",))


@pytest.mark.parametrize(
    ("part", "key"), [("language_model", "attention_dropout"), ("vision_tower", "attention_dropout")]
)
def test_dropout_is_an_error(tmp_path: Path, part: str, key: str) -> None:
    """The message has the key and the fix."""
    config = tiny_model(tmp_path)
    owner = getattr(config, part)
    config = replace(config, **{part: replace(owner, overrides={key: 0.1})})
    with pytest.raises(ModelError, match=rf"model.{part}: .*{key}=0.1.*set {key}: 0.0 in model.{part}.overrides"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)
