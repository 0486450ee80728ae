"""Fixtures of the tests of `llava_next`: one thread, tiny backbones, and real assets if they are present."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_next.cache_root import cache_root
from llava_next.config import ModelConfig, ProjectorKind
from llava_next.model.build import Backbone, read_backbone
from tests.tiny import TokenizerName, TowerName, tiny_model

MakeBackbone = Callable[..., Backbone]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small matrix products are slower on several threads, and sums on one thread are reproducible."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_backbone(tmp_path_factory: pytest.TempPathFactory) -> MakeBackbone:
    """Builds a tiny backbone, with new configs in each call, because building and writing a model modifies them.

    `changes` replace keys of the language model's config.
    """
    configs: dict[tuple[object, ...], ModelConfig] = {}

    def make(
        tower: TowerName = "clip",
        template: str = "chatml",
        kind: TokenizerName = "bytes",
        tied: bool = False,
        projector: ProjectorKind = "mlp2x_gelu",
        **changes: Any,
    ) -> Backbone:
        key = (tower, template, kind, tied, *sorted(changes.items()))
        if key not in configs:
            folder = tmp_path_factory.mktemp("tiny")
            configs[key] = tiny_model(folder, tower, template, kind=kind, tied=tied, **changes)
        return read_backbone(replace(configs[key], projector=projector))

    return make


def _asset(name: str) -> Path:
    folder = cache_root() / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; fetch it: python scripts/quickstart/assets.py")
    return folder


@pytest.fixture
def smollm2_tokenizer() -> Path:
    """The tokenizer of SmolLM2-135M-Instruct."""
    return _asset("smollm2_six_layers")


@pytest.fixture
def smollm2() -> Path:
    """SmolLM2-135M-Instruct with weights."""
    return _asset("smollm2_135m")


@pytest.fixture
def dinov2() -> Path:
    """DINOv2-small with weights."""
    return _asset("dinov2_small")
