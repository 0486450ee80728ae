"""ZeRO-3 with a copy of the weights in every node (DeepSpeed's hpZ): two nodes of two ranks learn what plain ZeRO-3
learns, and a run resumes to and from it.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train import cases
from tests.train.cases import Record, zero, zero_3_in_nodes
from tests.train.conftest import StartRanks
from tests.train.test_trainer import assert_same_training
from train.config.schema import ConfigError, RunConfig
from train.engine.node_sharding import KEY, ranks_per_copy

STEPS = 2
"""Steps before the resume."""
NODES = zero_3_in_nodes()
Layout = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def plain(start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The run on four ranks at ZeRO-3."""
    root = str(tmp_path_factory.mktemp("plain"))
    return start_ranks(4).run(cases.train, replace(tiny_parts, root=root, engine=zero(3)))[0]


@pytest.fixture(scope="module")
def saved(start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on two nodes that has stopped after two steps."""
    config = replace(tiny_parts, root=str(tmp_path_factory.mktemp("saved")), engine=NODES)
    start_ranks(4).run(cases.train_up_to, config, STEPS)
    return config


def _assert_goes_on(resumed: Record, whole: Record) -> None:
    assert resumed.first_step == STEPS
    assert resumed.samples == whole.samples[STEPS:]
    np.testing.assert_allclose(resumed.losses, whole.losses[STEPS:], rtol=1e-5)
    assert cases.relative_difference(resumed.after, whole.after) < 1e-5


def test_two_nodes_learn_what_zero_3_learns(start_ranks: StartRanks, run_config: RunConfig, plain: Record) -> None:
    """Losses, samples and weights of every step, where the launcher says that a node has two ranks."""
    ranks = start_ranks(4)
    record = ranks.run(cases.train_in_nodes, replace(run_config, engine=zero_3_in_nodes(None)), 2)[0]
    assert_same_training(record, plain)


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "engine"),
    [(4, zero(3)), (1, zero(3)), (2, zero(3)), (1, zero(2)), (2, zero(2)), (4, zero(2)), (4, NODES)],
    ids=str,
)
def test_resumes_from_nodes(
    start_ranks: StartRanks, saved: RunConfig, plain: Record, tmp_path: Path, size: int, engine: dict[str, Any]
) -> None:
    """On one, two and four ranks, at ZeRO-2, at ZeRO-3 and again on two nodes."""
    shutil.copytree(saved.root, tmp_path / "outputs")
    config = replace(saved, root=str(tmp_path / "outputs"), engine=engine)
    resumed = start_ranks(size).run(cases.resume_elsewhere, config)[0]
    _assert_goes_on(resumed, plain)
    assert ("converted" in resumed.origin) == ((size, engine["zero_optimization"]["stage"]) != (4, 3))


@pytest.mark.full
@pytest.mark.parametrize("before", [(4, zero(3)), (2, zero(3)), (2, zero(2)), (1, zero(2)), (1, zero(0))], ids=str)
def test_resumes_on_nodes(start_ranks: StartRanks, run_config: RunConfig, plain: Record, before: Layout) -> None:
    """From other numbers of ranks and ZeRO stages."""
    size, engine = before
    start_ranks(size).run(cases.train_up_to, replace(run_config, engine=engine), STEPS)
    resumed = start_ranks(4).run(cases.resume_elsewhere, replace(run_config, engine=NODES))[0]
    _assert_goes_on(resumed, plain)


@pytest.mark.full
def test_writes_the_same_result_as_zero_3(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The export, gathered from two nodes after the last step."""
    from safetensors.numpy import load_file

    written = {}
    for name, engine in (("plain", zero(3)), ("nodes", NODES)):
        config = replace(run_config, name=name, engine=engine)
        start_ranks(4).run(cases.train_and_write, config)
        files = sorted((config.run_dir / "export").glob("*.safetensors"))
        written[name] = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert cases.relative_difference(written["nodes"], written["plain"]) < 1e-5


@pytest.mark.parametrize(
    ("size", "num_ranks", "ranks_per_node", "expected"),
    [(None, 32, 8, 8), (4, 32, 8, 4), (None, 8, 8, 1), (8, 8, 8, 1), (1, 8, 4, 1), (None, 4, 1, 1), (None, 1, 0, 1)],
)
def test_ranks_that_share_a_copy(size: int | None, num_ranks: int, ranks_per_node: int, expected: int) -> None:
    """Those of a node unless given; on one node the partition over all ranks suffices."""
    assert ranks_per_copy({KEY: size}, num_ranks=num_ranks, ranks_per_node=ranks_per_node) == expected


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "named"), [(None, 0, "does not say"), (None, 3, "8 .*of 3"), (5, 4, "of 5")]
)
def test_ranks_that_cannot_share_a_copy(size: int | None, ranks_per_node: int, named: str) -> None:
    """An unknown number, and one that does not divide the number of ranks."""
    with pytest.raises(ConfigError, match=named):
        ranks_per_copy({KEY: size}, num_ranks=8, ranks_per_node=ranks_per_node)
