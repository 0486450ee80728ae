"""What is evaluated: a model on disk, as it was trained to see samples, and samples of each source.

Owns finding them, from a run's folder or from a directory of a model and prepared sources.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import METRICS
from data_recipes.store.reader import read_manifest
from llava_next.config import ImageMode, LanguageModelConfig, ModelConfig, ModelError, VisionTowerConfig
from llava_next.formats.hugging_face import read_hf, stock_image_mode
from llava_next.inputs.conversation import FROM_TOKENIZER
from llava_next.inputs.processor import Processor
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from train.config.compose import load_yaml
from train.config.schema import ConfigError, PackingConfig
from train.data.loader import stage_processor
from train.validation.held_out import HeldOutSample, of_mixture, of_store

_PACKING = PackingConfig(max_tokens=8192, max_tiles=48)
"""Rows of a model whose run is not known."""


@dataclass(frozen=True)
class Subject:
    """A model and the samples that it is evaluated on, by source; `metrics` name what judges each source's answers."""

    export: Path
    backbone: Backbone
    model: LlavaNext
    processor: Processor
    packing: PackingConfig
    per_sample: bool
    samples: dict[str, list[HeldOutSample]]
    metrics: dict[str, str]


def of_run(
    run_dir: Path, stores: Sequence[Path], device: torch.device, *, num: int, seed: int, chosen: Mapping[str, str]
) -> Subject:
    """The export of a run on what its mixture holds out and excludes, or on other stores.

    Args:
        stores: prepared sources; none takes the mixture's.
        num: at most so many samples of each source. Held-out ones stand in an order that makes the first a fair draw;
            of `stores` they are drawn by `seed`.
        chosen: metrics by source, before what the stores say.

    Raises:
        ConfigError, ModelError, DataError: no run, no export, nothing held out, no such store or metric.
    """
    config = load_yaml(run_dir / "config.yaml")
    export = run_dir / "export"
    if not export.is_dir():
        raise ConfigError(
            f"{run_dir} holds no export/; finish the stage first: python -m train stage={config.stage.name} …"
        )
    store_root = Path(config.data.store_root)
    if stores:
        samples = _of_stores(stores, num, seed)
        places = {path.name: path for path in stores}
    else:
        samples = {name: of[:num] for name, of in of_mixture(Mixture.open(config.mixture, store_root)).items()}
        samples |= {name: of_store(store_root / name, num) for name in config.mixture.exclude}
        places = {name: store_root / name for name in samples}
    if not samples:
        raise ConfigError(
            f"mixture {config.mixture.name} holds nothing out; give a source `holdout: N`, name a store in `exclude`, "
            "or name stores with --store"
        )
    backbone, model = _read(export, config.model, device)
    per_sample = config.stage.loss_weighting == "sample"
    processor = stage_processor(backbone, config.stage)
    metrics = _metrics(places, chosen)
    return Subject(export, backbone, model, processor, config.packing, per_sample, samples, metrics)


def of_directory(
    export: Path, stores: Sequence[Path], device: torch.device, *, num: int, seed: int, chosen: Mapping[str, str]
) -> Subject:
    """A directory of a LLaVA or LLaVA-NeXT in the Hugging Face layout, on samples of stores drawn by seed.

    Prompts are those of its chat template, pictures are seen as its processor cuts them, and the longest sample is what
    its positions hold. Arguments and errors are those of `of_run`.
    """
    if not stores:
        raise ConfigError(f"{export} is a model and no run: name what it is asked about, --store STORE")
    samples = _of_stores(stores, num, seed)
    config, image_mode = _described(export)
    backbone, model = _read(export, config, device)
    processor = backbone.processor(template=FROM_TOKENIZER, image_mode=image_mode, max_length=backbone.max_positions)
    metrics = _metrics({path.name: path for path in stores}, chosen)
    longest = max(_PACKING.max_tokens, backbone.max_positions)
    return Subject(export, backbone, model, processor, replace(_PACKING, max_tokens=longest), False, samples, metrics)


def _read(export: Path, config: ModelConfig, device: torch.device) -> tuple[Backbone, LlavaNext]:
    backbone, model = read_hf(export, config)
    # On a CPU, half precision is slow and no more exact.
    return backbone, (model.to(device) if device.type == "cuda" else model.float()).eval()


def _of_stores(stores: Sequence[Path], num: int, seed: int) -> dict[str, list[HeldOutSample]]:
    found: dict[str, list[HeldOutSample]] = {}
    for path in stores:
        samples = of_store(path, num, seed)
        name = samples[0].source
        if name in found:
            raise DataError(f"--store {path}: there are two stores of source {name}; name one")
        found[name] = samples
    return found


def _metrics(places: Mapping[str, Path], chosen: Mapping[str, str]) -> dict[str, str]:
    """The metric of each source: the chosen one, or its store's, or exact_match where a store is older than metrics."""
    manifests = {path: read_manifest(path) or {} for path in places.values()}
    found = {
        manifests[path].get("name", name): manifests[path].get("metric", "exact_match") for name, path in places.items()
    }
    for source, metric in chosen.items():
        if source not in found:
            raise ConfigError(f"--metric {source}={metric}: there is no such source; there are {', '.join(found)}")
        if metric not in (*METRICS, "none"):
            raise ConfigError(f"--metric {source}={metric}: there is no such metric; known: {', '.join(METRICS)}, none")
        found[source] = metric
    return found


def _described(export: Path) -> tuple[ModelConfig, ImageMode]:
    """What a directory says of itself beside its weights.

    Raises:
        ModelError: transformers cannot read its config or its processor.
    """
    try:
        kind = AutoConfig.from_pretrained(export).model_type
        images: Any = AutoProcessor.from_pretrained(export).image_processor
        mean, std = tuple(images.image_mean), tuple(images.image_std)
    except (OSError, ValueError, AttributeError, json.JSONDecodeError) as error:
        raise ModelError(f"{export} is no directory of a model with its processor: {error}") from error
    image_mode = stock_image_mode(kind, images, export)
    name = export.resolve().name
    language_model = LanguageModelConfig(name, str(export), FROM_TOKENIZER)
    return ModelConfig(language_model, VisionTowerConfig(name, str(export), image_mean=mean, image_std=std)), image_mode
