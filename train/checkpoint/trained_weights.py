"""The trained parameters in a checkpoint of any ZeRO stage and number of ranks, read one at a time on one process.

Owns where they lie in DeepSpeed's files; these are mapped, so that no more than one tensor is in memory. Frozen
parameters are not in a checkpoint: they come from `stage.init_from` and the model's folders.
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


def trained_weights(model: LlavaNext, place: Path, *, masters: bool = False) -> dict[str, LazyTensor]:
    """The trained parameters by their live names, on the host.

    Args:
        model: whose trained parameters they are to be; it is left as it is.
        place: the checkpoint.
        masters: the optimizer's fp32 copies instead of the weights themselves, which may be bf16. ZeRO 3 has no others.

    Raises:
        SaveFormatError: a file would run code when it is unpickled.
        ModelError: they are another model's.
        OSError, RuntimeError, KeyError, ValueError: a file is damaged or missing.
    """
    found = _read(place, masters)
    if model.hf.lm_head.weight is model.hf.get_input_embeddings().weight:
        found.pop("hf.lm_head.weight", None)  # the embedding by its second name
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(expected ^ set(found))
    if different:
        raise ModelError(
            f"{place} is of another model than config.yaml beside it describes: {len(different)} tensors are not in "
            f"both, among them {different[0]}"
        )
    return found


def _read(place: Path, masters: bool) -> dict[str, LazyTensor]:
    checkpoint.refuse_unsafe_pickles(place)
    stage, folder = checkpoint.read_state(place).layout["zero_stage"], place / checkpoint.ENGINE
    if stage == 3:
        with muted_stdout():
            found = get_fp32_state_dict_from_zero_checkpoint(
                str(place), tag=checkpoint.ENGINE, exclude_frozen_parameters=True, lazy_mode=True
            )
        return {name: _joined(name, tensor) for name, tensor in found.items()}
    state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True, mmap=True)
    if masters and stage:
        return {tensor.name: tensor for tensor in _masters(folder, state["param_shapes"])}
    return {name: from_tensor(name, tensor) for name, tensor in state["module"].items()}


def _joined(name: str, tensor: Any) -> LazyTensor:
    """Of ZeRO 3: `tensor` puts its pieces together when it is asked to."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, tensor.contiguous)


def _masters(folder: Path, groups: Sequence[Mapping[str, torch.Size]]) -> Iterator[LazyTensor]:
    """Of ZeRO 1 and 2: each group of parameters is one vector, of which every rank holds a stretch.

    DeepSpeed's own reader joins these vectors in memory.
    """
    states = [
        torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        for file in get_optim_files(str(folder))
    ]
    paddings = states[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        stretches = [state["single_partition_of_fp32_groups"][number] for state in states]
        start = 0
        for position, (name, shape) in enumerate(shapes.items()):
            yield LazyTensor(name, tuple(shape), torch.float32, _Stretch(stretches, start, shape))
            start += shape.numel() + (paddings[number][position] if paddings else 0)


@dataclass(frozen=True)
class _Stretch:
    """Cuts one parameter out of the ranks' stretches of a vector."""

    stretches: Sequence[torch.Tensor]
    start: int
    shape: torch.Size

    def __call__(self) -> torch.Tensor:
        pieces, first = [], 0
        start, stop = self.start, self.start + self.shape.numel()
        for stretch in self.stretches:
            last = first + len(stretch)
            if start < last and first < stop:
                pieces.append(stretch[max(start, first) - first : min(stop, last) - first])
            first = last
        return torch.cat(pieces).view(self.shape)
