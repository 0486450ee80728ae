"""Builds the model of a run: rank 0 reads its weights, and the other ranks have names and shapes only.

So a host holds one copy of the model at the start, whatever the number of its ranks. DeepSpeed distributes the weights
afterwards (`train/engine/deepspeed_engine.py`).
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llava_next.config import PARTS, ModelError
from llava_next.formats.load_weights import load_weights
from llava_next.kernels.attention import check_kernel
from llava_next.model.build import Backbone, build_meta_model, build_model
from llava_next.model.language_models import check_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.speedups import compile_blocks, use_liger
from train.config.schema import RunConfig
from train.distributed.world import World, all_gather_objects


def build(backbone: Backbone, config: RunConfig, world: World, *, num_sources: int) -> tuple[LlavaNext, str]:
    """The model that the stage starts from, and a sentence on where its weights are from. Every rank must call it.

    On rank 0 the weights are on the host. On the other ranks parameters and buffers are on the meta device until
    `materialize`.

    Raises:
        ModelError: on every rank, if rank 0 could not build the model or read its weights.
    """
    error: ModelError | None = None
    model: LlavaNext | None = None
    origin = ""
    try:
        model, origin = _read(backbone, config, world, num_sources=num_sources)
    except ModelError as raised:
        error = raised
    messages = all_gather_objects(world, str(error) if error else None)
    if model is None or any(messages):
        raise error or ModelError(next(message for message in messages if message))
    set_trained_parts(model, config.stage.rates)
    set_recompute(model, config.recompute)
    set_kernels(model, config, world)
    return model, origin


def _read(backbone: Backbone, config: RunConfig, world: World, *, num_sources: int) -> tuple[LlavaNext, str]:
    if world.is_main:
        check_positions(build_meta_model(backbone).model.language_model, config.stage.max_length)
    model = build_model(
        backbone,
        dtype=world.dtype,
        seed=config.seed,
        num_sources=num_sources,
        attention=config.attention,
        parts=PARTS if world.is_main else (),
    )
    origin = "started afresh"
    if config.stage.init_from is not None and world.is_main:
        origin = "starts with the " + load_weights(model, backbone, Path(config.stage.init_from))
    add_adapters(model, config.lora, seed=config.seed)
    return model, origin


def set_kernels(model: LlavaNext, config: RunConfig, world: World) -> None:
    """Applies the kernels of the configuration; torch.compile comes last, because it wraps the others.

    Raises:
        ModelError: a kernel's package is not installed, or it does not support the device or the precision.
    """
    check_kernel(config.attention, world.device, world.dtype)
    if config.liger:
        use_liger(model)
    compile_blocks(model, config.compile, deterministic=config.deterministic)


def materialize(module: nn.Module, device: torch.device, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    """Replaces a module's direct parameters on the meta device by uninitialised ones on `device`.

    Args:
        module: its children are left alone.
        device: of the new parameters.
        replaced: new parameters by old ones, updated; a shared parameter stays shared between modules.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device=device)
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[parameter])


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Replaces every rank's buffers by rank 0's, on the rank's device. They are small tables, a few kilobytes."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            on_host = torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
            if world.size > 1:
                dist.broadcast(on_host, 0, group=world.host_group)
            setattr(module, name, on_host.to(world.device))
