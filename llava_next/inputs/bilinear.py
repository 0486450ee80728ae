"""Bilinear reduction of feature maps as weighted sums of rows.

Each token of a reduced feature map is a weighted sum of four rows of tile features. The same weights listed by row
instead of by token give the backward pass as sums of the same form, so that no gradient is added to from two places and
the result on a GPU is deterministic.
"""

from dataclasses import dataclass

import numpy as np

from llava_next.inputs.anyres import ImageLayout


@dataclass(frozen=True)
class WeightedRows:
    """Weighted sums of rows of a table: the i-th is the sum over k of weights[i, k] * table[rows[i, k]].

    Attributes:
        rows: int64 [num_sums, K].
        weights: float32 [num_sums, K].
    """

    rows: np.ndarray
    weights: np.ndarray


def reduced_map(image: ImageLayout) -> WeightedRows:
    """The tokens of an image's reduced feature map, row by row, as sums of rows of the image's tile features.

    The values are those of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` on the unpadded
    feature map.

    Returns:
        K is 4.
    """
    assert image.reduced_hw is not None, "the feature map is not reduced"
    (row_places, row_weights), (col_places, col_weights) = (
        _interpolate(size, new_size) for size, new_size in zip(image.kept_hw, image.reduced_hw, strict=True)
    )
    rows = image.kept_features()[row_places[:, None, :, None], col_places[None, :, None, :]]
    weights = row_weights[:, None, :, None] * col_weights[None, :, None, :]
    return WeightedRows(rows.reshape(-1, 4), weights.reshape(-1, 4))


def _interpolate(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation along one side.

    Returns:
        For each new place the two old places, int64 [new_size, 2], and their weights, float32 [new_size, 2].
    """
    # torch computes positions in fp32, with one rounding for the product and the difference (fused multiply-add).
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = np.maximum((scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(position.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    weight = np.clip(position - first.astype(np.float32), np.float32(0), np.float32(1))
    return np.stack([first, second], axis=1), np.stack([np.float32(1) - weight, weight], axis=1)


def by_row(sums: WeightedRows, num_rows: int) -> WeightedRows:
    """The transposed sums: for each row of the table, the sums that it is part of.

    Args:
        sums: of rows of the table.
        num_rows: of the table.

    Returns:
        [num_rows, K], with as many entries K as the row that is used most often has; missing entries have weight 0.
    """
    rows = sums.rows.ravel()
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=num_rows)
    most = int(counts.max(initial=0))
    starts = np.cumsum(counts) - counts
    place = np.arange(len(rows)) - starts[rows[order]]
    uses, weights = np.zeros((num_rows, most), dtype=np.int64), np.zeros((num_rows, most), dtype=np.float32)
    uses[rows[order], place] = order // sums.rows.shape[1]
    weights[rows[order], place] = sums.weights.ravel()[order]
    return WeightedRows(uses, weights)
