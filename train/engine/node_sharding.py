"""The number of ranks that ZeRO-3 shards weights over a second time, inside a node (DeepSpeed's hpZ).

Each node then has a whole copy of the weights, and only the first gather after an update crosses the network. This
module imports neither torch nor DeepSpeed.
"""

from collections.abc import Mapping
from typing import Any

from train.config.schema import ConfigError

KEY = "zero_hpz_partition_size"
"""Key of DeepSpeed's `zero_optimization`. null: the ranks of a node, as the launcher says."""


def ranks_per_copy(zero: Mapping[str, Any], *, num_ranks: int, ranks_per_node: int) -> int:
    """Returns the ranks that share one copy of the weights besides the partition over all ranks; 1 means no copy.

    One node needs no copy: there it would be the partition over all ranks once more.

    Args:
        zero: of the configuration.
        num_ranks: of the run.
        ranks_per_node: as the launcher says; 0 if it does not say it.

    Raises:
        ConfigError: the number is unknown, or does not divide the number of ranks.
    """
    size = zero.get(KEY, 1)
    if size is None:
        size = ranks_per_node or (1 if num_ranks == 1 else 0)
        if not size:
            raise ConfigError(
                f"engine.zero_optimization.{KEY} is null, which means the ranks of a node, and the launcher does not "
                f"say how many they are; start by torchrun, deepspeed, srun or mpirun, or set {KEY} to that number"
            )
    if num_ranks % size:
        raise ConfigError(
            f"engine.zero_optimization.{KEY}: {num_ranks} ranks are not a multiple of {size}, the ranks that share a "
            "copy of the weights; start as many ranks on every node, or set engine=zero3"
        )
    return 1 if size == num_ranks else int(size)
