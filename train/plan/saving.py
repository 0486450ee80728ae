"""Estimates the size of a checkpoint and the time that a save takes from training."""

from dataclasses import dataclass

from train.distributed.free_memory import MAX_COPY_SHARE
from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware
from train.plan.model_facts import ModelFacts


@dataclass(frozen=True)
class Save:
    """One checkpoint.

    Attributes:
        num_bytes: of all its files.
        node_bytes: of those that the first node writes.
        write_s: seconds until they are written, beside the next steps if there is a copy.
        stall_s: seconds in which no rank trains.
    """

    num_bytes: float
    node_bytes: float
    write_s: float
    stall_s: float

    def seconds_per_step(self, save_every: int, step_s: float) -> float:
        """Returns the mean seconds per step that saves take: a save also waits until the one before it is written."""
        if not save_every:
            return 0.0
        waits_s = max(0.0, self.write_s - save_every * step_s) if self.stall_s < self.write_s else 0.0
        return (self.stall_s + waits_s) / save_every


def estimate_save(
    facts: ModelFacts, settings: ExecutionSettings, hardware: Hardware, *, half: bool, used_host_bytes: float = 0.0
) -> Save:
    """Returns size and time of a checkpoint.

    In formulas, T is the number of trained parameters, R that of the ranks and s the bytes of a weight. Frozen
    parameters are not saved. Without ZeRO, one rank saves weights and moments, s T + 8 T. With ZeRO, every rank saves
    its fp32 weights and moments, 12 T / R, and at stages 1 and 2 one rank saves the weights, s T.

    The ranks copy their part to the host's memory, while they do not train, and write it beside the next steps. If the
    copies of a node exceed `MAX_COPY_SHARE` of its free memory, the ranks wait until everything is written.

    Args:
        used_host_bytes: memory of a node that is in use while the run trains.
    """
    s, gpus = 2 if half else 4, hardware.gpus_per_node
    weights = float(s * facts.num_trained) if settings.zero_stage < 3 else 0.0
    states = (8.0 if settings.zero_stage == 0 else 12.0) * facts.num_trained
    dividing = 1 if settings.zero_stage == 0 else settings.nodes
    node_bytes = weights + states / dividing
    first_rank = weights + (states if settings.zero_stage == 0 else states / (settings.nodes * gpus))
    write_s = node_bytes / (hardware.disk_gb_s * 1e9)
    copied = node_bytes <= MAX_COPY_SHARE * (hardware.host_memory_gib * 2**30 - used_host_bytes)
    copy_s = first_rank / (hardware.host_link_gb_s * 1e9)
    return Save(weights + states, node_bytes, write_s, copy_s if copied else write_s)
