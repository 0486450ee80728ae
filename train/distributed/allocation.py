"""The GPUs that Slurm has allocated, read from its variables and compared with the number of ranks.

`sbatch` inside a job or a shell of salloc passes the variables of that job on, which can start too few ranks.
"""

import os
from collections.abc import Mapping

from train.config.schema import ConfigError


def count_gpus_on_node(env: Mapping[str, str] | None = None) -> int:
    """The GPUs that this Slurm job, or this step of srun, has on this host; 0 outside of Slurm and without GPUs."""
    return _read_count(os.environ if env is None else env, "SLURM_GPUS_ON_NODE")


def check_idle_gpus(num_ranks: int, device_type: str, *, allowed: bool, env: Mapping[str, str] | None = None) -> None:
    """Refuses a run on GPUs with fewer ranks than its Slurm job has GPUs.

    Args:
        num_ranks: of the run.
        device_type: "cuda" or "cpu"; a run on CPUs is not checked.
        allowed: whether GPUs may be idle (`allow_idle_gpus`).
        env: the environment variables (default: those of this process).

    Raises:
        ConfigError: with the number of nodes, GPUs and ranks.
    """
    env = os.environ if env is None else env
    num_nodes, num_gpus = max(1, _read_count(env, "SLURM_JOB_NUM_NODES")), count_gpus_on_node(env)
    if allowed or device_type != "cuda" or num_ranks >= num_nodes * num_gpus:
        return
    raise ConfigError(
        f"{num_ranks} rank(s) were started, and the Slurm job has {num_nodes} node(s) with {num_gpus} GPU(s) each; "
        f"start one rank per GPU (srun --nodes={num_nodes} --ntasks-per-node={num_gpus}, or scripts/slurm/train.sbatch "
        "without --ntasks-per-node), request fewer GPUs, or leave GPUs idle with allow_idle_gpus=true"
    )


def _read_count(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "").strip()
    return int(value) if value.isascii() and value.isdecimal() else 0
