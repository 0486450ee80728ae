"""The loss of held-out samples, by source, computed as training computes it: whole conversations, packed rows, sums.

Owns which samples those are, dealing them to the ranks that exist, and the division at the end. The live engine uses it
during training (`evaluate.every`), `python -m train.evaluate` on an export. Nothing here changes a weight: every rank
runs as many rows as every other, forward only.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from train.distributed.world import World, all_gather_objects

_DEALT_AT_ONCE = 256
"""Samples that are dealt together: enough to fill rows well, few enough that dealing takes no time."""


@dataclass(frozen=True)
class HeldOutSample:
    """One sample that is read when it is asked for."""

    source: str
    text: Callable[[], StoredText]
    read: Callable[[], StoredSample]


def of_mixture(mixture: Mixture) -> dict[str, list[HeldOutSample]]:
    """The held-out samples of each source that has some, in the order of their hashes."""
    found = {
        source: [
            HeldOutSample(
                source, partial(mixture.heldout_text, source, number), partial(mixture.heldout_sample, source, number)
            )
            for number in mixture.heldout(source)
        ]
        for source in mixture.source_names
    }
    return {source: samples for source, samples in found.items() if samples}


def of_store(path: Path, num: int | None = None, seed: int | None = None) -> list[HeldOutSample]:
    """Samples of a prepared source, in its order: all, the first `num`, or with a seed `num` drawn by it.

    Raises:
        DataError: there is no such store.
    """
    store = Store.open(path)
    numbers: Iterable[int] = range(len(store))[:num]
    if seed is not None and num is not None:
        numbers = sorted(epoch_permutation(len(store), seed, 0)[:num].tolist())
    return [HeldOutSample(store.name, partial(store.text, n), partial(store.sample, n)) for n in numbers]


def encoded(held_out: HeldOutSample, processor: Processor) -> Example:
    """A sample that has a place in the stage, read and encoded.

    Raises:
        DataError: it cannot be; names it.
    """
    sample = held_out.read()
    try:
        return processor.encode(sample.messages, sample.sizes_hw, sample.pictures)
    except (OSError, ValueError) as error:
        raise DataError(f"held-out sample {sample.id!r} of source {sample.source}: {error}") from error


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples as rows.

    `rows` are this rank's, one a micro-step, as positions in `samples`; every rank has as many, some of them empty.
    `left_out` counts the samples of each source that have no place in the stage.
    """

    source_names: tuple[str, ...]
    samples: Sequence[HeldOutSample]
    rows: tuple[tuple[int, ...], ...]
    processor: Processor
    per_sample: bool = False
    left_out: dict[str, int] = field(default_factory=dict)

    def batches(self) -> Iterator[Batch]:
        """This rank's rows, read and encoded as they are asked for.

        Raises:
            DataError: a sample cannot be read or encoded; names it.
        """
        geometry = self.processor.config
        for row in self.rows:
            samples = [self.samples[place] for place in row]
            yield collate(
                [encoded(sample, self.processor) for sample in samples],
                tile=geometry.tile,
                patches_per_tile=geometry.patches_per_side**2,
                source_ids=[self.source_names.index(sample.source) for sample in samples],
                per_sample=self.per_sample,
            )

    def metrics(self, forward: Callable[[Batch], Any], world: World, enter: Callable[[int], None]) -> dict[str, float]:
        """`eval/<source>/loss` of all ranks together, and how long it took. Every rank must ask.

        Args:
            forward: as `sums` takes it.
            enter: told the number of each row before it begins.
        """
        started = time.monotonic()
        sums = torch.stack(all_gather_objects(world, self.sums(forward, world.device, enter))).sum(0)
        losses = {f"eval/{name}/loss": loss for name, loss in self.losses(sums).items()}
        return losses | {"perf/evaluate_s": time.monotonic() - started}

    def sums(
        self, forward: Callable[[Batch], Any], device: torch.device, enter: Callable[[int], None] = lambda _: None
    ) -> torch.Tensor:
        """Loss sums, supervised tokens and samples of each source on this rank: float64 [3, num_sources], on the host.

        The model's mode is left alone: without dropout it makes no difference, and training goes on as if nothing was.

        Args:
            forward: `LlavaNext.forward`, or an engine around it.
            enter: as `metrics` has it.
        """
        total = torch.zeros(3, len(self.source_names), dtype=torch.float64)
        for number, (row, batch) in enumerate(zip(self.rows, self.batches(), strict=True)):
            enter(number)
            with torch.no_grad():
                loss = LossSums(*forward(batch.to(device)))
            total[0] += loss.by_source.double().cpu()
            total[1] += loss.tokens_by_source.double().cpu()
            for place in row:
                total[2, self.source_names.index(self.samples[place].source)] += 1
        return total

    def losses(self, sums: torch.Tensor) -> dict[str, float]:
        """The mean loss of each source, from the sums of all ranks, as `train/loss/<source>` is one."""
        shares = sums[2] if self.per_sample else sums[1]
        return {
            name: float(loss / all_gather_objects)
            for name, loss, all_gather_objects in zip(self.source_names, sums[0], shares, strict=True)
            if all_gather_objects > 0
        }


def hold_out(
    samples: Mapping[str, Sequence[HeldOutSample]],
    source_names: Sequence[str],
    processor: Processor,
    packing: PackingConfig,
    costs: StepCosts,
    *,
    per_sample: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> HeldOut:
    """Counts the samples and deals them into rows; every rank computes the same deal.

    A sample that has no place in the stage (too long, nothing supervised) is left out and counted, as in training.

    Args:
        samples: by source, in the order in which they are taken.
        source_names: of the model's per-source sums.
        packing: the row's budgets, raised to the largest sample where that exceeds them.
        per_sample: weigh tokens as `loss_weighting: sample` does.

    Raises:
        ModelError: a stored sample's placeholders and pictures differ in number.
    """
    kept: list[HeldOutSample] = []
    sizes: list[tuple[int, int, int]] = []
    left_out: Counter[str] = Counter()
    for held_out in (sample for of_source in samples.values() for sample in of_source):
        text = held_out.text()
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected:
            left_out[held_out.source] += 1
            continue
        kept.append(held_out)
        sizes.append((layout.num_tokens, layout.num_tiles, layout.num_supervised))
    rows = rows_of(sizes, packing, costs, rank=rank, num_ranks=num_ranks)
    return HeldOut(tuple(source_names), kept, rows, processor, per_sample, dict(left_out))


def rows_of(
    sizes: Sequence[tuple[int, int, int]], packing: PackingConfig, costs: StepCosts, *, rank: int, num_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """One rank's rows of samples of these (tokens, tiles, supervised tokens), as positions among them; every rank has
    as many rows."""
    lengths = np.array(sizes, dtype=np.int64).reshape(-1, 3)
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(lengths), _DEALT_AT_ONCE):
        tokens, tiles, supervised = lengths[start : start + _DEALT_AT_ONCE].T
        budgets = PackingConfig(max(packing.max_tokens, int(tokens.max())), max(packing.max_tiles, int(tiles.max())))
        dealt = assign_rows(tokens, tiles, costs.of(tokens, tiles, supervised), num_ranks=num_ranks, budgets=budgets)
        rows += [tuple(start + place for place in micro_step[rank]) for micro_step in dealt.rows]
    return tuple(rows)
