"""Adapters (LoRA) in the blocks of a part, made by peft; `merge_adapters.py` merges them where a model is written.

peft changes the linear layers in place, so the module tree, the
forward pass and every name outside of those layers stay. Which parameters then train is `set_trained_parts`'s.
"""

from collections.abc import Mapping

import torch
from torch import nn

from llava_next.config import LoraConfig, ModelError, check_lora, check_peft
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import is_adapter

ADAPTER_NAME = "default"
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
