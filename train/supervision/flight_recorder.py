"""Sets up torch's flight recorder for NCCL and writes its record when a rank ends because of a hang.

The record lists the last collectives of a rank and their states. `python -m
torch.distributed.flight_recorder.fr_trace --prefix nccl_rank_ RUN/log` compares those of all ranks.
"""

import faulthandler
import logging
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch._C import _distributed_c10d

logger = logging.getLogger(__name__)

_PREFIX = "nccl_rank_"
_DUMP_S = 20.0
"""Longest duration of a dump: it queries CUDA events, which can hang with the device."""


def configure(environment: MutableMapping[str, str], log_folder: Path) -> None:
    """Sets the variables that torch reads when it creates a process group; those that the user has set stay.

    Args:
        environment: `os.environ`, before the process group is created.
        log_folder: folder of the records; NCCL's own timeout writes them there too.
    """
    # Each variable with its earlier name, which torch reads too.
    values = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(log_folder.resolve() / _PREFIX),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
    }
    for names, value in values.items():
        if not any(name in environment for name in names):
            environment.update(dict.fromkeys(names, value))


def dump(log_folder: Path, rank: int, stacks: TextIO) -> None:
    """Writes the record of this rank, where torch has one; a process whose record hangs is ended with exit code 1.

    Args:
        log_folder: of the run.
        rank: of this process.
        stacks: open log file for the stacks of a dump that hangs.
    """
    read = getattr(_distributed_c10d, "_dump_nccl_trace", None)
    if read is None:  # a build of torch without NCCL
        return
    faulthandler.dump_traceback_later(_DUMP_S, exit=True, file=stacks)
    with suppress(Exception):
        record = read()
        if record:
            path = log_folder / f"{_PREFIX}{rank}"
            path.write_bytes(record)
            logger.info("wrote the flight record of NCCL to %s", path)
    faulthandler.cancel_dump_traceback_later()
