"""Compares ranks: weights and buffers by checksums, and the result of the start by its values.

Gradients are averaged over ranks, so a different value on one rank affects all of them, and no loss shows it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from train.distributed.world import World, all_gather_objects


class ReplicaError(RuntimeError):
    """Ranks differ where they must agree; the message names the ranks and the values."""


def tensor_sums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A checksum of each tensor: the sum of its values' bits as integers, int64 [n], on the host.

    It is computed on the tensor's device. One changed value always changes it; a permutation of values does not.
    """
    sums = [tensor_sum(tensor) for tensor in tensors]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def tensor_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum of one tensor, see `tensor_sums`: an int64 scalar on the tensor's device."""
    return _bits(tensor.detach()).sum(dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    return flat.view(types[tensor.element_size()])


def compare_sums(names: Sequence[str], sums: torch.Tensor, world: World, source: torch.Tensor | None = None) -> None:
    """Compares every rank's `tensor_sums` with rank 0's. Every rank must call it.

    Args:
        names: of the tensors.
        sums: checksums of this rank's tensors.
        source: the expected checksums, read on rank 0; rank 0's `sums` by default.

    Raises:
        ReplicaError: on every rank, with the ranks that differ and the first tensor.
    """
    gathered = all_gather_objects(world, (sums.tolist(), None if source is None else source.tolist()))
    expected = gathered[0][1] or gathered[0][0]
    differing = {
        rank: [name for name, actual, right in zip(names, of_rank, expected, strict=True) if actual != right]
        for rank, (of_rank, _) in enumerate(gathered)
    }
    wrong = {rank: tensors for rank, tensors in differing.items() if tensors}
    if wrong:
        first = next(iter(wrong.values()))
        raise ReplicaError(
            f"rank(s) {', '.join(map(str, wrong))} hold other values than rank 0 had: {first[0]} is the first of "
            f"{len(first)} tensor(s) of {len(names)}; start again, and if the same rank differs again exclude its node "
            "(its memory, GPU or network changes data), or rank 0's node if all others differ"
        )


def replicated_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All buffers, and all parameters that ZeRO-3 has not partitioned, by name."""
    parameters = [(name, each) for name, each in model.named_parameters() if not hasattr(each, "ds_id")]
    return dict([*parameters, *model.named_buffers()])


def check_replicas(model: nn.Module, world: World) -> None:
    """Compares all buffers, and all parameters that are not partitioned. Every rank must call it.

    Raises:
        ReplicaError: on every rank.
    """
    if world.size == 1:
        return
    tensors = replicated_tensors(model)
    compare_sums(list(tensors), tensor_sums(tensors.values()), world)


def outvoted_ranks(sums: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Finds the ranks whose checksums differ from those of most ranks.

    Args:
        sums: checksums of each rank, in the order of the same tensors.

    Returns:
        The ranks that hold another value than more than half of them do, each with the positions of these tensors; all
        ranks where no value is held by more than half of them.
    """
    outvoted: dict[int, list[int]] = {}
    for position, values in enumerate(zip(*sums, strict=True)):
        value, count = Counter(values).most_common(1)[0]
        has_majority = 2 * count > len(values)
        for rank, other in enumerate(values):
            if other != value or not has_majority:
                outvoted.setdefault(rank, []).append(position)
    return outvoted


def compare_starts(outcome: Mapping[str, object], world: World) -> None:
    """Compares the results of the start on all ranks. Every rank must call it.

    Args:
        outcome: values by their names in the message.

    Raises:
        ReplicaError: on every rank, with both values and the ranks.
    """
    gathered = all_gather_objects(world, {key: str(value) for key, value in outcome.items()})
    for key, right in gathered[0].items():
        ranks = [rank for rank, of_rank in enumerate(gathered) if of_rank[key] != right]
        if ranks:
            raise ReplicaError(
                f"{key}: rank(s) {', '.join(map(str, ranks))} have {gathered[ranks[0]][key]}, rank 0 has {right}; "
                "every rank reads the same folders, so one of them is not shared by all nodes or is updated late: "
                "start again, and if it recurs compare the folder on both nodes"
            )
