"""A run on GPUs with fewer ranks than its Slurm job has GPUs is refused, unless a key allows it."""

import pytest

from train.config.schema import ConfigError
from train.distributed.allocation import check_idle_gpus, count_gpus_on_node
from train.distributed.world import use_expandable_segments

JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}


def test_idle_gpus_are_refused() -> None:
    """With the number of ranks, nodes and GPUs, and with the key."""
    with pytest.raises(ConfigError, match=r"^7 rank.*2 node.*4 GPU.*allow_idle_gpus=true"):
        check_idle_gpus(7, "cuda", allowed=False, env=JOB)


@pytest.mark.parametrize(
    ("num_ranks", "device_type", "allowed", "env"),
    [
        (8, "cuda", False, JOB),
        (9, "cuda", False, JOB),  # several ranks on one GPU are another check's
        (7, "cuda", True, JOB),
        (7, "cpu", False, JOB),
        (1, "cuda", False, {}),
        (1, "cuda", False, {"SLURM_JOB_NUM_NODES": "2"}),
        (1, "cuda", False, {"SLURM_GPUS_ON_NODE": "1"}),
    ],
    ids=["all", "more ranks", "allowed", "cpu", "no Slurm", "no GPUs", "a step's variables only"],
)
def test_other_runs_start(num_ranks: int, device_type: str, allowed: bool, env: dict[str, str]) -> None:
    """Outside of Slurm, and where no GPU is idle."""
    check_idle_gpus(num_ranks, device_type, allowed=allowed, env=env)


@pytest.mark.parametrize(("value", "expected"), [("4", 4), ("", 0), (" ", 0), ("(null)", 0), ("-1", 0), ("²", 0)])
def test_a_count_that_is_no_number_is_none(value: str, expected: int) -> None:
    """Slurm always sets a number; an empty or unusual value comes from another program."""
    assert count_gpus_on_node({"SLURM_GPUS_ON_NODE": value}) == expected


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_unless_the_user_has_set_the_allocator(name: str) -> None:
    """Either name of torch's variable is the user's; without one the segments are expandable."""
    env: dict[str, str] = {}
    use_expandable_segments(env)
    assert env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    env = {name: "max_split_size_mb:128"}
    use_expandable_segments(env)
    assert env == {name: "max_split_size_mb:128"}
