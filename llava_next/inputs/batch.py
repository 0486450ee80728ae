"""Packs examples into a row and computes the tensors of a micro-step.

A row is one sequence without padding; attention stays inside its segments, one per example, and positions restart in
each. Data workers compute all indices here, so that the model runs one vision call, one gather and one indexed write
without a loop over samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from llava_next.inputs.anyres import NEWLINE, ImageLayout
from llava_next.inputs.bilinear import WeightedRows, by_row, reduced_map
from llava_next.inputs.processor import IGNORE, Example


@dataclass(frozen=True)
class Segments:
    """The bounds of the samples in a row.

    Attributes:
        bounds: int32 [num_samples + 1], from 0 to T.
        lengths: of the samples in tokens, on the host.
        num_targets: supervised tokens of each sample, on the host.
        max_length: the largest of `lengths`. It is stored because torch.compile would recompile code that computes it
            for every tuple of lengths.
    """

    bounds: torch.Tensor
    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] = ()
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_length", max(self.lengths))


@dataclass(frozen=True)
class Batch:
    """The input of one micro-step of one rank: one row of T tokens.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        segments: bounds of the samples in the row.
        tiles: uint8 [N, S, S, 3]; one blank tile if no sample has an image, so that every part always runs.
        image_positions: int64 [K], positions of the image tokens in the row.
        image_sources: int64 [K], rows of [tile features (N * patches); newline; tokens of reduced feature maps (R)].
        reduced_rows: int64 [R, 4], the rows of tile features whose weighted sums are the reduced tokens.
        reduced_weights: float32 [R, 4], their weights.
        reduced_uses: int64 [N * patches, U], for each row of tile features the reduced tokens that it is part of.
        reduced_use_weights: float32 [N * patches, U], its weights; 0 where there are fewer than U.
        target_positions: int64 [L], positions whose next token is supervised.
        target_ids: int64 [L], the supervised next tokens.
        target_sources: int64 [L], index of the data source of each target.
        target_samples: int64 [L], index of the row's sample of each target.
        target_weights: float32 [L], weight of each target in the loss sum.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    tiles: torch.Tensor
    image_positions: torch.Tensor
    image_sources: torch.Tensor
    reduced_rows: torch.Tensor
    reduced_weights: torch.Tensor
    reduced_uses: torch.Tensor
    reduced_use_weights: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_sources: torch.Tensor
    target_samples: torch.Tensor
    target_weights: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Returns a copy on a device. The copy is asynchronous if the host memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns a copy in pinned memory; called by torch's DataLoader with `pin_memory=True`."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":  # type: ignore[no-untyped-def]
        mapped: dict[str, object] = {
            item.name: function(getattr(self, item.name))
            for item in fields(self)
            if isinstance(getattr(self, item.name), torch.Tensor)
        }
        mapped["segments"] = replace(self.segments, bounds=function(self.segments.bounds))
        return replace(self, **mapped)  # type: ignore[arg-type]


def collate(
    examples: Sequence[Example],
    *,
    tile: int,
    patches_per_tile: int,
    source_ids: Sequence[int] | None = None,
    per_sample: bool = False,
) -> Batch:
    """Packs examples, in order, into one row.

    The tower runs once for examples whose `tiles` are the same array (several questions about one image).

    Args:
        examples: encoded samples. An empty sequence gives the row of a rank without samples in this micro-step: one
            unsupervised token of id 0 and a blank tile.
        tile: side of a tile in pixels.
        patches_per_tile: feature rows per tile.
        source_ids: index of the data source of each example; None means 0.
        per_sample: weight each token by the reciprocal of its sample's number of supervised tokens (loss_weighting:
            sample).

    Raises:
        ValueError: the number of image tokens of an example is not the number of its features.
    """
    source_ids = source_ids if source_ids is not None else [0] * len(examples)
    lengths = [example.layout.num_tokens for example in examples] or [1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = [example.layout.ids for example in examples] or [np.zeros(1, dtype=np.int32)]

    tiles, first_tiles = _distinct_tiles(examples)
    num_feature_rows = max(sum(map(len, tiles)), 1) * patches_per_tile
    image_positions, images, targets = [], _ImageSources(num_feature_rows), _Targets()
    for index, (example, first_tile) in enumerate(zip(examples, first_tiles, strict=True)):
        layout, start = example.layout, int(starts[index])
        offset = first_tile * patches_per_tile
        for image in layout.images:
            images.add(image, offset)
            offset += image.num_tiles * patches_per_tile
        image_positions.append(start + _image_token_positions(example))
        targets.add(layout.labels, start, index, source_ids[index], per_sample)

    reduced = images.reduced
    uses = by_row(reduced, num_feature_rows)
    blank = np.zeros((1, tile, tile, 3), dtype=np.uint8)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        segments=Segments(
            torch.from_numpy(starts.astype(np.int32)), tuple(lengths), tuple(map(len, targets.positions))
        ),
        tiles=torch.from_numpy(np.concatenate(tiles) if tiles else blank),
        image_positions=_int64(image_positions),
        image_sources=_int64(images.sources),
        reduced_rows=torch.from_numpy(reduced.rows),
        reduced_weights=torch.from_numpy(reduced.weights),
        reduced_uses=torch.from_numpy(uses.rows),
        reduced_use_weights=torch.from_numpy(uses.weights),
        target_positions=_int64(targets.positions),
        target_ids=_int64(targets.ids),
        target_sources=_int64(targets.sources),
        target_samples=_int64(targets.samples),
        target_weights=torch.from_numpy(_concatenate(targets.weights, np.float32)),
    )


def _distinct_tiles(examples: Sequence[Example]) -> tuple[list[np.ndarray], list[int]]:
    """The distinct arrays of tiles, and for each example the index of its first tile in their concatenation."""
    tiles: list[np.ndarray] = []
    first_of: dict[int, int] = {}
    first_tiles, num_tiles = [], 0
    for example in examples:
        if id(example.tiles) not in first_of:
            first_of[id(example.tiles)] = num_tiles
            num_tiles += len(example.tiles)
            if len(example.tiles):
                tiles.append(example.tiles)
        first_tiles.append(first_of[id(example.tiles)])
    return tiles, first_tiles


class _ImageSources:
    """Accumulates the sources of a row's image tokens, and the reduced feature maps among them.

    Args:
        num_feature_rows: rows of tile features.
    """

    def __init__(self, num_feature_rows: int) -> None:
        self._newline = num_feature_rows
        self._num_reduced = 0
        self._first_reduced: dict[tuple[int, ImageLayout], int] = {}
        self._rows: list[np.ndarray] = [np.zeros((0, 4), dtype=np.int64)]
        self._weights: list[np.ndarray] = [np.zeros((0, 4), dtype=np.float32)]
        self.sources: list[np.ndarray] = []

    def add(self, image: ImageLayout, offset: int) -> None:
        """Adds an image whose first row of tile features is `offset`."""
        sources = image.token_sources()
        in_row = np.where(sources == NEWLINE, self._newline, sources + offset)
        if image.reduced_hw is not None:
            num_rows = image.num_tiles * image.patches_per_side**2
            is_reduced = sources >= num_rows
            in_row[is_reduced] = self._newline + 1 + self._reduce(image, offset) + sources[is_reduced] - num_rows
        self.sources.append(in_row)

    def _reduce(self, image: ImageLayout, offset: int) -> int:
        """Number of the image's first reduced token. A map that several examples share is reduced once."""
        key = (offset, image)
        if key not in self._first_reduced:
            tokens = reduced_map(image)
            self._rows.append(tokens.rows + offset)
            self._weights.append(tokens.weights)
            self._first_reduced[key] = self._num_reduced
            self._num_reduced += image.num_reduced
        return self._first_reduced[key]

    @property
    def reduced(self) -> WeightedRows:
        """The tokens of all reduced feature maps."""
        return WeightedRows(np.concatenate(self._rows), np.concatenate(self._weights))


class _Targets:
    """Accumulates the supervised positions of a row, one sample at a time."""

    def __init__(self) -> None:
        self.positions: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.sources: list[np.ndarray] = []
        self.samples: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add(self, labels: np.ndarray, start: int, sample: int, source: int, per_sample: bool) -> None:
        # The first token of a sample has no preceding position that could predict it.
        positions = np.flatnonzero(labels[1:] != IGNORE)
        num_targets = len(positions)
        self.positions.append(start + positions)
        self.ids.append(labels[positions + 1])
        self.sources.append(np.full(num_targets, source))
        self.samples.append(np.full(num_targets, sample))
        self.weights.append(np.full(num_targets, 1.0 / max(num_targets, 1) if per_sample else 1.0))


def _image_token_positions(example: Example) -> np.ndarray:
    positions = np.flatnonzero(example.layout.ids == example.layout.image_token_id)
    expected = sum(image.num_tokens for image in example.layout.images)
    if len(positions) != expected:
        raise ValueError(f"{len(positions)} image tokens in the ids, but the images have {expected} features")
    return positions


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(_concatenate(parts, np.int64))
