"""The samples that are inspected, of a prepared source or of one step of a run, and how long the others there are."""

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import epoch_permutation
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.store.reader import Store, StoredSample, StoredText
from llava_next.cache_root import temporary_cache
from llava_next.inputs.processor import Example, Processor, SampleRejected
from llava_next.model.build import Backbone, build_meta_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from train.config.compose import load, load_yaml
from train.config.schema import ConfigError, RunConfig
from train.data.length_table import open_table
from train.data.loader import StepPlan, build_processor
from train.observability.run_folder import read_run

_NUM_DRAWN = 4096
Rejects = list[dict[str, Any]]
"""Records of a quarantine: id, reason, detail, and where the record came from."""


@dataclass(frozen=True)
class Distribution:
    """Lengths of samples, int [n] each, and width over height of images, float64 [m]; `which` samples, in words."""

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    aspects: np.ndarray
    which: str


@dataclass(frozen=True)
class Choice:
    """One sample to inspect; `where` is the rank and micro-step that had it, if known."""

    samples: Store | Mixture
    number: int
    where: str = ""


@dataclass(frozen=True)
class RunStep:
    """One step of a run of `num_steps`, and the lines of metrics.jsonl."""

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
    """Everything that a page is made from.

    `left_out` has the records by where they were left out, in words; `is_whole_step`: the choices are the whole step.
    """

    title: str
    config: RunConfig
    backbone: Backbone
    processor: Processor
    choices: list[Choice]
    distribution: Distribution
    left_out: dict[str, Rejects]
    run: RunStep | None = None
    is_whole_step: bool = False


def open_store(path: Path, config: RunConfig, *, ids: Sequence[str], num: int, seed: int) -> Subject:
    """Samples of a prepared source, drawn by seed or named, as the configuration's model and stage encode them.

    Raises:
        ConfigError, ModelError, DataError: the store, a folder of the configuration, or an id does not exist.
    """
    store = Store.open(path)
    config = replace(config, mixture=MixtureConfig(store.name, 0, {store.name: SourceShare()}))
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, config.stage)
    order = epoch_permutation(len(store), seed, 0)
    choices = _choose_ids([store], ids) if ids else [Choice(store, int(number)) for number in order[:num]]
    numbers = order[:_NUM_DRAWN].tolist()
    which = f"{'all ' if len(numbers) == len(store) else f'{len(numbers):,} of '}{len(store):,} samples"
    distribution, rejects = _measure((store.text(number) for number in numbers), processor, which)
    left_out = {f"while {store.name} was prepared": _read_quarantine(store.path)}
    left_out[f"by this model and stage, of {which}"] = rejects
    return Subject(str(store.path), config, backbone, processor, choices, distribution, left_out)


def compose_config(overrides: Sequence[str], config_dir: str | None) -> RunConfig:
    """The configuration of model and stage to inspect a source with.

    Raises:
        ConfigError: a wrong override, or the default model is not there and none is named.
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    name = [] if "name" in keys else ["name=inspect"]
    mixture = ["++mixture.name=inspect", "++mixture.sources.inspect={}"]  # a placeholder for the store
    config = load([*name, *overrides, *mixture], config_dir, folders=False)
    language_model = config.model.language_model
    if not overrides and not Path(language_model.tokenizer_path).is_dir():
        raise ConfigError(
            f"a source is shown as one model encodes it, and the default one, {language_model.name}, is not in "
            f"{language_model.tokenizer_path}; name another as for training, for example experiment=quickstart "
            "stage=align, or a run with --like RUN"
        )
    return config


def open_run(run_dir: Path, step: int | None, *, ids: Sequence[str], seed: int) -> Subject:
    """The samples of one step of a run, or the named ones of its sources.

    Args:
        run_dir: the run's folder.
        step: counted from 0 as in metrics.jsonl; None takes the last one there.
        ids: `id` or `source:id`, instead of the step's samples.
        seed: draws the images whose widths are counted.

    Raises:
        ConfigError, ModelError, DataError: no run, no such step, data that differs from the run's, or an unknown id.
    """
    # Only here: it imports the engine, which a store does not need.
    from train.assemble import make_planner
    from train.distributed.world import World

    run, config = read_run(run_dir), load_yaml(run_dir / "config.yaml")
    store_root = Path(config.data.store_root)
    backbone = read_backbone(config.model)
    processor = build_processor(backbone, config.stage)
    mixture = Mixture.open(config.mixture, store_root)
    workers, is_shown = config.data.length_workers, sys.stderr.isatty()
    folder = store_root / ".lengths"
    table = open_table(
        mixture,
        processor,
        folder,
        is_writer=True,
        num_workers=workers,
        show_progress=is_shown,
        fallbacks=(run_dir / "lengths", temporary_cache() / "lengths"),
    )
    saved = run.data.get("data_fingerprint", table.fingerprint)
    if saved != table.fingerprint:
        raise ConfigError(
            f"{run_dir} was trained on data {saved[:12]}, but its stores and tokenizer now make "
            f"{table.fingerprint[:12]}: its steps would have other samples; restore them, or inspect a store --like it"
        )
    step = step if step is not None else (run.metrics[-1]["step"] if run.metrics else 0)
    world = World(0, 0, run.num_ranks or 1, torch.device("cpu"), torch.float32, None)
    tower = backbone.config.vision_tower
    num = len(mixture.source_names)
    # Without weights: only its costs are needed.
    mean, std = tower.image_mean, tower.image_std
    model = LlavaNext(build_meta_model(backbone), image_mean=mean, image_std=std, num_sources=num)
    planner = make_planner(config, world, backbone, model, table)
    if not 0 <= step < planner.num_steps:
        raise ConfigError(f"--step {step}: the steps of {run_dir} are 0 to {planner.num_steps - 1}")
    stores = [mixture.store(source) for source in mixture.source_names]
    if ids:
        choices = _choose_ids(stores, ids)
    else:
        # A sample that the step holds twice has the last of its positions.
        where = {
            int(position): f"rank {rank}, micro-step {micro_step}"
            for rank in range(world.size)
            for micro_step, row in enumerate(replace(planner, rank=rank).plan(step).rows)
            for position in row
        }
        positions = planner.plan(step).samples.tolist()
        choices = [Choice(mixture, int(table.rows["sample"][at]), where[at]) for at in positions]
    drawn = epoch_permutation(mixture.num_samples, seed, 0)[:_NUM_DRAWN]
    tokens, supervised, tiles = (np.asarray(table.rows[name]) for name in ("tokens", "supervised", "tiles"))
    aspects = _aspects(mixture.text(int(number)).sizes_hw for number in drawn)
    which = f"all {len(table):,} samples of the run (of images, those of {len(drawn):,} drawn by seed)"
    distribution = Distribution(tokens, supervised, tiles, aspects, which)
    left_out = {"by this run (stage.max_length, template)": _read_quarantine(run_dir)}
    left_out |= {f"while {store.name} was prepared": _read_quarantine(store.path) for store in stores}
    title, run_step = f"{run_dir}, step {step}", RunStep(step, planner.num_steps, planner.plan(step), run.metrics)
    return Subject(title, config, backbone, processor, choices, distribution, left_out, run_step, not ids)


def encode(processor: Processor, sample: StoredSample) -> Example | SampleRejected:
    """The encoded sample, or why the stage rejects it.

    Raises:
        DataError: the bytes of an image cannot be read.
    """
    try:
        return processor.encode(sample.messages, sample.sizes_hw, sample.images)
    except SampleRejected as rejected:
        return rejected
    except OSError as error:
        raise DataError(f"sample {sample.id!r} of source {sample.source}: {error}; prepare the source again") from error


def _measure(texts: Iterable[StoredText], processor: Processor, which: str) -> tuple[Distribution, Rejects]:
    """The lengths of these samples (`which`, in words), and those of them that the processor rejects."""
    lengths, sizes, rejects = [], [], []
    for text in texts:
        sizes.append(text.sizes_hw)
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected as error:
            rejects.append({"id": text.id, "reason": error.reason.value, "detail": error.detail})
        else:
            lengths.append((layout.num_tokens, layout.num_supervised, layout.num_tiles))
    tokens, supervised, tiles = np.array(lengths, dtype=np.int64).reshape(-1, 3).T
    return Distribution(tokens, supervised, tiles, _aspects(sizes), which), rejects


def _aspects(sizes_of_samples: Iterable[Sequence[tuple[int, int]]]) -> np.ndarray:
    """Width over height of every image: float64 [m]."""
    return np.array([width / height for sizes in sizes_of_samples for height, width in sizes], dtype=np.float64)


def _read_quarantine(folder: Path) -> Rejects:
    """The records of a folder's quarantine.jsonl; none where there is no such file."""
    path = folder / "quarantine.jsonl"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _choose_ids(stores: Sequence[Store], ids: Sequence[str]) -> list[Choice]:
    """The samples of these ids, written `id` or `source:id`, in the order of the ids."""
    by_name: dict[str, list[Choice]] = {name: [] for name in ids}
    for store in stores:
        for number, sample_id in enumerate(store.iter_ids()):
            for name in {sample_id, f"{store.name}:{sample_id}"} & by_name.keys():
                by_name[name].append(Choice(store, number))
    for name, choices in by_name.items():
        if not choices:
            known = [each for store in stores for each in islice(store.iter_ids(), 10_000)]
            close = difflib.get_close_matches(name.rpartition(":")[2], known, n=3, cutoff=0) or known[:3]
            where = ", ".join(store.name for store in stores)
            raise DataError(f"--ids {name}: no sample of {where} has this id; there are for example {', '.join(close)}")
    return [choice for choices in by_name.values() for choice in choices]
