"""Creates DeepSpeed's engine from the configuration's `engine` dictionary, and gathers its parameters.

Batch sizes, precision and clipping are derived and added here; `train/config/rules.py` refuses them in the dictionary.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from llava_next.model.llava_next import LlavaNext
from train.config.schema import ConfigError, RunConfig
from train.distributed.quiet_libraries import muted_stdout
from train.distributed.world import World
from train.engine import node_sharding
from train.engine.bucket_sizes import with_bucket_sizes
from train.engine.gradient_sums import sum_gradients
from train.engine.node_sharding import ranks_per_copy
from train.engine.optimizer import adamw
from train.engine.replica_checksums import check_replicas, compare_sums, tensor_sums
from train.engine.sharded_model import broadcast_buffers, materialize

logger = logging.getLogger(__name__)

_ADD_GRADIENT = "_add_to_grad_partition_buffer"
"""Private method of DeepSpeed's optimizer for ZeRO 1 and 2: adds a gradient to the accumulated one."""


def engine_dictionary(config: RunConfig, world: World, *, num_parameters: int, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration of this run, with DeepSpeed's key names.

    Gradients are accumulated in fp32 and summed over ranks, in fp32 unless the configuration says otherwise. One row is
    one micro-batch, and every `step()` is an accumulation boundary, because steps differ in their number of
    micro-steps.

    Args:
        num_parameters: elements of all parameters.
        num_trained: elements of the trained ones.

    Raises:
        ConfigError: the ranks of a node are unknown, or do not divide the number of ranks.
    """
    stage, communication = zero_stage(config), config.engine.get("communication_data_type", "fp32")
    zero = with_bucket_sizes(
        config.engine.get("zero_optimization", {}),
        num_ranks=world.size,
        num_parameters=num_parameters,
        num_trained=num_trained,
    )
    if node_sharding.KEY in zero:
        zero[node_sharding.KEY] = ranks_per_copy(zero, num_ranks=world.size, ranks_per_node=world.ranks_per_node)
    if world.size == 1 and stage in (1, 2):
        # One rank communicates nothing. A second stream would synchronise the device at every bucket, reduce-scatter
        # would copy slices, and another communication type would copy them once more.
        zero |= {"overlap_comm": False, "reduce_scatter": False}
        communication = "bf16" if world.dtype == torch.bfloat16 else "fp32"
    return {
        "zero_optimization": zero,
        **({"gradient_allreduce_op": "sum"} if stage < 3 else {}),  # at stage 3: gradient_sums.py
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO, step_guard.py clips, where it also tests whether gradients are finite.
        "gradient_clipping": 0.0 if stage == 0 else config.stage.clip_norm or 0.0,
        "bf16": {"enabled": world.dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": communication,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def start_engine(model: LlavaNext, config: RunConfig, world: World) -> deepspeed.DeepSpeedEngine:
    """Distributes rank 0's model (`sharded_model.py`) to all ranks, builds AdamW over the trained parts, and wraps both
    in DeepSpeed's engine. Every rank must call it.

    Raises:
        ConfigError: ZeRO 0 in bf16; or as `engine_dictionary` and `sum_gradients`.
        ReplicaError: ranks differ after the distribution.
    """
    if zero_stage(config) == 0 and world.dtype == torch.bfloat16:
        raise ConfigError(
            "engine=zero0 keeps no fp32 copy of bf16 weights and gradients, so small updates would be lost; set "
            "engine=zero1 (equivalent on one rank), or precision=fp32"
        )
    deepspeed_logger.setLevel("WARNING")
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    dictionary = engine_dictionary(
        config,
        world,
        num_parameters=sum(size for size, _ in sizes),
        num_trained=sum(size for size, is_trained in sizes if is_trained),
    )
    broadcast_buffers(model, world)
    if zero_stage(config) == 3:
        _partition(model, dictionary, world)
    else:
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            materialize(module, world.device, replaced)
        model.to(world.device)  # DeepSpeed broadcasts rank 0's parameters
    optimizer = adamw(model, config.stage)
    if zero_stage(config) == 3:
        # LlavaNext.forward reads them outside of the modules that own them, so ZeRO-3 must gather them for it.
        for parameter in (model.hf.lm_head.weight, model.hf.model.image_newline):
            deepspeed.zero.register_external_parameter(model, parameter)
    with muted_stdout():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=dictionary,
            dist_init_required=False,
        )
    sum_gradients(engine)
    # BF16_Optimizer, which DeepSpeed uses at stage 1 in bf16, has another way of accumulating gradients.
    if zero_stage(config) in (1, 2) and not isinstance(engine.optimizer, BF16_Optimizer):
        add_gradients_without_copy(engine.optimizer)
    check_replicas(model, world)
    return engine


def add_gradients_without_copy(optimizer: Any) -> None:
    """Lets DeepSpeed's ZeRO 1 and 2 add bf16 gradients to fp32 ones without an fp32 copy of each, to the same bits.

    DeepSpeed has no public setting for it, so a private method is replaced on the instance. Where the installed version
    lacks that method, a warning is logged and DeepSpeed's own addition runs.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer of stage 1 or 2.
    """

    def add(output: torch.Tensor | None, source: torch.Tensor) -> None:
        if output is not None:
            output.add_(source)

    if not hasattr(optimizer, _ADD_GRADIENT):
        logger.warning(
            "DeepSpeed %s: %s has no method %s (train/engine/deepspeed_engine.py replaces it); every bf16 gradient is "
            "copied to fp32 before it is added, which takes more memory and time and gives the same result. DeepSpeed "
            "0.19.8 has the method",
            deepspeed.__version__,
            type(optimizer).__name__,
            _ADD_GRADIENT,
        )
        return
    setattr(optimizer, _ADD_GRADIENT, add)


def _partition(model: LlavaNext, dictionary: dict[str, Any], world: World) -> None:
    """ZeRO-3: broadcasts the parameters of one module after the other from rank 0 and partitions them over the ranks.

    A device never holds more than one module's whole parameters, and a host only rank 0's copy of the model: the other
    ranks allocate a module on their device, where the broadcast fills it.

    Raises:
        ReplicaError: the partitions, gathered again, differ from rank 0's parameters.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    partitioned: Any = None  # a parameter to which DeepSpeed has added its methods
    names: list[str] = []
    sources, sums = [], []
    for prefix, module in model.named_modules():
        materialize(module, world.device, replaced)
        named = [(name, each) for name, each in module.named_parameters(recurse=False) if not hasattr(each, "ds_id")]
        if not named:
            continue
        parameters = [parameter for _, parameter in named]
        names += [f"{prefix}.{name}" for name, _ in named]
        sources.append(tensor_sums(parameter.to(world.device) for parameter in parameters) if world.is_main else None)
        if partitioned is None:
            with muted_stdout():
                deepspeed.zero.Init(
                    module=nn.ParameterList(parameters), config_dict_or_path=dictionary, dtype=world.dtype
                )
            partitioned = parameters[0]
        else:
            partitioned.convert_to_zero_parameters(param_list=parameters)
        with gathered(parameters):
            sums.append(tensor_sums(parameters))
    source = torch.cat([each for each in sources if each is not None]) if world.is_main else None
    compare_sums(names, torch.cat(sums), world, source)


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of the configuration."""
    return int(config.engine.get("zero_optimization", {}).get("stage", 0))


def release_gathered(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-3: frees all parameters that are gathered or being gathered. Every rank must call it; no-op at other stages.

    Between steps all parameters must be partitioned. After a forward pass without a backward pass, parameters that were
    prefetched for the backward pass are still being gathered, and after DeepSpeed has loaded a checkpoint small ones
    are whole. `gathered` would then read incomplete values, and the next step's module order would differ from the
    recorded one.
    """
    engine.empty_partition_cache()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters are whole on every rank, at any ZeRO stage. Every rank must enter it."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    with deepspeed.zero.GatheredParameters(partitioned):
        yield
