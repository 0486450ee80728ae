"""Adapters (LoRA) merged into the weights that they adapt, one tensor at a time."""

from collections.abc import Iterable
from typing import Any

import torch

from llava_next.formats.tensors import LazyTensor
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import ADAPTER_NAME
from llava_next.model.parts import BASE, is_adapter


def merged(model: LlavaNext, tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """The tensors of the model without adapters: W + B A alpha / rank in place of W, in W's type.

    Args:
        model: says where adapters sit and how they are scaled.
        tensors: of all of its parameters, by their live names. They are read when the result is, one layer at a time,
            on every rank in the same order.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    found = []
    for name, tensor in by_name.items():
        if is_adapter(name):
            continue
        layer, base, own = name.partition(BASE)
        if base:
            if own == "weight":
                down, up = (by_name[f"{layer}.lora_{matrix}.{ADAPTER_NAME}.weight"] for matrix in ("A", "B"))
                tensor = _sum(tensor, down, up, _scale(model.get_submodule(layer)))
            tensor = tensor.renamed(f"{layer}.{own}")
        found.append(tensor)
    return found


def _scale(layer: Any) -> float:
    return float(layer.scaling[ADAPTER_NAME])


def _sum(weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float) -> LazyTensor:
    def read() -> torch.Tensor | None:
        whole, a, b = weight.read(), down.read(), up.read()  # each of them may be a collective
        if whole is None or a is None or b is None:
            return None
        return torch.addmm(whole.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)

    return LazyTensor(weight.name, weight.shape, weight.dtype, read)
