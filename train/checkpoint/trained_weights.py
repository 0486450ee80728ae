"""Reads the trained parameters from a checkpoint of any ZeRO stage and number of ranks, in one process.

DeepSpeed's files are memory-mapped, so that only one tensor is in memory at a time. Frozen parameters are not in a
checkpoint; they come from `stage.init_from` and the model's folders.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, get_optim_files

from llava_next.config import ModelError
from llava_next.formats.tensors import LazyTensor, from_tensor
from llava_next.model.llava_next import LlavaNext
from train.checkpoint import saver as checkpoint
from train.distributed.quiet_libraries import muted_stdout


def trained_weights(model: LlavaNext, path: Path, *, masters: bool = False) -> dict[str, LazyTensor]:
    """Returns the trained parameters by their live names, to be read on the host.

    Args:
        model: the model of the run, by whose trained parameters the names are checked; it is not changed.
        path: of the checkpoint.
        masters: read the optimizer's fp32 copies instead of the weights, which may be bf16. ZeRO 3 has only the former.

    Raises:
        SaveFormatError: a file could run code when it is unpickled.
        ModelError: the parameters do not match the model.
        OSError, RuntimeError, KeyError, ValueError: a file is damaged or missing.
    """
    weights = _read(path, masters)
    if model.hf.lm_head.weight is model.hf.get_input_embeddings().weight:
        weights.pop("hf.lm_head.weight", None)  # tied to the input embedding
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(expected ^ set(weights))
    if different:
        raise ModelError(
            f"{path} does not match the model of its config.yaml: {len(different)} tensors are in only one of the "
            f"two, for example {different[0]}"
        )
    return weights


def _read(path: Path, masters: bool) -> dict[str, LazyTensor]:
    checkpoint.refuse_unsafe_pickles(path)
    stage, folder = checkpoint.read_state(path).layout["zero_stage"], path / checkpoint.ENGINE
    if stage == 3:
        with muted_stdout():
            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(path), tag=checkpoint.ENGINE, exclude_frozen_parameters=True, lazy_mode=True
            )
        return {name: _gather_lazily(name, tensor) for name, tensor in weights.items()}
    state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True, mmap=True)
    if masters and stage:
        return {tensor.name: tensor for tensor in _read_masters(folder, state["param_shapes"])}
    return {name: from_tensor(name, tensor) for name, tensor in state["module"].items()}


def _gather_lazily(name: str, tensor: Any) -> LazyTensor:
    """Wraps a tensor of ZeRO 3, which joins its partitions in `contiguous`."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, tensor.contiguous)


def _read_masters(folder: Path, groups: Sequence[Mapping[str, torch.Size]]) -> Iterator[LazyTensor]:
    """Yields the fp32 copies of ZeRO 1 and 2, where each group is one flat vector and every rank has a partition of it.

    DeepSpeed's own reader would join these vectors in memory.
    """
    states = [
        torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        for file in get_optim_files(str(folder))
    ]
    paddings = states[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        partitions = [state["single_partition_of_fp32_groups"][number] for state in states]
        start = 0
        for position, (name, shape) in enumerate(shapes.items()):
            yield LazyTensor(name, tuple(shape), torch.float32, _FlatSlice(partitions, start, shape))
            start += shape.numel() + (paddings[number][position] if paddings else 0)


@dataclass(frozen=True)
class _FlatSlice:
    """Reads one parameter from the ranks' partitions of a flat vector."""

    partitions: Sequence[torch.Tensor]
    start: int
    shape: torch.Size

    def __call__(self) -> torch.Tensor:
        pieces, first = [], 0
        start, stop = self.start, self.start + self.shape.numel()
        for partition in self.partitions:
            last = first + len(partition)
            if start < last and first < stop:
                pieces.append(partition[max(start, first) - first : min(stop, last) - first])
            first = last
        return torch.cat(pieces).view(self.shape)
