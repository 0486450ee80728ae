"""Tests of the communication formulas: by hand, and against the collectives that DeepSpeed issues on real ranks."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model
from tests.train import plan_cases
from tests.train.cases import Collective, zero
from tests.train.conftest import StartRanks
from tests.train.plan.test_hours import hardware
from tests.train.plan.test_memory import setting
from train.config.schema import RunConfig
from train.plan.communication import (
    LINK_SHARE,
    OVERLAP,
    Collectives,
    count_bytes,
    count_gathers,
    count_groups,
    estimate_communication,
    estimate_ring,
    list_collectives,
    list_gathered,
)
from train.plan.execution_settings import ExecutionSettings, read_settings
from train.plan.model_facts import ModelFacts, TensorSizes, count_model, read_architecture

TRAINED, EVERY = 6700, 7000
TENSORS = TensorSizes((300, *(67,) * 100), (67,) * 100, (300, *(67,) * 100), num_groups=1)
NOTHING_KEPT: dict[str, Any] = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
NUM_MICRO_STEPS = 3
FULL = pytest.mark.full


def test_ring_by_hand() -> None:
    """Seven eighths of the bytes over NVLink in a node; over the node's ports, with two slow hops, between two
    nodes."""
    node = replace(hardware(), link_gb_s=300, network_gb_s=100, link_latency_us=2, network_latency_us=6)
    assert estimate_ring(240e9, node, 1) == pytest.approx(7 / 8 * 240 / (300 * LINK_SHARE) + 7 * 2e-6)
    assert estimate_ring(240e9, node, 2) == pytest.approx(15 / 16 * 240 / (100 * LINK_SHARE) + 13 * 2e-6 + 2 * 6e-6)
    assert estimate_ring(240e9, replace(node, gpus_per_node=1), 1) == 0


def moved(settings: ExecutionSettings, micro_steps: float) -> float:
    """Returns the whole bytes of all collectives of a step."""
    return sum(each.num_bytes for each in list_collectives(TENSORS, settings, 8, micro_steps, half=True))


def test_stage_3_sends_more_and_stage_2_every_micro_step() -> None:
    """Gradients are sent once per step below stage 2 and once per micro-step from stage 2 on; stage 3 gathers weights
    twice per micro-step, with and without recompute, if it keeps none of them."""
    assert moved(setting(1), 4) == 2 * 4 * TRAINED + 2 * TRAINED
    assert moved(setting(2), 4) == 4 * 2 * 4 * TRAINED + 2 * TRAINED
    small: dict[str, Any] = NOTHING_KEPT | {"stage3_param_persistence_threshold": 0}
    for recompute in ((), ("language_model",)):
        assert moved(setting(3, recompute=recompute, **small), 4) == 4 * (4 * TRAINED + 2 * 2 * EVERY)
    kept: dict[str, Any] = NOTHING_KEPT | {"stage3_max_live_parameters": 1000, "stage3_param_persistence_threshold": 50}
    assert moved(setting(3, **kept), 4) == 4 * (4 * TRAINED + 2 * (2 * EVERY - 14 * 67))
    whole: dict[str, Any] = NOTHING_KEPT | {"stage3_param_persistence_threshold": 67}
    assert moved(setting(3, **whole), 4) == 4 * (4 * TRAINED + 2 * 2 * 300) + 2 * TRAINED


def test_a_frozen_tower_is_gathered_once() -> None:
    """No gradient passes it, so the backward pass does not gather it."""
    settings = setting(3, **NOTHING_KEPT, stage3_param_persistence_threshold=0)
    frozen = replace(TENSORS, backward=TENSORS.trained)
    assert list_gathered(frozen, settings) == [300, *(67,) * 200]
    assert list_gathered(TENSORS, settings) == [300, *(67,) * 200, 300]


def test_bf16_gradients_are_half_as_many_bytes() -> None:
    """`communication_data_type: bf16` halves the gradients and nothing else."""
    plain = setting(2)
    halved = replace(plain, engine={**plain.engine, "communication_data_type": "bf16"})
    assert moved(plain, 4) - moved(halved, 4) == 4 * 2 * 2 * TRAINED


def test_a_copy_in_every_node_leaves_one_gather_across() -> None:
    """With hpZ all gathers but the first of trained weights are inside a node; one node has no copy."""
    options: dict[str, Any] = {
        **NOTHING_KEPT,
        "zero_hpz_partition_size": None,
        "stage3_param_persistence_threshold": 0,
    }
    settings = replace(setting(3, **options), nodes=4)
    listed = list_collectives(TENSORS, settings, 8, 4, half=True)
    across, inside = count_bytes(list(listed), 4, 8)
    assert across == pytest.approx(31 / 32 * (4 * 4 * TRAINED + 2 * TRAINED))
    assert inside == pytest.approx(7 / 8 * 2 * (4 * 2 * EVERY - TRAINED))
    assert settings.ranks_per_copy(32) == 8
    assert replace(settings, nodes=1).ranks_per_copy(8) == 1


@pytest.mark.parametrize("compute_s", [0.01, 1e6])
def test_computation_hides_at_most_its_share(compute_s: float) -> None:
    """Exposed and hidden seconds add up to those without overlap; what follows the update is never hidden."""
    node = replace(hardware(), link_latency_us=0)
    collectives = [
        Collectives("gradients", 10, 1e12, across=True, overlaps=True),
        Collectives("updated weights", 1, 1e12, across=True, overlaps=False),
    ]
    each_s = 1e12 * 7 / 8 / (300e9 * LINK_SHARE)
    result = estimate_communication(collectives, node, 1, compute_s)
    assert result.total_s == pytest.approx(2 * each_s)
    assert result.hidden_s == pytest.approx(min(each_s, OVERLAP * compute_s))
    assert estimate_communication(collectives, node, 1, compute_s, overlap=0.0).hidden_s == 0


def test_gathers_are_ahead_within_the_room() -> None:
    """The first alone, then groups of at least a bucket while there is room, then what released tensors make room
    for."""
    assert (
        count_gathers([2, 4, 4, 4, 10], setting(3, stage3_prefetch_bucket_size=8, stage3_max_live_parameters=99)) == 3
    )
    assert count_gathers([4] * 10, setting(3, stage3_prefetch_bucket_size=8, stage3_max_live_parameters=8)) == 10
    assert count_gathers([4] * 10, setting(3, stage3_prefetch_bucket_size=8, stage3_max_live_parameters=20)) == 8
    assert count_gathers([], setting(3)) == 0


def test_a_bucket_is_full_before_it_overflows() -> None:
    """A tensor that does not fit into a bucket begins the next one, and a larger one has its own."""
    assert count_groups([4, 4, 4], 8) == 2
    assert count_groups([20, 4, 4], 8) == 2
    assert count_groups([], 8) == 0


@pytest.fixture(scope="module")
def deep(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run with six blocks, so that no tensor has more than a tenth of all elements."""
    model = tiny_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=6, hidden_size=64, intermediate_size=176)
    return replace(tiny_parts, model=model)


KEEPS_A_QUARTER: dict[str, Any] = {
    "stage3_max_live_parameters": 100_000,
    "stage3_max_reuse_distance": 100_000,
    "stage3_prefetch_bucket_size": 50_000,
}
KEEPS_ALL: dict[str, Any] = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 50_000,
}
HPZ: dict[str, Any] = {"zero_hpz_partition_size": 2}


def _engine(stage: int, options: dict[str, Any]) -> dict[str, Any]:
    engine = zero(stage)
    engine["zero_optimization"] |= options
    return engine


def _summary(collectives: list[Collective], *, gathers: bool) -> dict[tuple[str, ...], tuple[int, int]]:
    """Returns number and whole elements of gathers or of reductions, by group."""
    result: dict[tuple[str, ...], tuple[int, int]] = {}
    for each in collectives:
        if ("gather" in each.kind) == gathers:
            count, elements = result.get(each.group, (0, 0))
            result[each.group] = count + 1, elements + max(prod(size) for size in each.sizes)
    return result


def _facts(config: RunConfig) -> ModelFacts:
    return count_model(read_architecture(config.model), config)


@pytest.mark.parametrize(
    ("name", "options", "recompute"),
    [
        pytest.param("quarter", KEEPS_A_QUARTER, ("language_model", "vision_tower"), marks=FULL),
        pytest.param("quarter_plain", KEEPS_A_QUARTER, (), marks=FULL),
        pytest.param("all", KEEPS_ALL, ("language_model", "vision_tower"), marks=FULL),
    ],
)
def test_gathers_are_those_of_zero_3(
    start_ranks: StartRanks,
    deep: RunConfig,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    recompute: tuple[Any, ...],
) -> None:
    """Recorded on two ranks: every micro-step gathers what the formula says, and recompute adds nothing;
    small weights are gathered one by one after the update; gradients are reduced by buckets. The number of gathers is
    exact if everything stays gathered, else within a fifth."""
    config = replace(deep, root=str(tmp_path), name=name, engine=_engine(3, options), recompute=recompute)
    recorded = start_ranks(2).run(plan_cases.step_collectives, config, NUM_MICRO_STEPS, timeout_s=240)[0]
    listed = list_collectives(_facts(config).tensors, read_settings(config, 1), 2, NUM_MICRO_STEPS, half=False)
    planned = {each.kind: each for each in listed}
    assert planned["weights inside a node"].count == 0
    for micro_step in recorded.micro_steps:
        ((count, elements),) = _summary(micro_step, gathers=True).values()
        assert elements == pytest.approx(planned["weights"].num_bytes / 4 / NUM_MICRO_STEPS, rel=0.001)
        assert count == pytest.approx(planned["weights"].count / NUM_MICRO_STEPS, rel=0.0 if name == "all" else 0.2)
        ((count, elements),) = _summary(micro_step, gathers=False).values()
        assert count == planned["gradients"].count / NUM_MICRO_STEPS
        assert elements == pytest.approx(planned["gradients"].num_bytes / 4 / NUM_MICRO_STEPS, rel=0.001)
    ((count, elements),) = _summary(recorded.update, gathers=True).values()
    assert (count, elements * 4) == (planned["small weights"].count, planned["small weights"].num_bytes)


@pytest.mark.full
def test_gathers_inside_and_across_nodes(start_ranks: StartRanks, deep: RunConfig, tmp_path: Path) -> None:
    """Recorded on four ranks as two nodes of two: the first micro-step gathers every weight across the nodes, and all
    further gathers are inside a node; bytes are those of the formula within 5 %."""
    options = KEEPS_A_QUARTER | HPZ
    config = replace(
        deep, root=str(tmp_path), name="hpz", engine=_engine(3, options), recompute=("language_model", "vision_tower")
    )
    ranks = start_ranks(4).run(plan_cases.step_collectives, config, NUM_MICRO_STEPS, timeout_s=300)
    listed = list(list_collectives(_facts(config).tensors, read_settings(config, 2), 2, NUM_MICRO_STEPS, half=False))
    planned = {each.kind: each for each in listed}
    for recorded in ranks:
        every: dict[tuple[str, ...], int] = {}
        for number, micro_step in enumerate(recorded.micro_steps):
            by_group = _summary(micro_step, gathers=True)
            assert len(by_group) == (2 if number == 0 else 1)
            for group, (_, elements) in by_group.items():
                every[group] = every.get(group, 0) + elements
        across = every.pop(next(group for group in every if group[1] == "default_pg"))
        (inside,) = every.values()
        assert across == pytest.approx(planned["weights"].num_bytes / 4, rel=0.001)
        assert inside == pytest.approx(planned["weights inside a node"].num_bytes / 4, rel=0.05)
        reduced = sum(_summary(each, gathers=False).popitem()[1][1] for each in recorded.micro_steps)
        update = _summary(recorded.update, gathers=True).popitem()[1][1]
        sent = 4 * ((across + reduced + update) * 3 / 4), 4 * (inside / 2)
        assert sent == pytest.approx(count_bytes(listed, 2, 2), rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_reductions_are_those_of_zero_1_and_2(
    start_ranks: StartRanks, deep: RunConfig, tmp_path: Path, stage: int
) -> None:
    """Recorded on two ranks: stage 2 all-reduces buckets in every micro-step, stage 1 in the update, which gathers each
    optimizer group."""
    config = replace(deep, root=str(tmp_path), name=f"zero{stage}", engine=_engine(stage, {}))
    recorded = start_ranks(2).run(plan_cases.step_collectives, config, NUM_MICRO_STEPS, timeout_s=240)[0]
    facts = _facts(config)
    listed = list_collectives(facts.tensors, read_settings(config, 1), 2, NUM_MICRO_STEPS, half=False)
    planned = {each.kind: each for each in listed}
    reduced = [sum(_summary(each, gathers=False).values(), (0, 0)) for each in recorded.micro_steps]
    elements = sum(sum(each[1::2]) for each in reduced)
    if stage == 1:
        assert elements == 0
        ((_, elements),) = _summary(recorded.update, gathers=False).values()
    assert elements == pytest.approx(planned["gradients"].num_bytes / 2 / 4, rel=0.01)
    ((count, elements),) = _summary(recorded.update, gathers=True).values()
    assert count == planned["updated weights"].count
    assert elements == pytest.approx(planned["updated weights"].num_bytes / 4, rel=0.01)
