"""Examples → one packed row → the tensors that one micro-step takes.

Workers do all of the index arithmetic here, as integers, so that the device does one vision call, one gather and one
indexed write and never loops over samples. A row is one sequence without padding; attention stays inside the
segments (one per example) and positions restart at each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from llava_next.inputs.anyres import NEWLINE
from llava_next.inputs.processor import IGNORE, Example


@dataclass(frozen=True)
class Segments:
    """Bounds of a row's samples: `bounds` int32 [num_samples + 1], from 0 to T; on the host `lengths`, the longest, and
    how many supervised tokens each has (`num_targets`).

    `max_length` is a value of its own: code that asks `lengths` for it is compiled anew for every list of them.
    """

    bounds: torch.Tensor
    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] = ()
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_length", max(self.lengths))


@dataclass(frozen=True)
class Batch:
    """What one micro-step of one rank takes: one row of T tokens.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        segments: the samples' bounds in the row.
        tiles: uint8 [N, S, S, 3]; one blank tile when no sample has a picture, so that every part always runs.
        image_positions: int64 [K], positions of the image tokens in the row.
        image_sources: int64 [K], rows of [tile features (N * patches); newline], the newline being the last row.
        target_positions: int64 [L], positions whose next token is supervised.
        target_ids: int64 [L], those next tokens.
        target_sources: int64 [L], the number of the data source of each.
        target_samples: int64 [L], the row's sample each belongs to.
        target_weights: float32 [L], each token's weight in the loss sum.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    tiles: torch.Tensor
    image_positions: torch.Tensor
    image_sources: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_sources: torch.Tensor
    target_samples: torch.Tensor
    target_weights: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies are asynchronous where the host memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader when `pin_memory` is set."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":  # type: ignore[no-untyped-def]
        changed: dict[str, object] = {
            item.name: function(getattr(self, item.name))
            for item in fields(self)
            if isinstance(getattr(self, item.name), torch.Tensor)
        }
        changed["segments"] = replace(self.segments, bounds=function(self.segments.bounds))
        return replace(self, **changed)  # type: ignore[arg-type]


def collate(
    examples: Sequence[Example],
    *,
    tile: int,
    patches_per_tile: int,
    source_ids: Sequence[int] | None = None,
    per_sample: bool = False,
) -> Batch:
    """Packs examples, in order, into one row.

    Examples that hold the very same array of tiles (several questions about one picture) share its features: the
    tower sees them once.

    Args:
        examples: encoded samples; none makes the row of a rank that has nothing left in this micro-step: one
            unsupervised token of id 0 with a blank tile.
        tile: side of a tile in pixels.
        patches_per_tile: feature rows per tile.
        source_ids: the data source of each example (0 if not given).
        per_sample: weigh each token by one over its sample's supervised tokens (loss_weighting: sample).
    """
    source_ids = source_ids if source_ids is not None else [0] * len(examples)
    lengths = [example.layout.num_tokens for example in examples] or [1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = [example.layout.ids for example in examples] or [np.zeros(1, dtype=np.int32)]

    tiles, first_tiles = _distinct_tiles(examples)
    newline_row = max(sum(map(len, tiles)), 1) * patches_per_tile
    image_positions, image_sources, targets = [], [], _Targets()
    for index, (example, first_tile) in enumerate(zip(examples, first_tiles, strict=True)):
        layout, start = example.layout, int(starts[index])
        offset = first_tile * patches_per_tile
        for image in layout.images:
            sources = image.token_sources()
            image_sources.append(np.where(sources == NEWLINE, newline_row, sources + offset))
            offset += image.num_tiles * patches_per_tile
        image_positions.append(start + _image_token_positions(example))
        targets.add(layout.labels, start, index, source_ids[index], per_sample)

    blank = np.zeros((1, tile, tile, 3), dtype=np.uint8)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        segments=Segments(
            torch.from_numpy(starts.astype(np.int32)), tuple(lengths), tuple(map(len, targets.positions))
        ),
        tiles=torch.from_numpy(np.concatenate(tiles) if tiles else blank),
        image_positions=_int64(image_positions),
        image_sources=_int64(image_sources),
        target_positions=_int64(targets.positions),
        target_ids=_int64(targets.ids),
        target_sources=_int64(targets.sources),
        target_samples=_int64(targets.samples),
        target_weights=torch.from_numpy(_joined(targets.weights, np.float32)),
    )


def _distinct_tiles(examples: Sequence[Example]) -> tuple[list[np.ndarray], list[int]]:
    """Each array of tiles once, and for each example the number of its first tile among them."""
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


class _Targets:
    """The supervised positions of a row, gathered sample by sample."""

    def __init__(self) -> None:
        self.positions: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.sources: list[np.ndarray] = []
        self.samples: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add(self, labels: np.ndarray, start: int, sample: int, source: int, per_sample: bool) -> None:
        # The first token of a sample is predicted by nothing: there is no position before it.
        at = np.flatnonzero(labels[1:] != IGNORE)
        self.positions.append(start + at)
        self.ids.append(labels[at + 1])
        self.sources.append(np.full(len(at), source))
        self.samples.append(np.full(len(at), sample))
        self.weights.append(np.full(len(at), 1.0 / max(len(at), 1) if per_sample else 1.0))


def _image_token_positions(example: Example) -> np.ndarray:
    positions = np.flatnonzero(example.layout.ids == example.layout.image_token_id)
    expected = sum(image.num_tokens for image in example.layout.images)
    if len(positions) != expected:
        raise ValueError(f"{len(positions)} image tokens in the ids but the pictures make {expected} features")
    return positions


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(_joined(parts, np.int64))
