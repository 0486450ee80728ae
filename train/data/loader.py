"""From a step's number to this rank's batches: order → samples → rows → workers that read, encode and collate.

A pure function of the step drives everything; the loader has no position of its own to save. A sample that cannot be
read, or that encodes to other numbers than the length table's, ends the run with its id: training never substitutes
a sample.
"""

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import epoch_permutation, num_steps, samples_of_step, visits_before
from data_recipes.store.reader import StoredSample
from llava_next.inputs.batch import Batch, collate
from llava_next.inputs.processor import Processor, SampleRejected
from llava_next.model.flops import StepCosts
from train.config.schema import DataConfig, PackingConfig, StageConfig
from train.data.length_table import LengthTable
from train.data.packing import assign_rows

if TYPE_CHECKING:  # it brings every model class of transformers, 100 MiB that planning has no use for
    from llava_next.model.build import Backbone

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5  # before a failed read is tried again; doubled each time
_MOST_REMEMBERED = 256  # steps; loaders read ahead by workers times prefetch rows, a step having at least one


class SampleError(RuntimeError):
    """A sample could not be read or encoded as counted; names it."""


def stage_processor(backbone: "Backbone", stage: StageConfig) -> Processor:
    """What encodes the samples of a stage; errors are those of `Backbone.processor`."""
    return backbone.processor(
        template=stage.template,
        image_mode=stage.image_mode,
        max_length=stage.max_length,
        unmask_special_tokens=stage.unmask_special_tokens,
    )


@dataclass(frozen=True)
class StepPlan:
    """What all ranks know of a step before it is read.

    `rows` are this rank's, one per micro-step, as positions in the length table; `samples` are all of the step's.
    `divisor` is the number that the step's loss sum is divided by; `divisors` float64 [num_sources] are each source's
    share of it.
    """

    step: int
    samples: np.ndarray
    rows: tuple[np.ndarray, ...]
    divisor: float
    divisors: np.ndarray
    num_tokens: int
    num_supervised: int
    num_tiles: int
    flops: float
    balance: float

    @property
    def sizes(self) -> np.ndarray:
        """Samples, tokens and tiles of all ranks: int64 [3]."""
        return np.array([len(self.samples), self.num_tokens, self.num_tiles])


@dataclass(frozen=True)
class Planner:
    """The steps of a run: a pure function of the table, the stage, the seed and the ranks."""

    table: LengthTable
    stage: StageConfig
    packing: PackingConfig
    costs: StepCosts
    seed: int
    rank: int
    num_ranks: int
    num_sources: int
    _recent: dict[int, StepPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_steps(self) -> int:
        return num_steps(len(self.table), self.stage.batch_size, self.stage.epochs)

    def seen(self, step: int) -> np.ndarray:
        """Samples, tokens and tiles of all steps before `step` together: int64 [3]."""
        size = len(self.table)
        epochs, more = visits_before(step, size, self.stage.batch_size, self.stage.epochs)
        met = np.zeros(size, dtype=bool)  # in the epoch of that step
        met[epoch_permutation(size, self.seed, epochs)[:more]] = True
        counts = [epochs * size + more]
        for name in ("tokens", "tiles"):
            column = self.table.rows[name]
            counts.append(epochs * column.sum(dtype=np.int64) + column.sum(dtype=np.int64, where=met))
        return np.array(counts)

    def plan(self, step: int) -> StepPlan:
        """The plan of one step. Errors are `packing.deal`'s.

        The loader asks ahead of the trainer: what was planned lately is remembered, so that a step is planned once.
        """
        if step not in self._recent:
            plan = self._plan(step)
            while len(self._recent) >= _MOST_REMEMBERED:
                del self._recent[next(iter(self._recent))]
            self._recent[step] = plan
        return self._recent[step]

    def _plan(self, step: int) -> StepPlan:
        numbers = samples_of_step(step, len(self.table), self.stage.batch_size, self.seed, self.stage.epochs)
        rows = self.table.rows[numbers]
        tokens, tiles = rows["tokens"].astype(np.int64), rows["tiles"].astype(np.int64)
        costs = self.costs.of(tokens, tiles, rows["supervised"])
        dealt = assign_rows(tokens, tiles, costs, num_ranks=self.num_ranks, budgets=self.packing)
        per_sample = self.stage.loss_weighting == "sample"
        weights = np.ones(len(rows)) if per_sample else rows["supervised"].astype(np.float64)
        divisors = np.bincount(rows["source"], weights=weights, minlength=self.num_sources)
        return StepPlan(
            step=step,
            samples=numbers,
            rows=tuple(numbers[list(micro_step[self.rank])] for micro_step in dealt.rows),
            divisor=float(divisors.sum()),
            divisors=divisors,
            num_tokens=int(tokens.sum()),
            num_supervised=int(rows["supervised"].sum()),
            num_tiles=int(tiles.sum()),
            flops=float(costs.sum()),
            balance=dealt.balance,
        )


class Rows(Dataset[Batch]):
    """Encodes a row, given as positions in the length table. Lives in the workers."""

    def __init__(
        self, mixture: Mixture, table: LengthTable, processor: Processor, per_sample: bool, read_retries: int
    ) -> None:
        self.mixture, self.table, self.processor, self.per_sample = mixture, table, processor, per_sample
        self.read_retries = read_retries

    def __getitem__(self, row: np.ndarray) -> Batch:
        examples, sources = [], []
        for known in self.table.rows[row]:
            sample = self._read(int(known["sample"]))
            try:
                example = self.processor.encode(sample.messages, sample.sizes_hw, sample.pictures)
            except (OSError, ValueError, SampleRejected) as error:
                raise SampleError(f"sample {sample.id!r} of source {sample.source}: {error}") from error
            counted = (int(known["tokens"]), int(known["supervised"]), int(known["tiles"]))
            layout = example.layout
            encoded = (layout.num_tokens, layout.num_supervised, layout.num_tiles)
            if encoded != counted:
                raise SampleError(
                    f"sample {sample.id!r} of source {sample.source} was counted as {counted} (tokens, supervised, "
                    f"tiles) but encodes to {encoded}: the length table in {self.table.folder} is not this data's; "
                    "delete it"
                )
            examples.append(example)
            sources.append(int(known["source"]))
        config = self.processor.config
        return collate(
            examples,
            tile=config.tile,
            patches_per_tile=config.patches_per_side**2,
            source_ids=sources,
            per_sample=self.per_sample,
        )

    def _read(self, number: int) -> StoredSample:
        """A sample's text and picture bytes; a read that the file system fails is tried again, after longer pauses."""
        for tried in range(self.read_retries + 1):
            try:
                return self.mixture.sample(number)
            except (OSError, ValueError) as error:
                name = self.mixture.describe(number)
                if not isinstance(error, OSError) or tried == self.read_retries:
                    raise SampleError(f"{name} could not be read from its store: {error}") from error
                pause_s = _FIRST_PAUSE_S * 2**tried
                logger.warning("%s could not be read (%s); trying again in %.1f s", name, error, pause_s)
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


class _Order(Sampler[np.ndarray]):
    """This rank's rows of these steps, in the order in which the trainer takes them."""

    def __init__(self, planner: Planner, steps: range) -> None:
        self.planner, self.steps = planner, steps

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.steps:
            yield from self.planner.plan(step).rows


def blank_row(processor: Processor) -> Batch:
    """The row of a rank that has no sample: every part of the model runs, and nothing is learned."""
    config = processor.config
    return collate((), tile=config.tile, patches_per_tile=config.patches_per_side**2)


def batches(
    planner: Planner,
    mixture: Mixture,
    processor: Processor,
    steps: range,
    data: DataConfig,
    *,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's batches of these steps, read ahead by worker processes.

    Raises:
        SampleError: in the order of the steps, when the broken sample's row is due.
    """
    dataset = Rows(mixture, planner.table, processor, planner.stage.loss_weighting == "sample", data.read_retries)
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Order(planner, steps),
        num_workers=data.workers,
        prefetch_factor=data.prefetch if data.workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # A forked worker shares the mixture's tables and writes to its rank's log.
        multiprocessing_context="fork" if data.workers else None,
        persistent_workers=False,
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # A terminal, torchrun and Slurm ask every process of a run to stop. The rank decides, and needs its next batches
    # to finish the step: its workers end when it says so, or when it is gone.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    gc.freeze()  # what was there before the fork stays shared: a collection would write to all of its pages
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _end_when_told(rank_pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_pid:
        pass
    os._exit(0)
