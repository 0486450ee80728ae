"""Copies between the host and the device that may wait for the device.

A device runs behind the host, so a copy waits for all work that was queued before it, collectives included. The
watchdog recognizes a rank that is inside one of these functions as one that waits.
"""

import torch

from llava_next.inputs.batch import Batch


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on the CPU: a copy if it was on another device."""
    return tensor.cpu()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns a copy of a row on a device. The host waits only if the row is not in pinned memory."""
    return batch.to(device)
