"""The packed model against one sample at a time, and against stock transformers: losses and every gradient."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from llava_next.config import PARTS, ModelError
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
def test_a_packed_row_equals_its_samples_one_at_a_time(
    make_backbone: MakeBackbone, tower: TowerName, dtype: torch.dtype
) -> None:
    """The loss, its sums per sample and every gradient agree to 1e-10 (fp64) and 1e-5 (fp32) of each tensor.

    The samples show pictures of several grids, two pictures, or none. Their order in the row is of no account, nor is a
    cut into two rows. Key biases of towers, whose true gradient is zero, hold rounding only.
    """
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    backbone = make_backbone(tower, attention_bias=True)
    model = _model(backbone, dtype)
    samples = mixed(backbone)
    assert sorted({len(sample.pictures) for sample in samples}) == [0, 1, 2]
    examples = [sample.example for sample in samples]
    whole = row(backbone, examples)
    assert whole.input_ids.shape == (1, sum(example.layout.num_tokens for example in examples))
    single = _backward(model, _one_by_one(backbone, examples))
    turned = row(backbone, examples[::-1])
    turned = replace(turned, target_sources=len(examples) - 1 - turned.target_sources)
    halves = [row(backbone, examples[:3]), row(backbone, examples[3:])]
    halves[1] = replace(halves[1], target_sources=3 + halves[1].target_sources)
    for rows in ([whole], [turned], halves):
        total, by_sample, found = _backward(model, rows)
        assert total == pytest.approx(single[0], rel=bound)
        torch.testing.assert_close(by_sample, single[1], rtol=bound, atol=0)
        assert worst_difference(found, single[2], found) < bound
        assert max(key_bias_share(found), key_bias_share(single[2])) < bound
    compared = {name for name, gradient in single[2].items() if gradient is not None and not is_key_bias(name)}
    assert {part_of(name) for name in compared} == set(PARTS)
    assert any("language_model" in name and name.endswith("k_proj.bias") for name in compared)


def test_samples_do_not_see_one_another(make_backbone: MakeBackbone) -> None:
    """Whatever stands before or behind a sample in its row, its own loss is the same."""
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
    """Other words and other pixels in the same places."""
    layout = example.layout
    is_text = layout.ids != layout.image_token_id
    ids = np.where(is_text, (layout.ids + 7) % 500, layout.ids).astype(layout.ids.dtype)
    labels = np.where(layout.labels == IGNORE, layout.labels, ids).astype(layout.labels.dtype)
    return replace(example, layout=replace(layout, ids=ids, labels=labels), tiles=255 - example.tiles)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tower", TOWERS)
def test_changing_a_sample_changes_nothing_of_another(
    make_backbone: MakeBackbone, tower: TowerName, dtype: torch.dtype
) -> None:
    """Every word and pixel of the samples around it changed, a sample's loss is the same to the last bit, and so is
    the gradient of that loss in every tensor."""
    backbone = make_backbone(tower)
    model = _model(backbone, dtype)
    before, middle, behind = (
        encoded(backbone, sizes, seed=seed).example
        for seed, sizes in enumerate([[(90, 31), (56, 56)], [(45, 61)], [(20, 20)]])
    )
    losses, seen = [], []
    for examples in ([before, middle, behind], [_changed(before), middle, _changed(behind)]):
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
    "one_picture": [(45, 61)],
    "another_grid": [(28, 90)],
    "two_pictures": [(90, 31), (20, 20)],
    "thin": [(1, 80)],
    "text_only": [],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tower", TOWERS)
def test_equals_stock_transformers(make_backbone: MakeBackbone, tower: TowerName, case: str) -> None:
    """Loss and every gradient are those of the stock model's own forward with labels, on its own pixels."""
    backbone = make_backbone(tower)
    assert (backbone.hf_config.vision_feature_select_strategy == "full") == (tower == "siglip")
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, CASES[case], seed=5, rounds=2)
    total, _, ours = _backward(model, [row(backbone, [sample.example])])
    expected = stock(**stock_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    assert worst_difference(ours, theirs, ours) < 1e-5
    assert sum(map(is_key_bias, ours)) == model.num_tower_layers
    assert key_bias_share(ours) < 1e-4
    assert key_bias_share(theirs) < 1e-4
    trained_there = {n for n, g in theirs.items() if g is not None and g.any() and not is_key_bias(n)}
    assert trained_there <= set(ours)  # no layer that stock trains was cut away


@pytest.mark.parametrize("case", ["one_picture", "two_pictures"])
@pytest.mark.parametrize("tower", TOWERS)
def test_square_mode_equals_stock_llava_1_5(make_backbone: MakeBackbone, tower: TowerName, case: str) -> None:
    """One view a picture: loss and every gradient, the tower's too, are those of the stock LLaVA-1.5; the newline,
    which it has not, gets none."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    stock = stock_square_twin(model, backbone)
    sample = encoded(backbone, CASES[case], seed=5, rounds=2, image_mode="square")
    total, _, ours = _backward(model, [row(backbone, [sample.example])])
    expected = stock(**stock_square_inputs(backbone, sample)).loss * sample.example.layout.num_supervised
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    newline = ours.pop("hf.model.image_newline")
    assert newline is not None
    assert not newline.any()
    assert worst_difference(ours, theirs, ours) < 1e-5
    assert key_bias_share(ours) < 1e-4
    assert key_bias_share(theirs) < 1e-4


@pytest.mark.parametrize("layer", [-1, -3, 1, 2, 3])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_feature_layer_equals_stock(make_backbone: MakeBackbone, tower: TowerName, layer: int) -> None:
    """The cut tower's output is the stock tower's hidden state of that number, from either end."""
    backbone = _with_layer(make_backbone(tower), layer)
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, [(45, 61)], seed=6)
    with torch.no_grad():
        total = float(model(row(backbone, [sample.example]))[0].detach())
        expected = float(stock(**stock_inputs(backbone, sample)).loss) * sample.example.layout.num_supervised
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layer", [-5, 0, 4])
def test_a_feature_layer_that_is_none_is_refused(make_backbone: MakeBackbone, layer: int) -> None:
    """Beyond the tower's three layers, or none at all: refused with the range."""
    with pytest.raises(ModelError, match="feature_layer"):
        _model(_with_layer(make_backbone(), layer))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_equal_stock(make_backbone: MakeBackbone, tied: bool) -> None:
    """A head that shares the embedding's tensor gets both gradients in it, and is counted once."""
    backbone = make_backbone(tied=tied)
    model = _model(backbone)
    stock = stock_twin(model, backbone)
    sample = encoded(backbone, [(45, 61)], seed=7)
    _, _, ours = _backward(model, [row(backbone, [sample.example])])
    (stock(**stock_inputs(backbone, sample)).loss * sample.example.layout.num_supervised).backward()
    theirs = {"hf." + name: p.grad for name, p in stock.named_parameters()}
    assert worst_difference(ours, theirs, ours) < 1e-5
    head = model.hf.lm_head.weight.numel()
    in_parts = sum(num_parameters(model, part) for part in PARTS)
    assert in_parts == num_parameters(model) == sum(p.numel() for p in model.parameters())
    assert num_parameters(_model(make_backbone())) - num_parameters(model) == (head if tied else 0)


@pytest.mark.parametrize("kind", ["empty", "text_only"])
@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_rows_without_pictures_give_zero_gradients(make_backbone: MakeBackbone, tower: TowerName, kind: str) -> None:
    """Never None: ranks would wait for one another's gradients. The tower's are zero, and loss sums are right."""
    backbone = make_backbone(tower)
    model = _model(backbone)
    examples = [] if kind == "empty" else [encoded(backbone, []).example]
    total, by_source, found = _backward(model, [row(backbone, examples)])
    for name, parameter in model.named_parameters():
        gradient = found[name]
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None and (kind == "empty" or part_of(name) != "language_model"):
            assert not gradient.any(), name
    assert (total == 0.0) == (kind == "empty")
    assert float(by_source.sum()) == pytest.approx(total)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_every_trained_parameter_has_a_gradient(make_backbone: MakeBackbone, tower: TowerName, layer: int) -> None:
    """A trained but unused tensor would still decay: with pictures in the row none is without a gradient."""
    backbone = _with_layer(make_backbone(tower), layer)
    model = _model(backbone)
    _, _, found = _backward(model, [row(backbone, [sample.example for sample in mixed(backbone)])])
    for name, parameter in model.named_parameters():
        gradient = found[name]
        if parameter.requires_grad and not is_key_bias(name):
            assert gradient is not None, name
            assert gradient.any(), name
        assert parameter.requires_grad or gradient is None, name
    assert num_parameters(model, "vision_tower", trained=True) > 0


@pytest.mark.parametrize(
    "parts", [("projector",), ("projector", "image_newline"), ("language_model",), ("vision_tower",), PARTS, ()]
)
def test_exactly_the_named_parts_train(make_backbone: MakeBackbone, parts: tuple[str, ...]) -> None:
    """Freezing is by part; gradients of trained parts do not depend on what else is frozen."""
    backbone = make_backbone()
    examples = [sample.example for sample in mixed(backbone)]
    everything = _backward(_model(backbone), [row(backbone, examples)])[2]
    model = _model(make_backbone(), parts=parts)
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(parts)
    if parts:
        found = _backward(model, [row(backbone, examples)])[2]
        assert worst_difference(found, everything, [n for n, g in found.items() if g is not None]) < 1e-5
        assert {part_of(name) for name, gradient in found.items() if gradient is not None} == set(parts)


def test_an_unknown_part_is_refused(make_backbone: MakeBackbone) -> None:
    """With the parts that exist; and no parameter is outside of the parts."""
    model = _model(make_backbone())
    with pytest.raises(ModelError, match=r"'connector'.*vision_tower, projector"):
        set_trained_parts(model, ["connector"])
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)
    with pytest.raises(ModelError, match="no part"):
        part_of("hf.model.somewhere.weight")


def test_shared_tiles_equal_separate_tiles(make_backbone: MakeBackbone) -> None:
    """Two questions about one picture: seen once or twice, the same losses and gradients."""
    backbone = make_backbone()
    model = _model(backbone)
    first = encoded(backbone, [(45, 61)], seed=1).example
    layout = encoded(backbone, [(45, 61)], seed=2).example.layout
    shared = _backward(model, [row(backbone, [first, Example(layout, first.tiles)])])
    separate = _backward(model, [row(backbone, [first, Example(layout, first.tiles.copy())])])
    torch.testing.assert_close(shared[1], separate[1], rtol=1e-5, atol=0)
    assert worst_difference(shared[2], separate[2], shared[2]) < 1e-5


def test_sample_weighting_is_the_sum_of_means(make_backbone: MakeBackbone) -> None:
    """loss_weighting sample: the row's loss is the sum of its samples' mean losses; token counts stay."""
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


def test_scores_are_the_losses_and_greedy_hits(make_backbone: MakeBackbone) -> None:
    """`score` gives each token's loss, and whether stock transformers' most likely token is the true one."""
    backbone = make_backbone()
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)], rounds=3)
    batch = row(backbone, [sample.example])
    scores = model.score(batch)
    assert float(scores.losses.sum()) == pytest.approx(float(model(batch)[0].detach()), rel=1e-5)
    inputs = stock_inputs(backbone, sample)
    with torch.no_grad():
        logits = stock_twin(model, backbone)(**inputs).logits[0, batch.target_positions]
    # Make half of the targets hits, so that both values are seen.
    best = logits.argmax(-1)
    batch = replace(batch, target_ids=torch.where(torch.arange(len(best)) % 2 == 0, best, (best + 1) % 500))
    assert model.score(batch).hits.tolist() == [index % 2 == 0 for index in range(len(best))]


def test_tiles_are_normalised_as_the_stock_processor_does(make_backbone: MakeBackbone) -> None:
    """(x / 255 - mean) / std as one multiply-add: the stock processor's pixels to rounding."""
    backbone = make_backbone()
    model = _model(backbone)
    sample = encoded(backbone, [(45, 61)])
    tiles = torch.from_numpy(sample.example.tiles)
    ours = tiles.permute(0, 3, 1, 2) * model.tile_scale + model.tile_shift
    theirs = stock_inputs(backbone, sample)["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tower", EVERY_TOWER)
def test_recompute_changes_nothing(make_backbone: MakeBackbone, tower: TowerName) -> None:
    """The same losses and bit-equal gradients; and fewer tensors kept, or it would be in name only."""
    backbone = make_backbone(tower)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])

    def run(parts: tuple[str, ...]) -> tuple[float, dict[str, torch.Tensor | None], int]:
        model = _model(backbone).eval()  # as pretrained parts come
        set_recompute(model, parts)
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, _, _ = model(batch)
        total.backward()
        return float(total.detach()), gradients(model), sum(kept)

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


def test_only_stacks_of_blocks_are_recomputed(make_backbone: MakeBackbone) -> None:
    """A projector has nothing to run again."""
    with pytest.raises(ModelError, match="recompute: 'projector' is no stack of blocks"):
        set_recompute(_model(make_backbone("clip")), ("projector",))


@pytest.mark.parametrize(
    ("part", "key"), [("language_model", "attention_dropout"), ("vision_tower", "attention_dropout")]
)
def test_dropout_is_refused(tmp_path: Path, part: str, key: str) -> None:
    """With the key and the way out."""
    config = tiny_model(tmp_path)
    owner = getattr(config, part)
    config = replace(config, **{part: replace(owner, overrides={key: 0.1})})
    with pytest.raises(ModelError, match=rf"model.{part}: .*{key}=0.1.*set {key}: 0.0 in model.{part}.overrides"):
        build_model(read_backbone(config), dtype=torch.float32, seed=0)
