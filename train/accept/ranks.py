"""The ranks of the launcher that started the program, and what they tell each other.

A gloo group of the program's own, without CUDA: its processes only start other processes, wait and compare.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from train.config.schema import ConfigError
from train.distributed.world import Launch, free_port, read_launch, set_environment

_Value = TypeVar("_Value")


class PhaseError(RuntimeError):
    """A phase cannot be carried out; every rank raises it with the same sentence."""


@dataclass(frozen=True)
class Ranks:
    """This rank among the others.

    Attributes:
        hosts: host name of each rank.
        store: keys that all ranks can set and read at any time.
        address: of rank 0's host, as the other hosts reach it.
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

    def ranks_on_host(self, rank: int, num_ranks: int) -> int:
        """How many of the first `num_ranks` ranks run on the host of `rank`."""
        return self.hosts[:num_ranks].count(self.hosts[rank])

    def gather(self, value: _Value) -> list[_Value]:
        """The value of each rank, by rank. Every rank must call it."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], _Value]) -> _Value:
        """What rank 0 computes, on every rank. Every rank must call it.

        Raises:
            ConfigError: the action raised one on rank 0: a mistake of the user's.
            PhaseError: it raised another exception.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except ConfigError as error:
                answer[1] = error
            except Exception as error:
                answer[1] = PhaseError(f"{type(error).__name__}: {' '.join(str(error).split())}")
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        value: _Value = answer[0]
        return value


def join(patience_s: float) -> Ranks:
    """Meets the other ranks of the launcher.

    Args:
        patience_s: how long ranks wait for each other, also later on.
    """
    launch = read_launch()
    set_environment(launch)
    dist.init_process_group("gloo", rank=launch.rank, world_size=launch.size, timeout=timedelta(seconds=patience_s))
    store = PrefixStore("accept", distributed_c10d._get_default_store())
    hosts: list[Any] = [None] * launch.size
    dist.all_gather_object(hosts, socket.gethostname())
    address = [_own_address(os.environ["MASTER_ADDR"]) if len(set(hosts)) > 1 else "127.0.0.1"]
    dist.broadcast_object_list(address, src=0)
    return Ranks(launch, hosts, store, address[0])


def leave() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_port(ranks: Ranks) -> int:
    """A free port of rank 0's host, where the ranks of a child run meet. Every rank must call it."""
    return ranks.on_main(free_port)


def _own_address(master: str) -> str:
    """This host's address as the others reach it: on rank 0, the address that faces the launcher's meeting point.

    That point need not be on rank 0's host: torchrun's is where its first agent runs. A name that resolves to a
    loopback address here is this host's own name, which the other hosts resolve to its real address.
    """
    family, _, _, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing: it only chooses the route
        own = str(probe.getsockname()[0])
    is_loopback = own.startswith("127.") or own == "::1"
    return master if is_loopback or own == place[0] else own


def launcher_name(env: Mapping[str, str] = os.environ) -> str:
    """Which launcher started this process: torchrun, deepspeed, srun, or none."""
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "CROSS_RANK" in env:
        return "deepspeed"
    if "RANK" not in env and "SLURM_STEP_ID" in env:
        return "srun"
    return "none" if "RANK" not in env else "environment"
