"""What a step communicates: recorded on four ranks and compared with the formula that the planner uses."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from tests.train import communication_cases
from tests.train.cases import Collective, aligning, zero, zero_3_in_nodes
from tests.train.communication_cases import Sizes
from tests.train.conftest import StartRanks
from train.config.schema import RunConfig
from train.engine.communication_volume import Counts, Volume, step_volume

BYTES = {"Float": 4, "BFloat16": 2}
FREES_AT_ONCE = {"stage3_max_live_parameters": 2_000, "stage3_max_reuse_distance": 0}
"""As for a model that is much larger than what DeepSpeed keeps."""
LEARNED = 3  # ZeRO-3 records its order in the first steps


def _volume(collectives: list[Collective], *, scatters: bool) -> Volume:
    """The bytes of what was recorded. gloo has no reduce-scatter: it records an all-reduce of the whole tensor.

    Messages of a few numbers (overflow, norms, the step's state) are left out.
    """
    volumes = {True: 0.0, False: 0.0}
    for each in collectives:
        data_type = each.dtypes[0]
        size = max(prod(shape) for shape in each.sizes)
        if data_type in BYTES and size > 8:
            kind = each.kind.removeprefix("gloo:")
            assert kind in ("all_gather", "all_reduce", "reduce"), kind
            factor = 2 if kind == "all_reduce" and not scatters else 1
            volumes[each.group == ("0", "1")] += factor * size * BYTES[data_type]
    return Volume(volumes[False], volumes[True])


def _run(start_ranks: StartRanks, config: RunConfig, micro_steps: int) -> Sizes:
    reports: list[Sizes] = start_ranks(4).run(communication_cases.communicated, config, micro_steps)
    assert all(report.steps == reports[0].steps for report in reports)
    return reports[0]


def _options(engine: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**engine, "zero_optimization": {**engine["zero_optimization"], **more}}


ENGINES: dict[str, dict[str, Any]] = {
    "zero1": zero(1),
    "zero1 reduced to owners": _options(zero(1), use_multi_rank_bucket_allreduce=False),
    "zero2": zero(2),
    "zero2 reduced to owners": _options(zero(2), use_multi_rank_bucket_allreduce=False),
    "zero2 in bf16": {**zero(2), "communication_data_type": "bf16"},
    "zero3": zero(3),
    "zero3, large model": _options(zero(3), **FREES_AT_ONCE),
    "zero3 in bf16": {**zero(3), "communication_data_type": "bf16"},
    "nodes": zero_3_in_nodes(),
    "nodes, large model": _options(zero_3_in_nodes(), **FREES_AT_ONCE),
}
QUICK = (("nodes, large model", 3), ("zero1", 3))
CASES = [(name, micro_steps) for name in ENGINES for micro_steps in (1, 3)]


@pytest.mark.parametrize(
    ("name", "micro_steps"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in CASES if case not in QUICK)],
)
def test_recorded_bytes_are_those_of_the_formula(
    start_ranks: StartRanks, run_config: RunConfig, name: str, micro_steps: int
) -> None:
    """Inside a node and over all ranks, within 5 %, with every part trained."""
    engine = ENGINES[name]
    sizes = _run(start_ranks, replace(run_config, engine=engine), micro_steps)
    _assert_as_computed(sizes, engine, micro_steps)


@pytest.mark.full
@pytest.mark.parametrize("name", ["zero3, large model", "nodes, large model", "nodes"])
def test_recorded_bytes_with_frozen_parts(start_ranks: StartRanks, run_config: RunConfig, name: str) -> None:
    """Where the connector alone is trained, a node's copy of the other weights is never gathered over all ranks."""
    engine = ENGINES[name]
    sizes = _run(start_ranks, aligning(replace(run_config, engine=engine)), 2)
    _assert_as_computed(sizes, engine, 2)
    if name != "zero3, large model":
        assert _volume(sizes.steps[LEARNED], scatters=True).all_ranks < 3 * 4 * (
            sizes.num_trained + sizes.num_persistent
        )


def test_zero_1_reduces_once_per_step(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Whatever the number of rows, where ZeRO-2 reduces in every micro-step."""
    volumes = {
        (stage, micro_steps): _volume(
            _run(start_ranks, replace(run_config, engine=zero(stage)), micro_steps).steps[LEARNED], scatters=False
        )
        for stage in (1, 2)
        for micro_steps in (1, 3)
    }
    assert volumes[1, 3] == volumes[1, 1]
    assert volumes[2, 3].all_ranks > 2 * volumes[2, 1].all_ranks


def _assert_as_computed(sizes: Sizes, engine: dict[str, Any], micro_steps: int) -> None:
    options = engine["zero_optimization"]
    counts = Counts(sizes.num_parameters, sizes.num_trained, sizes.num_backward, sizes.num_persistent)
    reduce_bytes = 2 if engine.get("communication_data_type") == "bf16" else 4
    expected = step_volume(options, counts, micro_steps=micro_steps, half=False, reduce_bytes=reduce_bytes)
    recorded = _volume(sizes.steps[LEARNED], scatters=options["stage"] == 3)
    assert recorded.all_ranks == pytest.approx(expected.all_ranks, rel=0.05)
    assert recorded.node == pytest.approx(expected.node, rel=0.05)
