"""Produces this rank's batches: the order gives a step's samples, packing gives its rows, and workers encode them.

The batches are a function of the step's number, so the loader has no state to save. A sample that cannot be read, or
whose lengths differ from the length table, ends the run with an error that names it; samples are never substituted.
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

if TYPE_CHECKING:  # it imports all model classes of transformers, 100 MiB that the planner does not need
    from llava_next.model.build import Backbone

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5  # before a failed read is retried; doubled each time
_MAX_CACHED_PLANS = 256  # more than the steps that workers read ahead (workers x prefetch rows at most)


class SampleError(RuntimeError):
    """A sample could not be read, or its lengths differ from the length table; the message names it."""


def build_processor(backbone: "Backbone", stage: StageConfig) -> Processor:
    """Builds the processor of a stage. Errors are those of `Backbone.processor`."""
    return backbone.processor(
        template=stage.template,
        views=stage.views,
        max_length=stage.max_length,
        unmask_special_tokens=stage.unmask_special_tokens,
    )


@dataclass(frozen=True)
class StepPlan:
    """What is known about a step before its samples are read.

    Attributes:
        step: from 0.
        samples: positions of the step's samples in the length table, int64 [num_samples].
        rows: positions of this rank's samples, one array per micro-step.
        divisor: number that the step's loss sum is divided by.
        divisors: share of each source in `divisor`, float64 [num_sources].
        num_tokens, num_supervised, num_tiles: of all ranks.
        flops: of all ranks, forward and backward.
        balance: see `RowAssignment`.
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
        """Number of samples, tokens and tiles of all ranks, int64 [3]."""
        return np.array([len(self.samples), self.num_tokens, self.num_tiles])


@dataclass(frozen=True)
class Planner:
    """Plans the steps of a run, as a function of the table, the stage, the seed and the number of ranks."""

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

    def count_seen(self, step: int) -> np.ndarray:
        """Returns the number of samples, tokens and tiles in all steps before `step`, int64 [3]."""
        size = len(self.table)
        epochs, num_more = visits_before(step, size, self.stage.batch_size, self.stage.epochs)
        is_seen = np.zeros(size, dtype=bool)  # in the epoch of that step
        is_seen[epoch_permutation(size, self.seed, epochs)[:num_more]] = True
        counts = [epochs * size + num_more]
        for name in ("tokens", "tiles"):
            column = self.table.rows[name]
            counts.append(epochs * column.sum(dtype=np.int64) + column.sum(dtype=np.int64, where=is_seen))
        return np.array(counts)

    def plan(self, step: int) -> StepPlan:
        """Returns the plan of one step; recent plans are cached, since the loader needs them before the trainer.

        Raises:
            PackingError: a sample exceeds a budget.
        """
        if step not in self._recent:
            plan = self._plan(step)
            while len(self._recent) >= _MAX_CACHED_PLANS:
                del self._recent[next(iter(self._recent))]
            self._recent[step] = plan
        return self._recent[step]

    def _plan(self, step: int) -> StepPlan:
        numbers = samples_of_step(step, len(self.table), self.stage.batch_size, self.seed, self.stage.epochs)
        rows = self.table.rows[numbers]
        tokens, tiles = rows["tokens"].astype(np.int64), rows["tiles"].astype(np.int64)
        costs = self.costs.flops(tokens, tiles, rows["supervised"])
        assignment = assign_rows(tokens, tiles, costs, num_ranks=self.num_ranks, budgets=self.packing)
        per_sample = self.stage.loss_weighting == "sample"
        weights = np.ones(len(rows)) if per_sample else rows["supervised"].astype(np.float64)
        divisors = np.bincount(rows["source"], weights=weights, minlength=self.num_sources)
        return StepPlan(
            step=step,
            samples=numbers,
            rows=tuple(numbers[list(micro_step[self.rank])] for micro_step in assignment.rows),
            divisor=float(divisors.sum()),
            divisors=divisors,
            num_tokens=int(tokens.sum()),
            num_supervised=int(rows["supervised"].sum()),
            num_tiles=int(tiles.sum()),
            flops=float(costs.sum()),
            balance=assignment.balance,
        )


class RowDataset(Dataset[Batch]):
    """Reads, encodes and collates rows, given as positions in the length table. Runs in the workers."""

    def __init__(
        self, mixture: Mixture, table: LengthTable, processor: Processor, per_sample: bool, read_retries: int
    ) -> None:
        self.mixture, self.table, self.processor, self.per_sample = mixture, table, processor, per_sample
        self.read_retries = read_retries

    def __getitem__(self, row: np.ndarray) -> Batch:
        examples, sources = [], []
        for entry in self.table.rows[row]:
            sample = self._read(int(entry["sample"]))
            try:
                example = self.processor.encode(sample.messages, sample.sizes_hw, sample.images)
            except (OSError, ValueError, SampleRejected) as error:
                raise SampleError(f"sample {sample.id!r} of source {sample.source}: {error}") from error
            counted = (int(entry["tokens"]), int(entry["supervised"]), int(entry["tiles"]))
            layout = example.layout
            encoded = (layout.num_tokens, layout.num_supervised, layout.num_tiles)
            if encoded != counted:
                raise SampleError(
                    f"sample {sample.id!r} of source {sample.source} has {encoded} (tokens, supervised tokens, tiles), "
                    f"but the length table counts {counted}: the table does not belong to this data; remove "
                    f"{self.table.folder}"
                )
            examples.append(example)
            sources.append(int(entry["source"]))
        config = self.processor.config
        return collate(
            examples,
            tile=config.tile,
            patches_per_tile=config.patches_per_side**2,
            source_ids=sources,
            per_sample=self.per_sample,
        )

    def _read(self, number: int) -> StoredSample:
        """Reads a sample's text and image bytes; a failed read is retried after increasing pauses."""
        for attempt in range(self.read_retries + 1):
            try:
                return self.mixture.sample(number)
            except (OSError, ValueError) as error:
                name = self.mixture.describe_sample(number)
                if not isinstance(error, OSError) or attempt == self.read_retries:
                    raise SampleError(f"{name} could not be read from its store: {error}") from error
                pause_s = _FIRST_PAUSE_S * 2**attempt
                logger.warning("%s could not be read (%s); retrying in %.1f s", name, error, pause_s)
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


class _RowSampler(Sampler[np.ndarray]):
    """Yields this rank's rows of the given steps, in the order in which the trainer uses them."""

    def __init__(self, planner: Planner, steps: range) -> None:
        self.planner, self.steps = planner, steps

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.steps:
            yield from self.planner.plan(step).rows


def make_blank_row(processor: Processor) -> Batch:
    """Returns a row without samples: every part of the model runs, and no gradient results."""
    config = processor.config
    return collate((), tile=config.tile, patches_per_tile=config.patches_per_side**2)


def make_batches(
    planner: Planner,
    mixture: Mixture,
    processor: Processor,
    steps: range,
    data: DataConfig,
    *,
    pin_memory: bool,
) -> Iterator[Batch]:
    """Returns an iterator over this rank's batches of the given steps, prefetched by worker processes.

    Raises:
        SampleError: from the iterator, when the row of the invalid sample is due.
    """
    dataset = RowDataset(mixture, planner.table, processor, planner.stage.loss_weighting == "sample", data.read_retries)
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=_RowSampler(planner, steps),
        num_workers=data.workers,
        prefetch_factor=data.prefetch if data.workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # A forked worker shares the mixture's memory-mapped tables and writes to its rank's log.
        multiprocessing_context="fork" if data.workers else None,
        persistent_workers=False,
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # The terminal, torchrun and Slurm send stop signals to every process of a run. The rank still needs batches to
    # finish its step, so a worker only ends on a SIGTERM from its rank, or when the rank has ended.
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    gc.freeze()  # a collection would write to the pages that are shared with the parent process
    threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _exit_on_sigterm_from(rank_pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_pid:
        pass
    os._exit(0)
