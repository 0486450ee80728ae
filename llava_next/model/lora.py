"""Adds LoRA adapters to the blocks of a part with peft.

peft replaces the linear layers in place, so the forward pass and all other module names are unchanged.
`merge_adapters.py` merges the adapters when a model is written.
"""

from collections.abc import Mapping

import torch
from torch import nn

from llava_next.config import LoraConfig, ModelError, check_lora, check_peft
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import is_adapter

ADAPTER_NAME = "default"
"""peft's name of the only adapter of a layer."""


def add_adapters(model: LlavaNext, lora: Mapping[str, LoraConfig] | None, *, seed: int) -> None:
    """Adds adapters to a model whose weights are loaded. A new adapter does not change the output.

    `set_trained_parts` must be called afterwards.

    Args:
        model: is modified.
        lora: settings by part; None or empty adds none.
        seed: of the adapters' initial weights, which depend on it only. Adapters of layers on the meta device stay
            there.

    Raises:
        ModelError: `check_lora` fails, a part has no layer of the name of a target, or peft is not installed.
    """
    if not lora:
        return
    check_lora(lora)
    check_peft()
    import peft

    for part, adapters in lora.items():
        blocks = model.get_submodule(model.blocks[part])
        _check_targets(blocks, part, adapters)
        config = peft.LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=list(adapters.targets))
        on_meta = any(parameter.is_meta for parameter in blocks.parameters())
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, blocks, low_cpu_mem_usage=on_meta)
        finally:
            torch.random.set_rng_state(generator_state)
        dtype = next(blocks.parameters()).dtype
        for name, parameter in blocks.named_parameters():
            if is_adapter("." + name):  # peft creates them in fp32, but DeepSpeed requires one dtype
                parameter.data = parameter.data.to(dtype)


def _check_targets(blocks: nn.Module, part: str, adapters: LoraConfig) -> None:
    linear = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for target in adapters.targets:
        if not any(name.endswith("." + target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(
                f"lora.{part}.targets: the blocks of this {part} have no linear layer {target}; choose from {known}"
            )
