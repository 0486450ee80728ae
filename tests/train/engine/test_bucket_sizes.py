"""Bucket sizes that the user has not set."""

import subprocess
import sys

import pytest

from train.engine.bucket_sizes import MAX_ELEMENTS, MIN_ELEMENTS, bucket_elements, with_bucket_sizes

SIZE = {"num_parameters": 7_000_000_000, "num_trained": 6_000_000_000}


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [(1, MIN_ELEMENTS), (32, MIN_ELEMENTS), (100, MIN_ELEMENTS), (256, 128_000_000), (1024, MAX_ELEMENTS)],
)
def test_a_bucket_grows_with_the_number_of_ranks(num_ranks: int, expected: int) -> None:
    """Latency grows with the ranks, whatever a bucket holds."""
    assert bucket_elements(num_ranks, 7_000_000_000) == expected


def test_a_bucket_is_not_larger_than_the_model() -> None:
    """DeepSpeed allocates it whole: an align run trains 20 million parameters, a tiny model a few thousand."""
    sizes = with_bucket_sizes({"stage": 3}, num_ranks=1024, num_parameters=7_000_000_000, num_trained=20_000_000)
    assert sizes["reduce_bucket_size"] == 20_000_000
    assert sizes["stage3_prefetch_bucket_size"] == MAX_ELEMENTS


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (0, set()),
        (1, {"reduce_bucket_size", "allgather_bucket_size"}),
        (2, {"reduce_bucket_size", "allgather_bucket_size"}),
        (3, {"reduce_bucket_size", "stage3_prefetch_bucket_size"}),
    ],
)
def test_only_keys_that_the_stage_reads_are_added(stage: int, keys: set[str]) -> None:
    """DeepSpeed ignores the others, and rules.py refuses them."""
    assert set(with_bucket_sizes({"stage": stage}, num_ranks=8, **SIZE)) == {"stage", *keys}


def test_a_size_of_the_configuration_is_kept() -> None:
    """The other keys are still derived."""
    zero = {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": None, "overlap_comm": True}
    result = with_bucket_sizes(zero, num_ranks=1024, **SIZE)
    assert result == {**zero, "allgather_bucket_size": MAX_ELEMENTS}


def test_the_planner_can_import_it_without_deepspeed() -> None:
    """Importing DeepSpeed takes seconds."""
    code = "import train.engine.bucket_sizes, sys; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
