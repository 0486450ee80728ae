"""The size of a checkpoint, known before it is written."""

import deepspeed

_FP32_STATE = 12
"""Bytes that AdamW keeps of a trained parameter: fp32 master weight, first and second moment."""


def checkpoint_bytes(engine: deepspeed.DeepSpeedEngine, rank: int, num_ranks: int) -> int:
    """Returns the bytes of the checkpoint files that a rank writes; metadata and padding are not counted.

    Without ZeRO, rank 0 writes weights and both moments. With ZeRO, every rank writes its part of master weights and
    moments, and up to stage 2 rank 0 writes the weights too; at stage 3 the master weights are the only ones.

    Args:
        engine: its model says which parameters are trained; frozen ones are not saved.
        rank: that writes.
        num_ranks: among which DeepSpeed divides the optimizer.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained]
    weights = sum(size * parameter.element_size() for size, parameter in zip(sizes, trained, strict=True))
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return weights * 3 if rank == 0 else 0
    partition = -(-_FP32_STATE * sum(sizes) // num_ranks)
    return partition + (weights if rank == 0 and stage < 3 else 0)
