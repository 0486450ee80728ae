"""Computes the loss of held-out samples by source, as training does: on whole conversations in packed rows.

It is used during training (`evaluate.every`) and by `python -m train.evaluate`. Every rank runs the same number of
rows, forward only, and no weight changes.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import epoch_permutation
from data_recipes.schema.sample import DataError
from data_recipes.store.reader import Store, StoredSample, StoredText
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.flops import StepCosts
from llava_next.model.llava_next import LossSums
from train.config.schema import PackingConfig
from train.data.packing import assign_rows
from train.distributed.device_copies import to_device, to_host
from train.distributed.world import World, all_gather_objects

_PACKED_TOGETHER = 256
"""Samples that are assigned to rows at a time: enough to fill rows well, few enough that the assignment is fast."""


@dataclass(frozen=True)
class HeldOutSample:
    """One held-out sample, which `text` and `read` read on demand."""

    source: str
    text: Callable[[], StoredText]
    read: Callable[[], StoredSample]


def list_mixture_samples(mixture: Mixture) -> dict[str, list[HeldOutSample]]:
    """Returns the held-out samples of each source that has any, in the order of their hashes."""
    by_source = {
        source: [
            HeldOutSample(
                source, partial(mixture.heldout_text, source, number), partial(mixture.heldout_sample, source, number)
            )
            for number in mixture.heldout(source)
        ]
        for source in mixture.source_names
    }
    return {source: samples for source, samples in by_source.items() if samples}


def list_store_samples(path: Path, num: int | None = None, seed: int | None = None) -> list[HeldOutSample]:
    """Returns samples of a prepared source in its order: all, the first `num`, or `num` samples drawn with `seed`.

    Raises:
        DataError: there is no such store.
    """
    store = Store.open(path)
    numbers: Iterable[int] = range(len(store))[:num]
    if seed is not None and num is not None:
        numbers = sorted(epoch_permutation(len(store), seed, 0)[:num].tolist())
    return [HeldOutSample(store.name, partial(store.text, n), partial(store.sample, n)) for n in numbers]


def encode_sample(held_out: HeldOutSample, processor: Processor) -> Example:
    """Reads and encodes a sample that the stage does not reject.

    Raises:
        DataError: it cannot be read or encoded; the message names it.
    """
    sample = held_out.read()
    try:
        return processor.encode(sample.messages, sample.sizes_hw, sample.images)
    except (OSError, ValueError) as error:
        raise DataError(f"held-out sample {sample.id!r} of source {sample.source}: {error}") from error


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out samples and this rank's rows of them.

    Attributes:
        rows: positions in `samples`, one row per micro-step. Every rank has the same number of rows; some may be empty.
        per_sample: weigh every sample equally, as `loss_weighting: sample` does.
        num_rejected: samples by source that are too long for the stage or have no supervised token.
    """

    source_names: tuple[str, ...]
    samples: Sequence[HeldOutSample]
    rows: tuple[tuple[int, ...], ...]
    processor: Processor
    per_sample: bool = False
    num_rejected: dict[str, int] = field(default_factory=dict)

    def make_batch(self, row: Sequence[int]) -> Batch:
        """Reads and encodes a row of `rows`.

        Raises:
            DataError: a sample cannot be read or encoded; the message names it.
        """
        geometry = self.processor.config
        samples = [self.samples[position] for position in row]
        return collate(
            [encode_sample(sample, self.processor) for sample in samples],
            tile=geometry.tile,
            patches_per_tile=geometry.patches_per_side**2,
            source_ids=[self.source_names.index(sample.source) for sample in samples],
            per_sample=self.per_sample,
        )

    def compute_metrics(
        self, forward: Callable[[Batch], Any], world: World, enter: Callable[[int], None]
    ) -> dict[str, float]:
        """Returns `eval/<source>/loss` over all ranks and `perf/evaluate_s`. Every rank must call it.

        Args:
            forward: see `compute_sums`.
            enter: called with the number of each row before it is computed.
        """
        started = time.monotonic()
        sums = torch.stack(all_gather_objects(world, self.compute_sums(forward, world.device, enter))).sum(0)
        losses = {f"eval/{name}/loss": loss for name, loss in self.compute_losses(sums).items()}
        return losses | {"perf/evaluate_s": time.monotonic() - started}

    def compute_sums(
        self, forward: Callable[[Batch], Any], device: torch.device, enter: Callable[[int], None] = lambda _: None
    ) -> torch.Tensor:
        """Returns loss sums, supervised tokens and samples by source on this rank: float64 [3, num_sources], on CPU.

        The model stays in training mode, which makes no difference without dropout.

        Args:
            forward: `LlavaNext.forward`, or the engine of such a model.
            enter: see `compute_metrics`.
        """
        total = torch.zeros(3, len(self.source_names), dtype=torch.float64)
        for number, row in enumerate(self.rows):
            enter(number)
            total += self.compute_row_sums(row, forward, device)
        return total

    @torch.no_grad()
    def compute_row_sums(
        self, row: Sequence[int], forward: Callable[[Batch], Any], device: torch.device
    ) -> torch.Tensor:
        """Returns what `compute_sums` adds up for one row of `rows`: float64 [3, num_sources], on the CPU."""
        loss = LossSums(*forward(to_device(self.make_batch(row), device)))
        num_samples = torch.zeros(len(self.source_names), dtype=torch.float64)
        for position in row:
            num_samples[self.source_names.index(self.samples[position].source)] += 1
        return torch.stack([to_host(loss.by_source.double()), to_host(loss.tokens_by_source.double()), num_samples])

    def compute_losses(self, sums: torch.Tensor) -> dict[str, float]:
        """Returns the mean loss of each source, defined as `train/loss/<source>` is.

        Args:
            sums: `compute_sums`, added over all ranks.
        """
        divisors = sums[2] if self.per_sample else sums[1]
        return {
            name: float(loss / divisor)
            for name, loss, divisor in zip(self.source_names, sums[0], divisors, strict=True)
            if divisor > 0
        }


def build_held_out(
    samples: Mapping[str, Sequence[HeldOutSample]],
    source_names: Sequence[str],
    processor: Processor,
    packing: PackingConfig,
    costs: StepCosts,
    *,
    per_sample: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> HeldOutSet:
    """Determines the lengths of the samples and assigns them to rows; every rank computes the same assignment.

    Samples that are too long for the stage or have no supervised token are rejected and counted, as in training.

    Args:
        samples: by source, in the order in which they are used.
        source_names: names of the model's per-source sums.
        packing: budgets of a row; raised to the largest sample if that exceeds them.
        per_sample: weigh every sample equally, as `loss_weighting: sample` does.

    Raises:
        ModelError: a stored sample's placeholders and images differ in number.
    """
    accepted: list[HeldOutSample] = []
    sizes: list[tuple[int, int, int]] = []
    num_rejected: Counter[str] = Counter()
    for held_out in (sample for of_source in samples.values() for sample in of_source):
        text = held_out.text()
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected:
            num_rejected[held_out.source] += 1
            continue
        accepted.append(held_out)
        sizes.append((layout.num_tokens, layout.num_tiles, layout.num_supervised))
    rows = pack_rows(sizes, packing, costs, rank=rank, num_ranks=num_ranks)
    return HeldOutSet(tuple(source_names), accepted, rows, processor, per_sample, dict(num_rejected))


def pack_rows(
    sizes: Sequence[tuple[int, int, int]], packing: PackingConfig, costs: StepCosts, *, rank: int, num_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """Assigns samples to rows and returns those of one rank, as positions in `sizes`.

    Args:
        sizes: tokens, tiles and supervised tokens of each sample.

    Returns:
        The rows of `rank`; every rank has the same number of rows.
    """
    lengths = np.array(sizes, dtype=np.int64).reshape(-1, 3)
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(lengths), _PACKED_TOGETHER):
        tokens, tiles, supervised = lengths[start : start + _PACKED_TOGETHER].T
        budgets = PackingConfig(max(packing.max_tokens, int(tokens.max())), max(packing.max_tiles, int(tiles.max())))
        assignment = assign_rows(
            tokens, tiles, costs.flops(tokens, tiles, supervised), num_ranks=num_ranks, budgets=budgets
        )
        rows += [tuple(start + position for position in micro_step[rank]) for micro_step in assignment.rows]
    return tuple(rows)
