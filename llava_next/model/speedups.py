"""Faster kernels for the parts of a model: torch.compile, liger-kernel's fused ones, and on a CPU oneDNN's products and
this package's fused ones.

Owns how blocks are run, never what they compute: beyond rounding nothing learned depends on it. The first two are off
unless the configuration names them. Attention inside a row is attention.py's, a linear layer onednn.py's, a fused
kernel elementwise.py's.
"""

import importlib.util
from collections.abc import Collection

from torch import nn

from llava_next.config import ModelError
from llava_next.kernels.cpu.fusing import fuse
from llava_next.kernels.cpu.onednn import run_by_onednn
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import part_of


def compile_blocks(model: LlavaNext, parts: Collection[str], *, deterministic: bool = False) -> None:
    """Lets torch.compile translate the blocks of these parts, one by one: norms, activations and residuals are fused.

    The first steps wait for the compiler, once for fixed and once for changing lengths; rows of any length then run
    the same code. Call it after `use_liger` and `set_recompute`, and before there is an engine.

    Args:
        deterministic: choose no kernel by timing it, so that every start runs the same ones.

    Raises:
        ModelError: a part that is no stack of blocks.
    """
    if not parts:
        return
    import torch._dynamo.config
    import torch._inductor.config

    # A cache that is full falls back to running uncompiled, in silence, unless told otherwise. A stack has two kinds of
    # blocks (the last is another, last_block.py); lengths are fixed, then free, then 0 or 1; with gradients or without.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.deterministic = deterministic
    for part in parts:
        if part not in model.blocks:
            raise ModelError(f"compile: {part!r} is no stack of blocks; choose among {', '.join(model.blocks)}")
        for block in model.get_submodule(model.blocks[part]).children():
            # The block's own forward, so that what hooks and recompute do around it stays outside.
            block.forward = torch.compile(block.forward)


def use_liger(model: LlavaNext) -> None:
    """Runs the language model's norms, rotary embedding and gated MLP through liger-kernel. Needs a GPU.

    The rotary embedding of the architecture is replaced for the whole process: that is how the package does it.

    Raises:
        ModelError: the package is not installed, or does not know the architecture.
    """
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        raise ModelError(
            "liger=true: the package liger-kernel (with triton) is not installed here; `pip install liger-kernel`, or "
            "choose liger=false"
        )
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    language_model = model.hf.model.language_model
    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"liger=true: liger-kernel has no kernels for {model_type}; choose liger=false")
    # The loss is ours (loss.py), at supervised positions only.
    _apply_liger_kernel_to_instance(model=language_model, fused_linear_cross_entropy=False, cross_entropy=False)


def use_onednn(model: LlavaNext, compiled: Collection[str] = ()) -> None:
    """Runs the linear layers of an fp32 model on a CPU through oneDNN, adapters' too (onednn.py says where it pays).

    Args:
        compiled: parts that torch.compile translates, which has its own products.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear and part_of(f"{name}.weight") not in compiled:
            run_by_onednn(module)


def use_fused(model: LlavaNext, compiled: Collection[str] = ()) -> None:
    """Runs norms, gates and rotary embeddings of an fp32 model on a CPU in one pass each (elementwise.py).

    Args:
        compiled: parts that torch.compile translates, which fuses by itself.
    """
    stacks = {model.blocks[part] for part in compiled}
    for name, module in model.named_modules():
        if not any(name.startswith(stack + ".") for stack in stacks):
            fuse(module)
