"""The model of a run on its ranks: rank 0 builds it and reads its weights, the others get theirs from there.

So a host holds one copy of the model while it starts, whatever the number of its ranks. Owns who holds which weights
before there is an engine; DeepSpeed sends them around (`train/engine/deepspeed_engine.py`).
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llava_next.config import PARTS, ModelError
from llava_next.formats.load import load_weights
from llava_next.kernels.attention import check_kernel
from llava_next.kernels.cpu.elementwise import takes_fused
from llava_next.kernels.cpu.onednn import takes_onednn
from llava_next.model.build import Backbone, build_model, skeleton
from llava_next.model.language_models import check_positions
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.speedups import compile_blocks, use_fused, use_liger, use_onednn
from train.config.schema import RunConfig
from train.distributed.world import World, all_gather_objects


def build(backbone: Backbone, config: RunConfig, world: World, *, num_sources: int) -> tuple[LlavaNext, str]:
    """The model that the stage starts from, and where its weights are from. Every rank must call it.

    On rank 0 it has its weights, on the host. On the others its parameters and buffers are on the meta device: names
    and shapes alone, until `fill_in`.

    Raises:
        ModelError: on every rank, what rank 0 could not build or read.
    """
    failed: ModelError | None = None
    model: LlavaNext | None = None
    origin = ""
    try:
        model, origin = _read(backbone, config, world, num_sources=num_sources)
    except ModelError as error:
        failed = error
    said = all_gather_objects(world, str(failed) if failed else None)
    if model is None or any(said):
        raise failed or ModelError(next(text for text in said if text))
    set_trained_parts(model, config.stage.rates)
    set_recompute(model, config.recompute)
    set_kernels(model, config, world)
    return model, origin


def _read(backbone: Backbone, config: RunConfig, world: World, *, num_sources: int) -> tuple[LlavaNext, str]:
    if world.is_main:
        check_positions(skeleton(backbone).model.language_model, config.stage.max_length)
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
    """The kernels that the configuration asks for, in the order in which one goes around another.

    Raises:
        ModelError: one that is not here, or not for this device and precision.
    """
    check_kernel(config.attention, world.device, world.dtype)
    if takes_onednn(config.linear, world.device, world.dtype):
        use_onednn(model, config.compile)
    if takes_fused(config.elementwise, world.device, world.dtype):
        use_fused(model, config.compile)
    if config.liger:
        use_liger(model)
    compile_blocks(model, config.compile, deterministic=config.deterministic)


def fill_in(module: nn.Module, device: torch.device, seen: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives a module's own parameters that are on the meta device memory on another, with nothing in it.

    Args:
        module: without its children.
        device: where the memory is taken.
        seen: by a former parameter (held, so that no other gets its id) what has taken its place: shared ones stay
            shared.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            if parameter not in seen:
                empty = torch.empty_like(parameter, device=device)
                seen[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, seen[parameter])


def send_buffers(model: nn.Module, world: World) -> None:
    """Gives every rank rank 0's buffers, on its device: tables that follow from the configuration, a few kilobytes."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            on_host = torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
            if world.size > 1:
                dist.broadcast(on_host, 0, group=world.host_group)
            setattr(module, name, on_host.to(world.device))
