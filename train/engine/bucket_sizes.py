"""Sizes of DeepSpeed's communication buckets, from the number of ranks and the model.

A collective over R ranks costs R hops of latency, whatever its size, so a bucket grows with the number of ranks. This
module imports neither torch nor DeepSpeed: the planner computes with the same sizes.
"""

from collections.abc import Mapping
from typing import Any

MIN_ELEMENTS = 50_000_000
"""Size of a bucket up to 100 ranks, in elements."""
MAX_ELEMENTS = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, in elements: 2 GB in fp32."""
ELEMENTS_PER_RANK = 500_000
"""Elements of a bucket per rank beyond `MIN_ELEMENTS`.

A hop takes about 2.5 microseconds (configs/hardware). In that time 25 GB/s, one network card, move 16,000 fp32
elements, and 200 GB/s, eight of them, 125,000. So latency is 3 to 25 % of a collective's time at any number of ranks up
to 1,000; with a fixed size of 50 million elements it would be up to 250 %."""

KEYS: dict[str, tuple[int, ...]] = {
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "stage3_prefetch_bucket_size": (3,),
}
"""Keys of DeepSpeed's `zero_optimization` that are derived, and the stages that read them."""


def bucket_elements(num_ranks: int, num_elements: int) -> int:
    """Returns the size of a bucket for `num_elements` elements over `num_ranks` ranks, in elements.

    It is never larger than what it is for: DeepSpeed allocates the whole bucket.
    """
    return max(1, min(num_elements, MAX_ELEMENTS, max(MIN_ELEMENTS, ELEMENTS_PER_RANK * num_ranks)))


def with_bucket_sizes(
    zero: Mapping[str, Any], *, num_ranks: int, num_parameters: int, num_trained: int
) -> dict[str, Any]:
    """Returns DeepSpeed's `zero_optimization` with the sizes that it does not have.

    Gradients and the updated weights exist for trained parameters only; ZeRO-3 prefetches frozen ones too.

    Args:
        zero: of the configuration; keys that have a value there are kept, null is replaced.
        num_ranks: of the run.
        num_parameters: elements of all parameters.
        num_trained: elements of the trained ones.
    """
    stage = int(zero.get("stage", 0))
    derived = {
        key: bucket_elements(num_ranks, num_parameters if key == "stage3_prefetch_bucket_size" else num_trained)
        for key, stages in KEYS.items()
        if stage in stages
    }
    return {**zero, **{key: zero[key] if zero.get(key) is not None else size for key, size in derived.items()}}
