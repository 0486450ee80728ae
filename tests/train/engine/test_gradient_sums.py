"""The gradient of a step is a sum over ranks, exact for any number of them; in bf16 it has a known error."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.train import communication_cases
from tests.train.cases import Array, relative_difference, zero, zero_3_in_nodes
from tests.train.conftest import StartRanks
from train.config.schema import RunConfig

_ALONE: dict[int, dict[str, Array]] = {}


def _gradients(start_ranks: StartRanks, config: RunConfig, size: int, *args: Any) -> dict[str, Array]:
    result: dict[str, Array] = start_ranks(size).run(communication_cases.gradients, config, *args)[0]
    return result


def _with_option(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {**zero(stage)["zero_optimization"], **options}}


@pytest.mark.parametrize(
    ("size", "engine"),
    [
        (3, zero(3)),
        *(
            pytest.param(size, engine, marks=pytest.mark.full)
            for size in (2, 3, 4)
            for engine in (
                *(zero(stage) for stage in (2, 3)),  # 0 and 1 reduce inside the step: tests/train/test_trainer.py
                _with_option(2, use_multi_rank_bucket_allreduce=False),
                _with_option(2, reduce_scatter=False),
                _with_option(3, reduce_scatter=False),
            )
            if (size, engine) != (3, zero(3))
        ),
    ],
    ids=str,
)
def test_the_sum_is_exact_on_any_number_of_ranks(
    start_ranks: StartRanks, run_config: RunConfig, size: int, engine: dict[str, Any]
) -> None:
    """In bf16, R ranks with one row each have bit for bit the gradient of one rank with that row R times.

    The sums are multiples of bf16 values, which fp32 holds exactly. An average over three ranks would not be.
    """
    config = replace(run_config, precision="bf16")
    if size not in _ALONE:
        _ALONE[size] = _gradients(start_ranks, replace(config, engine=zero(2), name="alone"), 1, "equal", size)
    actual = _gradients(start_ranks, replace(config, engine=engine), size, "equal", 1)
    for name, expected in _ALONE[size].items():
        assert np.abs(expected).max() > 0, name
        np.testing.assert_array_equal(actual[name], expected, err_msg=name)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 3))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_reduced_in_the_given_type(
    start_ranks: StartRanks, run_config: RunConfig, stage: int, precision: str
) -> None:
    """At every stage: in bf16 if `communication_data_type` says so, else in fp32, whatever the precision."""
    if (stage, precision) == (0, "bf16"):
        return  # refused
    config = replace(run_config, precision=precision)  # type: ignore[arg-type]
    for kind, is_reduced_in_bf16 in (("fp32", False), ("bf16", True)):
        engine = {**zero(stage), "communication_data_type": kind}
        dtypes = start_ranks(2).run(communication_cases.reduction_dtypes, replace(config, engine=engine))[0]
        assert ("BFloat16" in dtypes) == is_reduced_in_bf16


@pytest.mark.parametrize(
    ("size", "engine"),
    [
        (3, zero(3)),
        *(
            pytest.param(size, engine, marks=pytest.mark.full)
            for size, engine in ((4, zero(3)), (4, zero_3_in_nodes()))
        ),
    ],
    ids=str,
)
def test_error_of_a_reduction_in_bf16(
    start_ranks: StartRanks, run_config: RunConfig, size: int, engine: dict[str, Any]
) -> None:
    """Ranks have different rows: the whole gradient differs from that reduced in fp32 by 1e-3 to 5e-3, relative."""
    reduced = {
        kind: _gradients(
            start_ranks,
            replace(run_config, engine={**engine, "communication_data_type": kind}, name=kind),
            size,
            "different",
            1,
        )
        for kind in ("fp32", "bf16")
    }
    error = relative_difference(reduced["bf16"], reduced["fp32"])
    print(f"error of a reduction in bf16: {error:.2e}")
    assert 1e-3 < error < 5e-3
