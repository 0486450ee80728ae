"""The ranks of the acceptance test and their communication.

They use a gloo process group without CUDA, since they only start other processes, wait and compare results.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from train.config.schema import ConfigError
from train.distributed.launch import Launch, free_port, read_launch
from train.distributed.world import set_environment

_Value = TypeVar("_Value")


class PhaseError(RuntimeError):
    """A phase cannot be run; every rank raises the error with the same message."""


@dataclass(frozen=True)
class Ranks:
    """This rank and the others.

    Attributes:
        launch: rank, local rank and number of ranks.
        hosts: host name of each rank.
        store: key-value store of all ranks.
        address: address at which the other hosts reach rank 0's host.
    """

    launch: Launch
    hosts: list[str]
    store: Store
    address: str

    @property
    def size(self) -> int:
        return self.launch.size

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def is_main(self) -> bool:
        return self.launch.is_main

    @property
    def num_nodes(self) -> int:
        return len(set(self.hosts))

    def count_ranks_on_host(self, rank: int, num_ranks: int) -> int:
        """Returns how many of the first `num_ranks` ranks run on the host of `rank`."""
        return self.hosts[:num_ranks].count(self.hosts[rank])

    def gather(self, value: _Value) -> list[_Value]:
        """Returns the values of all ranks in their order. Every rank must call it."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], _Value]) -> _Value:
        """Runs the action on rank 0 and returns its value on every rank. Every rank must call it.

        Raises:
            ConfigError: the action raised it on rank 0.
            PhaseError: the action raised another exception.
        """
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = action()
            except ConfigError as error:
                result[1] = error
            except Exception as error:
                result[1] = PhaseError(f"{type(error).__name__}: {' '.join(str(error).split())}")
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        value: _Value = result[0]
        return value


def join_ranks(timeout_s: float) -> Ranks:
    """Creates the process group of the launcher's ranks.

    Args:
        timeout_s: timeout of all collectives of the group, in seconds.
    """
    launch = read_launch()
    set_environment(launch, torch.device("cpu"))
    dist.init_process_group("gloo", rank=launch.rank, world_size=launch.size, timeout=timedelta(seconds=timeout_s))
    store = PrefixStore("accept", distributed_c10d._get_default_store())
    hosts: list[Any] = [None] * launch.size
    dist.all_gather_object(hosts, socket.gethostname())
    address = [_find_address(os.environ["MASTER_ADDR"]) if len(set(hosts)) > 1 else "127.0.0.1"]
    dist.broadcast_object_list(address, src=0)
    return Ranks(launch, hosts, store, address[0])


def destroy_group() -> None:
    """Destroys the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def find_free_port(ranks: Ranks) -> int:
    """Returns a free port of rank 0's host for the rendezvous of a child run. Every rank must call it."""
    return ranks.on_main(free_port)


def _find_address(master: str) -> str:
    """Returns the address at which other hosts reach this host: that of the interface towards the launcher's
    rendezvous.

    The rendezvous is not necessarily on rank 0's host; torchrun's is on the host of its first agent. A name that
    resolves to a loopback address is the name of this host, which other hosts resolve to its real address.
    """
    family, _, _, _, endpoint = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(endpoint)  # sends nothing, but selects the route
        address = str(probe.getsockname()[0])
    is_loopback = address.startswith("127.") or address == "::1"
    return master if is_loopback or address == endpoint[0] else address


def read_launcher_name(env: Mapping[str, str] = os.environ) -> str:
    """Returns the launcher of this process: torchrun, deepspeed, srun, environment (its variables are set), or none."""
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "CROSS_RANK" in env:
        return "deepspeed"
    if "RANK" not in env and "SLURM_STEP_ID" in env:
        return "srun"
    return "none" if "RANK" not in env else "environment"
