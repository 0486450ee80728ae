"""Merges adapters (LoRA) into the weights that they adapt, one tensor at a time."""

from collections.abc import Iterable
from typing import Any

import torch

from llava_next.formats.tensors import LazyTensor
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import ADAPTER_NAME
from llava_next.model.parts import BASE, is_adapter


def merge_adapters(model: LlavaNext, tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """The tensors of the model without adapters: W + (alpha / rank) B A in place of W, in W's dtype.

    The result is computed when it is read, one layer at a time. Reading is collective if reading `tensors` is.

    Args:
        model: gives the adapted layers and their scales.
        tensors: all parameters of the model, by parameter name.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    merged = []
    for name, tensor in by_name.items():
        if is_adapter(name):
            continue
        layer, base, suffix = name.partition(BASE)
        if base:
            if suffix == "weight":
                down, up = (by_name[f"{layer}.lora_{matrix}.{ADAPTER_NAME}.weight"] for matrix in ("A", "B"))
                tensor = _merged_weight(tensor, down, up, _scale(model.get_submodule(layer)))
            tensor = tensor.renamed(f"{layer}.{suffix}")
        merged.append(tensor)
    return merged


def _scale(layer: Any) -> float:
    return float(layer.scaling[ADAPTER_NAME])


def _merged_weight(weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float) -> LazyTensor:
    def read() -> torch.Tensor | None:
        w, a, b = weight.read(), down.read(), up.read()  # each call can be collective
        if w is None or a is None or b is None:
            return None
        return torch.addmm(w.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)

    return LazyTensor(weight.name, weight.shape, weight.dtype, read)
