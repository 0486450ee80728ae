"""ZeRO-3 with a copy of the weights in every node (DeepSpeed's hpZ): two nodes of two ranks learn what plain ZeRO-3
learns, and a run resumes to and from it.
"""

from dataclasses import replace

import pytest

from tests.train import cases
from tests.train.cases import Record, zero, zero_3_in_nodes
from tests.train.conftest import StartRanks
from tests.train.test_trainer import assert_same_training
from train.config.schema import ConfigError, RunConfig
from train.engine.node_sharding import ranks_per_copy


@pytest.fixture(scope="module")
def plain(start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The run on four ranks at ZeRO-3."""
    root = str(tmp_path_factory.mktemp("plain"))
    return start_ranks(4).run(cases.train, replace(tiny_parts, root=root, engine=zero(3)))[0]


def test_two_nodes_learn_what_zero_3_learns(start_ranks: StartRanks, run_config: RunConfig, plain: Record) -> None:
    """Losses, samples and weights of every step."""
    record = start_ranks(4).run(cases.train, replace(run_config, engine=zero_3_in_nodes()))[0]
    assert_same_training(record, plain)
