"""DeepSpeed's engine from its own dictionary, and what only the engine can say about parameters.

Adds what is derived (batch sizes, precision, clipping) to `engine:` of the configuration; the keys that the run owns
were refused when it was read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from llava_next.model.llava_next import LlavaNext
from train.config.schema import ConfigError, RunConfig
from train.distributed.quiet_libraries import muted_stdout
from train.distributed.world import World
from train.engine.optimizer import parameter_groups
from train.engine.replica_checksums import check_replicas, compare_sums, tensor_sums
from train.engine.sharded_model import fill_in, send_buffers


def engine_dictionary(config: RunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration of this run, under DeepSpeed's own names.

    Gradients are accumulated and summed over ranks in fp32 whatever the weights are. One row is one micro-batch, and
    every `step()` is the boundary, because steps differ in their number of micro-steps.
    """
    engine, communication = dict(config.engine), "fp32"
    if world.size == 1 and zero_stage(config) in (1, 2):
        # One rank has nobody to talk to: no second stream, for which DeepSpeed stops the device at every bucket; no
        # slices, which are copied to and fro; no message in another precision, for which they are copied once more.
        engine["zero_optimization"] = {**engine["zero_optimization"], "overlap_comm": False, "reduce_scatter": False}
        communication = "bf16" if world.dtype == torch.bfloat16 else "fp32"
    return {
        **engine,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO the guard of the step clips, where it also finds out whether a gradient is finite.
        "gradient_clipping": 0.0 if zero_stage(config) == 0 else config.stage.clip_norm or 0.0,
        "bf16": {"enabled": world.dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": communication,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def start_engine(model: LlavaNext, config: RunConfig, world: World) -> deepspeed.DeepSpeedEngine:
    """Gives every rank its share of the model that rank 0 holds (`train/engine/sharded_model.py`), builds AdamW over
    the trained parts
    and wraps both in DeepSpeed.

    Raises:
        ConfigError: ZeRO 0 in bf16.
    """
    if zero_stage(config) == 0 and world.dtype == torch.bfloat16:
        raise ConfigError(
            "engine=zero0 keeps no fp32 weights and gradients beside bf16 ones, so small updates would be lost; choose "
            "engine=zero1 (the same on one rank), or precision=fp32"
        )
    deepspeed_logger.setLevel("WARNING")
    dictionary = engine_dictionary(config, world)
    send_buffers(model, world)
    if zero_stage(config) == 3:
        _divide(model, dictionary, world)
    else:
        seen: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            fill_in(module, world.device, seen)
        model.to(world.device)  # DeepSpeed sends rank 0's parameters to the others
    optimizer = torch.optim.AdamW(parameter_groups(model, config.stage), betas=(0.9, 0.999), eps=1e-8, fused=True)
    if zero_stage(config) == 3:
        # Read by LlavaNext.forward outside of the modules that own them, so ZeRO-3 must gather them for it.
        for parameter in (model.hf.lm_head.weight, model.hf.model.image_newline):
            deepspeed.zero.register_external_parameter(model, parameter)
    with muted_stdout():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=dictionary,
            dist_init_required=False,
        )
    _add_gradients_in_one_pass(engine.optimizer)
    check_replicas(model, world)
    return engine


def _add_gradients_in_one_pass(optimizer: Any) -> None:
    """Stages 1 and 2 make an fp32 copy of each bf16 gradient before they add it up; the addition itself can convert,
    to the same bits."""

    def add(output: torch.Tensor | None, source: torch.Tensor) -> None:
        if output is not None:
            output.add_(source)

    if hasattr(optimizer, "_add_to_grad_partition_buffer"):
        optimizer._add_to_grad_partition_buffer = add


def _divide(model: LlavaNext, dictionary: dict[str, Any], world: World) -> None:
    """ZeRO-3: each parameter in its turn goes from rank 0 to all devices and is cut there into the ranks' shares. Never
    is more than one module's whole on a device, nor a second copy of the model on a host.

    Raises:
        ReplicaError: the shares, gathered again, are not what rank 0 held.
    """
    seen: dict[nn.Parameter, nn.Parameter] = {}
    divided: Any = None  # a parameter that DeepSpeed has given its own methods
    names: list[str] = []
    sources, sums = [], []
    for prefix, module in model.named_modules():
        fill_in(module, torch.device("cpu"), seen)
        own = [(name, each) for name, each in module.named_parameters(recurse=False) if not hasattr(each, "ds_id")]
        if not own:
            continue
        whole = [parameter for _, parameter in own]
        names += [f"{prefix}.{name}" for name, _ in own]
        sources.append(tensor_sums(parameter.to(world.device) for parameter in whole) if world.is_main else None)
        if divided is None:
            with muted_stdout():
                deepspeed.zero.Init(module=nn.ParameterList(whole), config_dict_or_path=dictionary, dtype=world.dtype)
            divided = whole[0]
        else:
            divided.convert_to_zero_parameters(param_list=whole)
        with gathered(whole):
            sums.append(tensor_sums(whole))
    source = torch.cat([each for each in sources if each is not None]) if world.is_main else None
    compare_sums(names, torch.cat(sums), world, source)


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that the configuration asks for."""
    return int(config.engine.get("zero_optimization", {}).get("stage", 0))


def release_gathered(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-3: frees every parameter that is gathered or in flight. Every rank must call it; elsewhere it does nothing.

    Between steps all parameters must be divided. A forward pass without a backward pass ends with parameters in flight,
    prefetched for the backward pass, and DeepSpeed's loading of a checkpoint ends with small ones whole: `gathered`
    would read what has not arrived, and the next step's order of modules would not be the recorded one.
    """
    engine.empty_partition_cache()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters are whole on every rank, whatever the ZeRO stage."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    with deepspeed.zero.GatheredParameters(partitioned):
        yield
