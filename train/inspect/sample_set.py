"""What is looked at: samples of a prepared source, or of one step of a run, and all that is known around them.

Owns finding them, by seed, by step or by id. Leaves: what a sample becomes to the processor, the order of a run to its
planner, the data around to `length_distribution.py`.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import epoch_permutation
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.store.reader import Store, StoredSample, StoredText
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.build import Backbone, read_backbone, skeleton
from llava_next.model.llava_next import LlavaNext
from train.config.compose import load, load_yaml
from train.config.schema import ConfigError, RunConfig
from train.data.length_table import LengthTable, open_table
from train.data.loader import StepPlan, stage_processor
from train.inspect.length_distribution import LeftOut, Spread, aspects_of, count, read_quarantine

_NUM_DRAWN = 4096


class Samples(Protocol):
    """A `Store` or a `Mixture`: samples by number."""

    def text(self, index: int) -> StoredText: ...
    def sample(self, index: int) -> StoredSample: ...


@dataclass(frozen=True)
class Choice:
    """One sample to look at; `place` says which rank and micro-step had it, where that is known."""

    samples: Samples
    number: int
    place: str = ""

    def read(self) -> StoredSample:
        """The sample with its pictures."""
        return self.samples.sample(self.number)

    def text(self) -> StoredText:
        """The sample without them."""
        return self.samples.text(self.number)


@dataclass(frozen=True)
class RunStep:
    """One step of a run, and what the run has logged."""

    run_dir: Path
    step: int
    num_steps: int
    plan: StepPlan
    metrics: list[dict[str, Any]]

    @property
    def logged(self) -> dict[str, Any]:
        """The step's line of metrics.jsonl; empty where there is none."""
        return next((line for line in self.metrics if line["step"] == self.step), {})


@dataclass(frozen=True)
class Subject:
    """Everything that a page is made of. `is_whole_step`: the choices are all samples of the step."""

    title: str
    config: RunConfig
    backbone: Backbone
    processor: Processor
    choices: list[Choice]
    spread: Spread
    left_out: list[LeftOut]
    run: RunStep | None = None
    is_whole_step: bool = False


def of_store(
    path: Path, overrides: Sequence[str], config_dir: str | None, *, ids: Sequence[str], num: int, seed: int
) -> Subject:
    """Samples of a prepared source, drawn by seed or named, as the configuration's model and stage see them.

    Raises:
        ConfigError, ModelError, DataError: the store, the configuration, a folder that it names, or an id is not there.
    """
    store = Store.open(path)
    return _store_subject(store, _store_config(store, overrides, config_dir), ids, num, seed)


def of_store_like(path: Path, run_dir: Path, *, ids: Sequence[str], num: int, seed: int) -> Subject:
    """Samples of a prepared source as the model and stage of a run see them. Errors are those of `of_store`."""
    return _store_subject(Store.open(path), load_yaml(run_dir / "config.yaml"), ids, num, seed)


def of_run(run_dir: Path, step: int | None, *, ids: Sequence[str], seed: int) -> Subject:
    """The samples of one step of a run, or the named ones of its sources.

    Args:
        step: counted from 0 as in metrics.jsonl; None takes the last one there.

    Raises:
        ConfigError, ModelError, DataError: no run, no such step, other data than the run's, an id that is not there.
    """
    # Only here: it brings the engine, which a look at a store has no use for.
    from train.assemble import make_planner
    from train.distributed.world import World

    config = load_yaml(run_dir / "config.yaml")
    store_root = Path(config.data.store_root)
    backbone = read_backbone(config.model)
    processor = stage_processor(backbone, config.stage)
    mixture = Mixture.open(config.mixture, store_root)
    workers = config.data.length_workers
    table = open_table(
        mixture,
        processor,
        store_root / ".lengths",
        is_writer=True,
        num_workers=workers,
        show_progress=sys.stderr.isatty(),
    )
    _refuse_other_data(run_dir, table.fingerprint)
    metrics = read_metrics(run_dir)
    step = step if step is not None else (metrics[-1]["step"] if metrics else 0)
    world = World(0, 0, _num_ranks(run_dir), torch.device("cpu"), torch.float32, None)
    planner = make_planner(config, world, backbone, _without_weights(backbone, len(mixture.source_names)), table)
    if not 0 <= step < planner.num_steps:
        raise ConfigError(f"--step {step}: the steps of {run_dir} are 0 to {planner.num_steps - 1}")
    if ids:
        stores = [mixture.store(source) for source in mixture.source_names]
        choices = _named(stores, ids)
    else:
        places = _places([replace(planner, rank=rank).plan(step).rows for rank in range(world.size)])
        positions = planner.plan(step).samples.tolist()
        choices = [Choice(mixture, int(table.rows["sample"][at]), places[at]) for at in positions]
    return Subject(
        f"{run_dir}, step {step}",
        config,
        backbone,
        processor,
        choices,
        _spread_of_run(mixture, table, seed),
        _left_out_of_run(run_dir, mixture),
        RunStep(run_dir, step, planner.num_steps, planner.plan(step), metrics),
        is_whole_step=not ids,
    )


def _spread_of_run(mixture: Mixture, table: LengthTable, seed: int) -> Spread:
    drawn = epoch_permutation(mixture.num_samples, seed, 0)[:_NUM_DRAWN]
    aspects = aspects_of(mixture.text(int(number)).sizes_hw for number in drawn)
    tokens, supervised, tiles = (np.asarray(table.rows[name]) for name in ("tokens", "supervised", "tiles"))
    which = f"all {len(table):,} samples of the run (of pictures, those of {len(drawn):,} drawn by seed)"
    return Spread(tokens, supervised, tiles, aspects, which)


def _left_out_of_run(run_dir: Path, mixture: Mixture) -> list[LeftOut]:
    """By the run's own gate, and by its sources' preparation."""
    sources = [(mixture.store(name).path, f"while {name} was prepared") for name in mixture.source_names]
    gates = [(run_dir, "by this run (stage.max_length, template)"), *sources]
    return [read_quarantine(place / "quarantine.jsonl", title) for place, title in gates]


def encoded(processor: Processor, sample: StoredSample) -> Example | SampleRejected:
    """The encoded sample, or why it has no place in the stage.

    Raises:
        DataError: a picture's bytes cannot be read.
    """
    try:
        return processor.encode(sample.messages, sample.sizes_hw, sample.pictures)
    except SampleRejected as rejected:
        return rejected
    except OSError as error:
        raise DataError(f"sample {sample.id!r} of source {sample.source}: {error}; prepare the source again") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that a kill has cut off is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(values)
    return found


def _store_config(store: Store, overrides: Sequence[str], config_dir: str | None) -> RunConfig:
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    name = [] if given & {"name", "experiment"} else ["name=inspect"]
    mixture = ["++mixture.name=inspect", "++mixture.sources.inspect={}"]  # replaced: the source is the store
    config = load([*name, *overrides, *mixture], config_dir, folders=False)
    language_model = config.model.language_model
    if not overrides and not Path(language_model.tokenizer_path).is_dir():
        raise ConfigError(
            f"a source is shown as one model sees it, and the default one, {language_model.name}, is not in "
            f"{language_model.tokenizer_path}; name another as for training, for example experiment=quickstart "
            "stage=align, or a run with --like RUN"
        )
    return replace(config, mixture=MixtureConfig(store.name, 0, {store.name: SourceShare()}))


def _store_subject(store: Store, config: RunConfig, ids: Sequence[str], num: int, seed: int) -> Subject:
    backbone = read_backbone(config.model)
    processor = stage_processor(backbone, config.stage)
    order = epoch_permutation(len(store), seed, 0)
    choices = _named([store], ids) if ids else [Choice(store, int(number)) for number in order[:num]]
    numbers = order[:_NUM_DRAWN].tolist()
    which = (
        f"all {len(store):,} samples" if len(numbers) == len(store) else f"{len(numbers):,} of {len(store):,} samples"
    )
    spread, rejected = count((store.text(number) for number in numbers), processor, which)
    left_out = [read_quarantine(store.path / "quarantine.jsonl", f"while {store.name} was prepared"), rejected]
    return Subject(f"{store.path}", config, backbone, processor, choices, spread, left_out)


def _named(stores: Sequence[Store], ids: Sequence[str]) -> list[Choice]:
    """The samples of these ids, written `id` or `source:id`, in the order they are asked for."""
    wanted: dict[str, list[Choice]] = {name: [] for name in ids}
    known = []
    for store in stores:
        for number, found in enumerate(store.iter_ids()):
            for name in (found, f"{store.name}:{found}"):
                if name in wanted:
                    wanted[name].append(Choice(store, number))
        known += list(islice(store.iter_ids(), 10_000))
    for name, choices in wanted.items():
        if not choices:
            close = difflib.get_close_matches(name.rpartition(":")[2], known, n=3, cutoff=0) or known[:3]
            where = ", ".join(store.name for store in stores)
            raise DataError(f"--ids {name}: no sample of {where} has this id; there are for example {', '.join(close)}")
    return [choice for choices in wanted.values() for choice in choices]


def _refuse_other_data(run_dir: Path, fingerprint: str) -> None:
    """Raises ConfigError where the stores, the tokenizer or the geometry are no longer those of the run."""
    about = run_dir / "data.json"
    saved = json.loads(about.read_text())["data_fingerprint"] if about.is_file() else fingerprint
    if saved != fingerprint:
        raise ConfigError(
            f"{run_dir} was trained on data {saved[:12]}, and its stores and tokenizer make {fingerprint[:12]} now: "
            "its steps would have other samples; restore them, or look at a store with --like"
        )


def _num_ranks(run_dir: Path) -> int:
    """How many ranks the run had: as its checkpoints say, else by its logs."""
    from train.checkpoint import saver as checkpoint

    newest = checkpoint.newest(run_dir / "checkpoints")
    if newest is not None:
        return int(checkpoint.read_state(newest).layout["num_ranks"])
    return max(1, len(list((run_dir / "log").glob("rank_*.log"))))


def _without_weights(backbone: Backbone, num_sources: int) -> LlavaNext:
    """The model as far as costs are asked of it."""
    tower = backbone.config.vision_tower
    return LlavaNext(
        skeleton(backbone), image_mean=tower.image_mean, image_std=tower.image_std, num_sources=num_sources
    )


def _places(rows_of_ranks: Sequence[Sequence[np.ndarray]]) -> dict[int, str]:
    """Rank and micro-step of each position of a step; a sample that it holds twice has the last of its places."""
    return {
        int(position): f"rank {rank}, micro-step {micro_step}"
        for rank, rows in enumerate(rows_of_ranks)
        for micro_step, row in enumerate(rows)
        for position in row
    }
