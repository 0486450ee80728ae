"""Tests of the path from a step's number to batches: every rank reads what is planned."""

import errno
import itertools
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import samples_of_step
from llava_next.inputs.batch import Batch
from llava_next.inputs.processor import Processor
from llava_next.model.build import read_backbone
from llava_next.model.flops import StepCosts
from tests.tiny import tiny_samples, tiny_store
from train.config.schema import PackingConfig, RunConfig
from train.data import loader
from train.data.length_table import LengthTable, open_table
from train.data.loader import Planner, SampleError, make_batches
from train.data.packing import RowAssignment, assign_rows

COSTS = StepCosts(tile=5.0, token=1.0, pair=0.01)


class Data:
    """Mixture, processor and table of a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        stage = config.stage
        self.mixture = Mixture.open(config.mixture, Path(config.data.store_root))
        self.processor: Processor = read_backbone(config.model).processor(
            template=stage.template, views=stage.views, max_length=stage.max_length
        )
        folder = Path(config.data.store_root) / ".lengths"
        self.table: LengthTable = open_table(
            self.mixture, self.processor, folder, is_writer=True, num_workers=1, show_progress=False
        )

    def planner(self, rank: int = 0, num_ranks: int = 1, **changes: Any) -> Planner:
        """Returns the planner of one rank."""
        stage = replace(self.config.stage, **changes)
        return Planner(self.table, stage, self.config.packing, COSTS, self.config.seed, rank, num_ranks, num_sources=2)

    def read(self, planner: Planner, num_workers: int = 0, first_step: int = 0) -> list[Batch]:
        """Returns all batches of one rank."""
        steps = range(first_step, planner.num_steps)
        data = replace(self.config.data, workers=num_workers, prefetch=2)
        return list(make_batches(planner, self.mixture, self.processor, steps, data, pin_memory=False))


@pytest.fixture(scope="module")
def data(tiny_parts: RunConfig) -> Data:
    """Returns the data of the tiny run."""
    return Data(tiny_parts)


def assert_equal(batch: Batch, other: Batch) -> None:
    """Every tensor of two batches is the same."""
    assert batch.segments.lengths == other.segments.lengths
    for name in ("input_ids", "position_ids", "tiles", "image_positions", "image_sources", "target_positions"):
        torch.testing.assert_close(getattr(batch, name), getattr(other, name), rtol=0, atol=0)
    for name in ("target_ids", "target_sources", "target_samples", "target_weights"):
        torch.testing.assert_close(getattr(batch, name), getattr(other, name), rtol=0, atol=0)


def test_a_step_is_the_same_samples_for_any_ranks(data: Data) -> None:
    """The samples of a step are a function of data, batch size, seed and step. The ranks share them, each sample once
    and with the same number of rows; budgets change nothing."""
    for step in range(data.planner().num_steps):
        expected = samples_of_step(step, len(data.table), 13, data.config.seed, 1.0)
        for num_ranks in (1, 2, 3, 4, 7):
            plans = [data.planner(rank, num_ranks).plan(step) for rank in range(num_ranks)]
            assignment = [int(sample) for plan in plans for row in plan.rows for sample in row]
            assert sorted(assignment) == sorted(expected.tolist())
            assert len({len(plan.rows) for plan in plans}) == 1
            for plan in plans:
                np.testing.assert_array_equal(plan.samples, expected)
                assert plan.divisor == plan.num_supervised == data.table.rows["supervised"][expected].sum()


def test_epoch_has_every_sample_once(data: Data) -> None:
    """The steps of one epoch have every accepted sample once, in an order that depends on the seed."""
    planner = data.planner()
    met = np.concatenate([planner.plan(step).samples for step in range(planner.num_steps)])
    assert sorted(met.tolist()) == list(range(len(data.table)))
    other = replace(planner, seed=planner.seed + 1)
    assert not np.array_equal(planner.plan(0).samples, other.plan(0).samples)


def test_what_was_seen_is_what_the_steps_were(data: Data) -> None:
    """`count_seen` of a step is the sum over all earlier steps, over several epochs."""
    planner = data.planner(epochs=2.3)
    assert planner.num_steps * 13 > 2 * len(data.table)
    expected = np.zeros(3, dtype=np.int64)
    for step in range(planner.num_steps):
        assert planner.count_seen(step).tolist() == expected.tolist()
        rows = data.table.rows[planner.plan(step).samples]
        assert planner.plan(step).sizes.tolist() == [len(rows), rows["tokens"].sum(), rows["tiles"].sum()]
        expected += planner.plan(step).sizes
    assert planner.count_seen(planner.num_steps).tolist() == expected.tolist()


def test_divisor_follows_the_weighting(data: Data) -> None:
    """A step's loss sum is divided by its supervised tokens or by its samples."""
    assert data.planner(loss_weighting="sample").plan(0).divisor == 13
    assert data.planner(loss_weighting="token").plan(0).divisor == data.planner().plan(0).num_supervised


def assert_no_padding(batch: Batch, lengths: list[int]) -> None:
    """A row has the tokens of its samples only; positions restart at each sample, and the bounds cover the row."""
    T = sum(lengths)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, T)
    assert batch.position_ids[0].tolist() == [position for length in lengths for position in range(length)]
    assert batch.segments.bounds.tolist() == [0, *np.cumsum(lengths).tolist()]


@settings(deadline=None, max_examples=100)
@given(num_ranks=st.integers(1, 20), max_tokens=st.integers(512, 9000), max_tiles=st.integers(10, 200))
def test_ranks_share_a_step(data: Data, num_ranks: int, max_tokens: int, max_tiles: int) -> None:
    """For any ranks and budgets: each sample of a step is in one row of one rank, rows keep the budgets, and every rank
    has the same number of rows."""
    planner = replace(data.planner(num_ranks=num_ranks), packing=PackingConfig(max_tokens, max_tiles))
    for step in (0, planner.num_steps - 1):
        plans = [replace(planner, rank=rank).plan(step) for rank in range(num_ranks)]
        rows = [row for plan in plans for row in plan.rows]
        assert sorted(np.concatenate(rows).tolist()) == sorted(data.planner().plan(step).samples.tolist())
        assert {len(plan.rows) for plan in plans} == {len(plans[0].rows)}
        for row in rows:
            assert data.table.rows["tokens"][row].sum() <= max_tokens
            assert data.table.rows["tiles"][row].sum() <= max_tiles


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_batches_are_the_plan(data: Data, num_ranks: int) -> None:
    """A rank's loader yields the planned rows in the planned order, with the table's tokens, supervised tokens and
    sources."""
    for rank in range(num_ranks):
        planner = data.planner(rank, num_ranks)
        rows = [row for step in range(planner.num_steps) for row in planner.plan(step).rows]
        read = data.read(planner)
        assert len(read) == len(rows)
        for batch, row in zip(read, rows, strict=True):
            known = data.table.rows[row]
            assert batch.segments.lengths == (tuple(known["tokens"].tolist()) or (1,))
            assert_no_padding(batch, known["tokens"].tolist() or [1])
            assert len(batch.tiles) == max(1, known["tiles"].sum())
            counts = torch.bincount(batch.target_samples, minlength=len(row)).tolist()
            assert counts == known["supervised"].tolist()
            for sample, source in zip(batch.target_samples.tolist(), batch.target_sources.tolist(), strict=True):
                assert source == known["source"][sample]


def test_blank_row(data: Data) -> None:
    """A rank without a sample in a micro-step reads one unsupervised token and one blank tile."""
    empty = [batch for rank in (0, 1) for batch in data.read(data.planner(rank, 2)) if not len(batch.target_ids)]
    assert len(empty) == 1
    assert (empty[0].input_ids.shape, empty[0].tiles.shape[0]) == ((1, 1), 1)
    assert not empty[0].tiles.any()


def test_sample_weights_sum_to_one(data: Data) -> None:
    """Weighing by sample gives every sample the same total weight, for any number of tokens."""
    for batch in data.read(data.planner(loss_weighting="sample")):
        sums = torch.zeros(len(batch.segments.lengths)).index_add_(0, batch.target_samples, batch.target_weights)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(data: Data, num_workers: int) -> None:
    """Any number of workers yields the same batches in the same order, from any step on."""
    planner = data.planner(1, 2)
    alone = data.read(planner)
    for first_step in (0, 2):
        skipped = sum(len(planner.plan(step).rows) for step in range(first_step))
        for batch, other in zip(data.read(planner, num_workers, first_step), alone[skipped:], strict=True):
            assert_equal(batch, other)


def broken(config: RunConfig, tmp_path: Path, damage: Any) -> Data:
    """A run on one source whose third image is damaged after it was counted."""
    from data_recipes.store import reader as store_module

    root = tmp_path / "stores"
    samples = tiny_samples(8)
    tiny_store(root, "fragile", samples)
    name = samples[2].id
    mixture = replace(config.mixture, sources={"fragile": next(iter(config.mixture.sources.values()))})
    data = Data(replace(config, mixture=mixture, data=replace(config.data, store_root=str(root))))
    read = data.mixture.sample

    def damaged(index: int) -> store_module.StoredSample:
        sample = read(index)
        return replace(sample, images=tuple(map(damage, sample.images))) if sample.id == name else sample

    data.mixture.sample = damaged  # type: ignore[method-assign]
    return data


def cut_off(picture: bytes) -> bytes:
    """The first half of the bytes."""
    return picture[: len(picture) // 2]


def bad_checksum(picture: bytes) -> bytes:
    """A PNG whose pixel data do not match their checksum."""
    place = picture.index(b"IDAT") + 12
    return picture[:place] + bytes([picture[place] ^ 255]) + picture[place + 1 :]


def no_picture(_: bytes) -> bytes:
    """Bytes that are not an image."""
    return b"<html>not found</html>"


def other_size(_: bytes) -> bytes:
    """A valid image of another size than was counted."""
    shown = tiny_samples(2)[1].images[0]
    assert isinstance(shown, bytes)
    return shown


@pytest.mark.parametrize(
    ("damage", "num_workers"),
    [(cut_off, 0), (bad_checksum, 0), (no_picture, 0), (other_size, 0), (cut_off, 1)],
)
def test_broken_image_names_its_sample(tiny_parts: RunConfig, tmp_path: Path, damage: Any, num_workers: int) -> None:
    """An image that cannot be read any more stops the run with the sample's id and source; no sample is replaced."""
    data = broken(tiny_parts, tmp_path, damage)
    with pytest.raises(SampleError, match="sample '000002' of source fragile"):
        data.read(data.planner(), num_workers)


class FailingReads:
    """An `os.pread` that fails the first reads of each process."""

    def __init__(self, num_failures: int) -> None:
        self.left = num_failures
        self.real = os.pread

    def __call__(self, descriptor: int, num_bytes: int, position: int) -> bytes:
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(descriptor, num_bytes, position)


@pytest.fixture
def rank_log(tmp_path: Path) -> Iterator[Path]:
    """The log file of a rank and its workers."""
    handler = logging.FileHandler(tmp_path / "rank_000.log")
    logging.getLogger().addHandler(handler)
    yield tmp_path / "rank_000.log"
    logging.getLogger().removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failed_read_is_retried(data: Data, rank_log: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """Temporary read failures change nothing except the rank's log, which names the sample."""
    expected = data.read(data.planner())
    monkeypatch.setattr(loader, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(os, "pread", FailingReads(3))
    for batch, other in zip(data.read(data.planner(), num_workers), expected, strict=True):
        assert_equal(batch, other)
    lines = rank_log.read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"sample '\d+' of source tiny_\w+ could not be read \(.*\); retrying in 0\.0 s", line)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_read_that_fails_for_good_stops_the_run(data: Data, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """After the last attempt the run stops with the sample's id; the pauses increase."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(os, "pread", FailingReads(10**9))
    with pytest.raises(SampleError, match=r"sample '\d+' of source tiny_\w+ could not be read from its store: .*rror"):
        data.read(data.planner(), num_workers)
    assert pauses == ([] if num_workers else [0.5, 1.0, 2.0])


def test_damaged_image_is_not_retried(tiny_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged data are not read again."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    data = broken(tiny_parts, tmp_path, cut_off)
    with pytest.raises(SampleError, match="sample '000002'"):
        data.read(data.planner())


def test_a_step_is_planned_once(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader, ahead, and the trainer need the same plan: it is computed once, and the cache is bounded."""
    monkeypatch.setattr(loader, "_MAX_CACHED_PLANS", 4)
    assignment: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> RowAssignment:
        assignment.append(1)
        return assign_rows(*args, **kwargs)

    monkeypatch.setattr(loader, "assign_rows", counted)
    planner = replace(data.planner(), stage=replace(data.config.stage, epochs=4.0))
    ahead = iter(range(planner.num_steps))
    loaded = [planner.plan(next(ahead)) for _ in range(3)]
    for step in range(planner.num_steps):
        loaded += [planner.plan(number) for number in itertools.islice(ahead, 1)]
        assert planner.plan(step) is loaded[step]
        assert len(planner._recent) <= 4
    assert len(assignment) == planner.num_steps
    other = replace(planner, seed=planner.seed + 1)
    assert not np.array_equal(other.plan(0).samples, planner.plan(0).samples)


def test_table_of_other_data_is_an_error(data: Data) -> None:
    """A sample whose lengths differ from the table stops the run with both numbers and the fix."""
    rows = np.array(data.table.rows)
    rows["supervised"][5] += 1
    wrong = replace(data.table, rows=rows)
    planner = replace(data.planner(), table=wrong)
    with pytest.raises(SampleError, match=r"sample .* of source tiny_.*has .*but the length table counts.*remove"):
        data.read(planner)


def test_first_sample_is_as_prepared(data: Data) -> None:
    """The pixels and ids of a batch are those of the processor."""
    planner = data.planner()
    batch, row = data.read(planner)[0], planner.plan(0).rows[0]
    stored = data.mixture.sample(int(data.table.rows["sample"][row[0]]))
    example = data.processor.encode(stored.messages, stored.sizes_hw, stored.images)
    length = example.layout.num_tokens
    assert batch.input_ids[0, :length].tolist() == example.layout.ids.tolist()
    np.testing.assert_array_equal(batch.tiles[: len(example.tiles)], example.tiles)


def test_workers_end_with_a_sigterm_of_their_rank(data: Data) -> None:
    """A worker ignores stop signals of other processes, and ends when its rank sends SIGTERM."""
    earlier = set(multiprocessing.active_children())
    planner = replace(data.planner(), stage=replace(data.config.stage, epochs=50.0))
    reading = replace(data.config.data, workers=1, prefetch=1)
    stream = make_batches(planner, data.mixture, data.processor, range(planner.num_steps), reading, pin_memory=False)
    next(stream)
    [worker] = set(multiprocessing.active_children()) - earlier
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {int(number)})"], check=True)
    for _ in range(10):
        next(stream)
    assert worker.is_alive()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(3)
    assert worker.exitcode == 0
