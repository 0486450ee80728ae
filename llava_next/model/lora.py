"""Adapters (LoRA) in the blocks of a part, made by peft, and merged into the weights where a model is written.

Owns where they sit and what they become on disk. peft changes the linear layers in place, so the module tree, the
forward pass and every name outside of those layers stay. Which parameters then train is `set_trained_parts`'s.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llava_next.config import LoraConfig, ModelError, check_lora, check_peft
from llava_next.formats.names import BASE, is_adapter
from llava_next.formats.tensors import LazyTensor
from llava_next.model.llava_next import LlavaNext

_ADAPTER = "default"
"""peft's own name for the only adapter of a layer."""


def add_adapters(model: LlavaNext, lora: Mapping[str, LoraConfig] | None, *, seed: int) -> None:
    """Puts adapters into a model that has its weights; a fresh one adds nothing. Call `set_trained_parts` after it.

    Args:
        lora: by part; None or empty adds none.
        seed: of their first weights, which depend on it alone. Those of layers on the meta device are there, too.

    Raises:
        ModelError: a rule of `check_lora`; a target that the part has not, with those that it has; peft is missing.
    """
    if not lora:
        return
    check_lora(lora)
    check_peft()
    import peft

    for part, chosen in lora.items():
        blocks = model.get_submodule(model.blocks[part])
        _check_targets(blocks, part, chosen)
        wanted = peft.LoraConfig(r=chosen.rank, lora_alpha=chosen.alpha, target_modules=list(chosen.targets))
        on_meta = any(parameter.is_meta for parameter in blocks.parameters())
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(wanted, blocks, low_cpu_mem_usage=on_meta)
        finally:
            torch.random.set_rng_state(generator_state)
        dtype = next(blocks.parameters()).dtype
        for name, parameter in blocks.named_parameters():
            if is_adapter("." + name):  # peft makes them in fp32, an engine wants one type
                parameter.data = parameter.data.to(dtype)


def _check_targets(blocks: nn.Module, part: str, chosen: LoraConfig) -> None:
    linear = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for target in chosen.targets:
        if not any(name.endswith("." + target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(
                f"lora.{part}.targets: the blocks of this {part} have no linear layer {target}; they have {known}"
            )


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
                down, up = (by_name[f"{layer}.lora_{matrix}.{_ADAPTER}.weight"] for matrix in ("A", "B"))
                tensor = _sum(tensor, down, up, _scale(model.get_submodule(layer)))
            tensor = tensor.renamed(f"{layer}.{own}")
        found.append(tensor)
    return found


def _scale(layer: Any) -> float:
    return float(layer.scaling[_ADAPTER])


def _sum(weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float) -> LazyTensor:
    def read() -> torch.Tensor | None:
        whole, a, b = weight.read(), down.read(), up.read()  # each of them may be a collective
        if whole is None or a is None or b is None:
            return None
        return torch.addmm(whole.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)

    return LazyTensor(weight.name, weight.shape, weight.dtype, read)
