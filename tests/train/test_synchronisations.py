"""A step reads values from the device a fixed number of times, however many rows it has.

On a GPU the host waits for all kernels at each read. `tests/llava_next/model/test_device_sync.py` covers the forward
pass with tensors that have no values; here DeepSpeed, the backward pass and the update are real.
"""

from dataclasses import replace

import pytest

from tests.train import synchronisation_cases
from tests.train.cases import zero
from tests.train.conftest import StartRanks
from train.config.schema import RunConfig

READERS = {
    *("step_errors.py:check_counts", "trainer.py:train_step", "step_guard.py:_before", "step_guard.py:step"),
    "utils.py:is_invalid_grad_norm",  # DeepSpeed's: the norm of each optimizer group
}
"""What reads, after the last row."""


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 2))])
def test_reads_do_not_depend_on_the_rows(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """The same step in rows of two budgets."""
    ranks = start_ranks(2)
    few, many = (
        ranks.run(
            synchronisation_cases.reads_of_a_step,
            replace(
                run_config,
                name=str(budget),
                engine=zero(stage),
                packing=replace(run_config.packing, max_tokens=budget),
            ),
        )[0]
        for budget in (2048, 512)
    )
    assert few[0] < many[0]
    assert few[1] == many[1]
    assert set(few[1]) <= READERS
