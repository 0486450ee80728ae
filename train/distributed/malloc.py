"""The C library's memory, for training on a CPU: what one row frees is kept for the next.

By default glibc gives free memory back to the system, and every row's activations come from it again page by page,
zeroed: about a tenth of a step. The price is memory: what a process holds beside what it needs at once is `kept GiB` of
scripts/bench/plan.py.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The numbers that malloc.h gives them."""
_LARGEST_KEPT = 64 << 20
"""Larger blocks, logits above all, are few, and would leave holes that nothing fills."""
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Sets it for this process and what it forks; nothing where the environment decides or there is no glibc."""
    if any(name in os.environ for name in _SETTINGS):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_KEPT)
        set_option(_TRIM_THRESHOLD, _NEVER)
