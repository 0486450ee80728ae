"""Faster kernels for the parts of a model: torch.compile, and liger-kernel's fused kernels on a GPU.

Both are off unless the configuration requests them. They change how blocks run and, beyond rounding, nothing that is
learned. Attention inside a row is in `llava_next/kernels/attention.py`.
"""

import importlib.util
from collections.abc import Collection

from llava_next.config import ModelError
from llava_next.model.llava_next import LlavaNext


def compile_blocks(model: LlavaNext, parts: Collection[str], *, deterministic: bool = False) -> None:
    """Compiles each block of these parts with torch.compile, which fuses norms, activations and residuals.

    The first steps wait for the compiler, once for static and once for dynamic lengths; rows of any length then run the
    same code. Call it after `use_liger` and `set_recompute`, and before the engine is built.

    Args:
        parts: names of parts that are stacks of blocks.
        deterministic: select no kernel by timing, so that every start runs the same kernels.

    Raises:
        ModelError: a part is not a stack of blocks.
    """
    if not parts:
        return
    import torch._dynamo.config
    import torch._inductor.config

    # By default a full cache falls back to eager code without an error. A stack has two kinds of blocks (the last one
    # differs, supervised_last_block.py); lengths are static, then dynamic, then 0 or 1; gradients are on or off.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.deterministic = deterministic
    for part in parts:
        if part not in model.blocks:
            raise ModelError(f"compile: {part!r} is not a stack of blocks; choose among {', '.join(model.blocks)}")
        for block in model.get_submodule(model.blocks[part]).children():
            # The block's own forward, so that hooks and recompute stay outside of the compiled code.
            block.forward = torch.compile(block.forward)


def use_liger(model: LlavaNext) -> None:
    """Runs the language model's norms, rotary embedding and gated MLP with liger-kernel. Requires a GPU.

    The package replaces the architecture's rotary embedding for the whole process.

    Raises:
        ModelError: the package is not installed, or does not support the architecture.
    """
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        raise ModelError(
            "liger=true: the package liger-kernel (with triton) is not installed; run `pip install liger-kernel`, or "
            "set liger=false"
        )
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    language_model = model.hf.model.language_model
    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"liger=true: liger-kernel has no kernels for {model_type}; set liger=false")
    # Not the loss: loss.py computes it at supervised positions only.
    _apply_liger_kernel_to_instance(model=language_model, fused_linear_cross_entropy=False, cross_entropy=False)
