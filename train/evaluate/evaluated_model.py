"""Loads the model to evaluate and the samples of each source.

They come from a run folder, or from a model directory and prepared sources.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import METRICS
from data_recipes.store.reader import Store, read_manifest
from llava_next.config import (
    LanguageModelConfig,
    ModelConfig,
    ModelError,
    ViewsConfig,
    VisionTowerConfig,
)
from llava_next.file_access import permission_problem
from llava_next.formats.hugging_face import read_hf, stock_views
from llava_next.formats.onevision import load_processor
from llava_next.inputs.conversation import FROM_TOKENIZER
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from train.config.compose import load_yaml
from train.config.schema import ConfigError, PackingConfig
from train.data.loader import build_processor
from train.validation.held_out import HeldOutSample, list_mixture_samples, list_store_samples

_PACKING = PackingConfig(max_tokens=8192, max_tiles=48)
"""Budgets of a row for a model without a known run. A longer sample has a row of its own."""


DEFAULT_NUM_SAMPLES = 512


@dataclass(frozen=True)
class SampleMaxima:
    """The maximum number of samples of each source: that of `by_source`, else `default`."""

    default: int = DEFAULT_NUM_SAMPLES
    by_source: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, pairs: Sequence[tuple[str, int]]) -> "SampleMaxima":
        """Takes pairs of a source, empty for every source, and a number; the last of a source counts."""
        numbers = dict(pairs)
        return cls(numbers.pop("", DEFAULT_NUM_SAMPLES), numbers)

    def __getitem__(self, source: str) -> int:
        return self.by_source.get(source, self.default)

    def check_sources(self, sources: Iterable[str]) -> None:
        """Raises ConfigError if `by_source` names others than `sources`."""
        for source in set(self.by_source) - set(sources):
            raise ConfigError(f"--num-samples {source}={self[source]}: unknown source; available: {', '.join(sources)}")


@dataclass(frozen=True)
class Asked:
    """The samples to evaluate a model on, and the name of the metric of the answers, by source."""

    samples: dict[str, list[HeldOutSample]]
    metrics: dict[str, str]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and the samples to evaluate it on.

    Attributes:
        export: directory in the Hugging Face layout.
        packing: budgets of a row; one sample or question that exceeds them has a row of its own.
        per_sample: weigh every sample equally in the loss, as `loss_weighting: sample` does.
        samples: by source.
        metrics: name of the metric of each source's answers.
    """

    export: Path
    backbone: Backbone
    model: LlavaNext
    processor: Processor
    packing: PackingConfig
    per_sample: bool
    samples: dict[str, list[HeldOutSample]]
    metrics: dict[str, str]


def load_run(
    run_dir: Path,
    stores: Sequence[Path],
    device: torch.device,
    *,
    maxima: SampleMaxima,
    seed: int,
    chosen: Mapping[str, str],
) -> EvaluatedModel:
    """Loads the export of a run, with the held-out and excluded samples of its mixture or with other stores.

    Args:
        stores: prepared sources; if empty, those of the mixture.
        maxima: maximum number of samples per source. Held-out samples are in the order of their hashes, so the first
            ones are a random sample; those of `stores` are drawn with `seed`.
        chosen: metrics by source, which take precedence over those of the stores.

    Raises:
        ConfigError, ModelError, DataError: the run, the export, a store or a metric does not exist, or the mixture has
            no held-out samples.
    """
    config = load_yaml(run_dir / "config.yaml")
    export = run_dir / "export"
    if not export.is_dir():
        raise ConfigError(
            f"{run_dir} contains no export/; finish the stage first: python -m train stage={config.stage.name} ..."
        )
    asked = select_samples(run_dir, stores, maxima=maxima, seed=seed, chosen=chosen)
    backbone, model = _load(export, config.model, device)
    per_sample = config.stage.loss_weighting == "sample"
    processor = build_processor(backbone, config.stage)
    return EvaluatedModel(export, backbone, model, processor, config.packing, per_sample, asked.samples, asked.metrics)


def select_samples(
    run_dir: Path | None, stores: Sequence[Path], *, maxima: SampleMaxima, seed: int, chosen: Mapping[str, str]
) -> Asked:
    """Returns samples of stores, drawn with `seed`; without stores, a run's held-out and excluded samples.

    Arguments and errors are those of `load_run`; one of `run_dir` and `stores` is given.
    """
    if stores:
        samples = _draw_samples(stores, maxima, seed)
        paths = {path.name: path for path in stores}
    else:
        assert run_dir is not None
        config = load_yaml(run_dir / "config.yaml")
        store_root = Path(config.data.store_root)
        samples = {
            name: of[: maxima[name]]
            for name, of in list_mixture_samples(Mixture.open(config.mixture, store_root)).items()
        }
        samples |= {name: list_store_samples(store_root / name, maxima[name]) for name in config.mixture.exclude}
        paths = {name: store_root / name for name in samples}
        if not samples:
            raise ConfigError(
                f"mixture {config.mixture.name} has no held-out samples; set `holdout: N` for a source, list a store "
                "in `exclude`, or pass stores with --store"
            )
    maxima.check_sources(samples)
    return Asked(samples, _select_metrics(paths, chosen))


def load_directory(
    export: Path,
    stores: Sequence[Path],
    device: torch.device,
    *,
    maxima: SampleMaxima,
    seed: int,
    chosen: Mapping[str, str],
) -> EvaluatedModel:
    """Loads a LLaVA or LLaVA-NeXT directory in the Hugging Face layout, with samples drawn from stores.

    Its chat template and image processor are used, and its number of positions is the maximum length. Arguments and
    errors are those of `load_run`.
    """
    if not stores:
        raise ConfigError(f"{export} is a model directory without a run; pass prepared sources with --store STORE")
    asked = select_samples(None, stores, maxima=maxima, seed=seed, chosen=chosen)
    config, views = _read_config(export)
    backbone, model = _load(export, config, device)
    processor = backbone.processor(template=FROM_TOKENIZER, views=views, max_length=backbone.max_positions)
    return EvaluatedModel(export, backbone, model, processor, _PACKING, False, asked.samples, asked.metrics)


def _load(export: Path, config: ModelConfig, device: torch.device) -> tuple[Backbone, LlavaNext]:
    backbone, model = read_hf(export, config)
    # On a CPU, half precision is slower than float32.
    return backbone, (model.to(device) if device.type == "cuda" else model.float()).eval()


def _draw_samples(stores: Sequence[Path], maxima: SampleMaxima, seed: int) -> dict[str, list[HeldOutSample]]:
    by_source: dict[str, list[HeldOutSample]] = {}
    for path in stores:
        name = Store.open(path).name
        samples = list_store_samples(path, maxima[name], seed)
        if name in by_source:
            raise DataError(f"--store {path}: two stores of source {name} were given; give one")
        by_source[name] = samples
    return by_source


def _select_metrics(paths: Mapping[str, Path], chosen: Mapping[str, str]) -> dict[str, str]:
    """Returns the metric of each source: the chosen one, else its store's, else exact_match (for older stores)."""
    manifests = {path: read_manifest(path) or {} for path in paths.values()}
    metrics = {
        manifests[path].get("name", name): manifests[path].get("metric", "exact_match") for name, path in paths.items()
    }
    for source, metric in chosen.items():
        if source not in metrics:
            raise ConfigError(f"--metric {source}={metric}: unknown source; available: {', '.join(metrics)}")
        if metric not in (*METRICS, "none"):
            raise ConfigError(f"--metric {source}={metric}: unknown metric; available: {', '.join(METRICS)}, none")
        metrics[source] = metric
    return metrics


def _read_config(export: Path) -> tuple[ModelConfig, ViewsConfig]:
    """Reads the model configuration and the views of a directory.

    Raises:
        ModelError: transformers cannot read the config or the processor.
    """
    try:
        config = AutoConfig.from_pretrained(export)
        images: Any = load_processor(export).image_processor
        mean, std = tuple(images.image_mean), tuple(images.image_std)
    except (OSError, ValueError, AttributeError, json.JSONDecodeError) as error:
        raise ModelError(
            permission_problem(export) or f"{export} is not a model directory with a processor: {error}"
        ) from error
    views = stock_views(config, images, export)
    name = export.resolve().name
    language_model = LanguageModelConfig(name, str(export), FROM_TOKENIZER)
    return ModelConfig(language_model, VisionTowerConfig(name, str(export), image_mean=mean, image_std=std)), views
