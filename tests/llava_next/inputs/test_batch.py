"""The indices of a packed row: positions of samples, image tokens and targets."""

import numpy as np
import pytest
import torch

from llava_next.inputs.anyres import NEWLINE
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import IGNORE, Example
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, mixed, row


def test_index_arithmetic_of_a_mixed_row(make_backbone: MakeBackbone) -> None:
    """Bounds, positions, image sources and targets equal those of a loop over the samples."""
    backbone = make_backbone()
    examples = [sample.example for sample in mixed(backbone)]
    batch = row(backbone, examples)
    patches = backbone.patches_per_side**2

    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    image_positions: list[int] = []
    targets: list[tuple[int, int, int]] = []
    first_tile, num_tiles = 0, sum(len(example.tiles) for example in examples)
    for number, example in enumerate(examples):
        start = len(ids)
        for index, token in enumerate(example.layout.ids):
            if token == example.layout.image_token_id:
                image_positions.append(start + index)
        for image in example.layout.images:
            for source in image.token_sources():
                sources.append(num_tiles * patches if source == NEWLINE else first_tile * patches + int(source))
            first_tile += image.num_tiles
        for index, label in enumerate(example.layout.labels):
            if label != IGNORE and index > 0:
                targets.append((start + index - 1, int(label), number))
        ids += example.layout.ids.tolist()
        positions += range(len(example.layout.ids))

    assert batch.input_ids.tolist() == [ids]
    assert batch.position_ids.tolist() == [positions]
    assert batch.segments.lengths == tuple(example.layout.num_tokens for example in examples)
    assert batch.segments.bounds.tolist() == [0, *np.cumsum(batch.segments.lengths).tolist()]
    assert batch.segments.bounds.dtype == torch.int32
    assert batch.image_positions.tolist() == image_positions
    assert batch.image_sources.tolist() == sources
    batch_targets = zip(
        batch.target_positions.tolist(), batch.target_ids.tolist(), batch.target_samples.tolist(), strict=True
    )
    assert list(batch_targets) == targets
    assert torch.equal(batch.target_sources, batch.target_samples)  # each sample is its own source
    assert torch.equal(batch.tiles, torch.from_numpy(np.concatenate([example.tiles for example in examples])))
    assert batch.tiles.dtype == torch.uint8
    assert len(batch.target_ids) == sum(example.layout.num_supervised for example in examples)


def test_targets_do_not_cross_samples(make_backbone: MakeBackbone) -> None:
    """The last token of a sample does not predict the first token of the next."""
    backbone = make_backbone()
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    last_positions = set((batch.segments.bounds[1:] - 1).tolist())
    assert not last_positions & set(batch.target_positions.tolist())


def test_weights_of_a_sample_sum_to_one(make_backbone: MakeBackbone) -> None:
    """loss_weighting sample: the weights of a sample sum to one; loss_weighting token: each weight is one."""
    backbone = make_backbone()
    examples = [sample.example for sample in mixed(backbone)]
    by_sample = row(backbone, examples, per_sample=True)
    sums = torch.zeros(len(examples)).index_add_(0, by_sample.target_samples, by_sample.target_weights)
    torch.testing.assert_close(sums, torch.ones(len(examples)))
    assert (row(backbone, examples).target_weights == 1).all()


def test_empty_row(make_backbone: MakeBackbone) -> None:
    """A rank without samples has a row of one unsupervised token and a blank tile, so that every part runs."""
    batch = row(make_backbone(), [])
    assert batch.input_ids.shape == (1, 1)
    assert batch.segments.bounds.tolist() == [0, 1]
    assert batch.tiles.shape == (1, 28, 28, 3)
    assert not batch.tiles.any()
    for tensor in (batch.image_positions, batch.image_sources, batch.target_positions, batch.target_ids):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64


def test_shared_tiles_are_packed_once(make_backbone: MakeBackbone) -> None:
    """Image tokens of two samples with the same array of tiles have the same feature rows."""
    backbone = make_backbone()
    first = encoded(backbone, [(45, 61)], seed=1).example
    between = encoded(backbone, [(20, 20)], seed=2).example
    again = Example(encoded(backbone, [(45, 61)], seed=3).example.layout, first.tiles)
    batch = row(backbone, [first, between, again])
    assert len(batch.tiles) == len(first.tiles) + len(between.tiles)
    per_sample = np.split(batch.image_sources.numpy(), np.cumsum([
        sum(image.num_tokens for image in example.layout.images) for example in (first, between)
    ]))  # fmt: skip
    np.testing.assert_array_equal(per_sample[0], per_sample[2])


def test_image_token_count_must_match(make_backbone: MakeBackbone) -> None:
    """Another number of image tokens in the ids is an error with both numbers."""
    backbone = make_backbone()
    example = encoded(backbone, [(45, 61)]).example
    at = int(np.flatnonzero(example.layout.ids == example.layout.image_token_id)[0])
    example.layout.ids[at] = 5
    with pytest.raises(ValueError, match=r"\d+ image tokens in the ids, but the images have \d+ features"):
        collate([example], tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
