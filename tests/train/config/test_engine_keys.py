"""DeepSpeed's keys: those that may be set change nothing that is learned, and all others are refused when the
configuration is read, with the key, the reason and the fix.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.train import cases
from tests.train.cases import Record, relative_difference
from tests.train.config.test_schema import checked
from tests.train.conftest import StartRanks
from train.config.rules import OFFLOAD_KEYS, ZERO_KEYS, check_values
from train.config.schema import ConfigError, RunConfig

OTHERS: dict[str, Any] = {
    "overlap_comm": {2: True, 3: False},
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 5_000,
    "allgather_bucket_size": 2_000,
    "use_multi_rank_bucket_allreduce": False,
    "round_robin_gradients": True,
    "offload_optimizer": {"device": "cpu", "pin_memory": False},
    "offload_param": {"device": "cpu", "pin_memory": False},
    "sub_group_size": 3_000,
    "stage3_prefetch_bucket_size": 3_000,
    "stage3_param_persistence_threshold": 100,
    "stage3_model_persistence_threshold": 400,
    "stage3_max_live_parameters": 4_000,
    "stage3_max_reuse_distance": 2_000,
    "stage3_use_all_reduce_for_fetch_params": True,
    "zero_hpz_partition_size": 2,
}
"""A value of each key that is not DeepSpeed's default (by stage if the default depends on it)."""
NEEDED_BESIDES = {"stage3_model_persistence_threshold": {"stage3_param_persistence_threshold": 100}}


def _value(key: str, stage: int) -> Any:
    value = OTHERS[key]
    return value[stage] if isinstance(value, dict) and stage in value else value


def _pairs() -> list[tuple[int, str]]:
    return [(stage, key) for key, stages in ZERO_KEYS.items() for stage in stages if key != "stage"]


@pytest.fixture(scope="module")
def plain(start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The run on one rank without ZeRO."""
    root = str(tmp_path_factory.mktemp("plain"))
    return start_ranks(1).run(cases.train, replace(tiny_parts, root=root, engine={}))[0]


def _assert_same(
    start_ranks: StartRanks, config: RunConfig, options: dict[str, Any], plain: Record, size: int = 2
) -> None:
    config = replace(config, engine={"zero_optimization": options})
    check_values(config)
    record = start_ranks(size).run(cases.train, config)[0]
    assert record.losses == pytest.approx(plain.losses, rel=1e-5)
    assert record.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
    assert relative_difference(record.after, plain.after) < 1e-5


def test_every_key_is_tried() -> None:
    """This file has a value for each key that may be set, and for each nested key of offload."""
    assert {*OTHERS} == {*ZERO_KEYS} - {"stage"}
    for key in ("offload_optimizer", "offload_param"):
        assert tuple(OTHERS[key]) == OFFLOAD_KEYS


@pytest.mark.full
@pytest.mark.parametrize(("stage", "key"), _pairs())
def test_a_key_changes_nothing(
    start_ranks: StartRanks, run_config: RunConfig, plain: Record, stage: int, key: str
) -> None:
    """Several ranks learn with it what one rank learns without ZeRO."""
    options = {"stage": stage, **NEEDED_BESIDES.get(key, {}), key: _value(key, stage)}
    size = 4 if key == "zero_hpz_partition_size" else 2  # two groups of two
    _assert_same(start_ranks, run_config, options, plain, size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_keys_of_a_stage_change_nothing(
    start_ranks: StartRanks, run_config: RunConfig, plain: Record, stage: int
) -> None:
    """The same with all keys together."""
    options = {"stage": stage}
    options |= {key: _value(key, stage) for of, key in _pairs() if of == stage and key != "zero_hpz_partition_size"}
    _assert_same(start_ranks, run_config, options, plain)


@pytest.mark.parametrize(
    "key",
    [
        *("gradient_allreduce_op", "sequence_parallel_size", "data_parallel_size", "prescale_gradients"),
        *("activation_checkpointing", "tensor_parallel", "no_such_key", "checkpoint", "aio"),
    ],
)
def test_other_keys_are_refused(tiny_parts: RunConfig, key: str) -> None:
    """At the top level only `zero_optimization` may be set."""
    with pytest.raises(ConfigError, match=rf"engine\.{key} is refused: .*remove it\. .*zero_optimization"):
        checked(tiny_parts, {f"engine.{key}": 2})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stage": 2, "zero_hpz_partition_size": 2}, "has no effect at ZeRO stage 2"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, "null .*or a number of ranks from 1 on, got 0"),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, "got '8'"),
        (
            {"stage": 3, "zero_hpz_partition_size": None, "offload_param": {"device": "cpu"}},
            "zero_hpz_partition_size=null and offload_param exclude each other",
        ),
    ],
)
def test_a_copy_in_nodes_is_checked(tiny_parts: RunConfig, options: dict[str, Any], named: str) -> None:
    """Its size, its stage, and offloading of the weights."""
    with pytest.raises(ConfigError, match=named):
        check_values(replace(tiny_parts, engine={"zero_optimization": options}))
    allowed = {"stage": 3, "zero_hpz_partition_size": None, "offload_param": {"device": "none"}}
    check_values(replace(tiny_parts, engine={"zero_optimization": allowed}))


def test_the_communication_is_in_fp32_or_bf16(tiny_parts: RunConfig) -> None:
    """Other types of DeepSpeed are refused."""
    check_values(replace(tiny_parts, engine={"communication_data_type": "bf16"}))
    with pytest.raises(ConfigError, match="communication_data_type must be one of fp32, bf16, got 'fp16'"):
        check_values(replace(tiny_parts, engine={"communication_data_type": "fp16"}))


@pytest.mark.parametrize(
    "key",
    [
        *("leaf_module", "zenflow", "zero_quantized_weights", "allgather_partitions", "no_such_key"),
        *("prefetch_bucket_size", "cpu_offload"),
    ],
)
def test_other_keys_of_zero_are_refused(tiny_parts: RunConfig, key: str) -> None:
    """A key of `zero_optimization` that is not in the table is refused."""
    with pytest.raises(ConfigError, match=rf"engine\.zero_optimization\.{key} is refused: .*reduce_bucket_size"):
        checked(tiny_parts, {f"engine.zero_optimization.{key}": True})


def test_a_key_without_effect_is_refused(tiny_parts: RunConfig) -> None:
    """A key that DeepSpeed ignores at the chosen stage is refused with the stages at which it has an effect."""
    for stage, key in ((0, "reduce_bucket_size"), (2, "stage3_max_live_parameters"), (3, "round_robin_gradients")):
        config = replace(tiny_parts, engine={"zero_optimization": {"stage": stage, key: 5}})
        with pytest.raises(ConfigError, match=rf"{key}=5 has no effect at ZeRO stage {stage}.*set engine=zero\d"):
            check_values(config)


@pytest.mark.parametrize(
    ("offload", "parts"),
    [
        ({"device": "nvme"}, ["device must be none or cpu", "nvme"]),
        ({"device": "cpu", "nvme_path": "/tmp"}, ["nvme_path is refused", "device, pin_memory"]),
        ({"device": "cpu", "ratio": 0.5}, ["ratio is refused"]),
        ("cpu", ["must be a dictionary", "offload_optimizer.device=cpu"]),
        ({"pin_memory": True}, ["must be a dictionary with a `device`"]),
    ],
)
def test_offload_is_to_the_host_only(tiny_parts: RunConfig, offload: Any, parts: list[str]) -> None:
    """Devices that are not tested, and their keys, are refused."""
    config = replace(tiny_parts, engine={"zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    with pytest.raises(ConfigError) as caught:
        check_values(config)
    assert [part for part in parts if part not in str(caught.value)] == []
