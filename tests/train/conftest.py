"""Fixtures of the tests of train/: the ranks, a tiny model with a tiny mixture, and a run of them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.tiny import tiny_mixture, tiny_model
from tests.train.cases import tiny_run
from train.config.schema import RunConfig

os.environ["DS_ACCELERATOR"] = "cpu"
NUM_SAMPLES = 40
StartRanks = Callable[[int], Ranks]


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world size: started with the first case and reused by all others."""
    folder = tmp_path_factory.mktemp("ranks")
    worlds: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        return worlds.setdefault(size, Ranks(size, folder))

    yield of_size
    for ranks in worlds.values():
        ranks.close()


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finetune run of a tiny model with every part trained; its stores and directories exist."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "models", tower="clip")
    mixture, store_root = tiny_mixture(folder / "data", NUM_SAMPLES)
    return tiny_run(model, mixture, store_root, folder / "outputs")


@pytest.fixture
def run_config(tiny_parts: RunConfig, tmp_path: Path) -> RunConfig:
    """The same run with its own output folder."""
    from dataclasses import replace

    return replace(tiny_parts, root=str(tmp_path / "outputs"))
