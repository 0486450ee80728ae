"""Reduces the terminal output of libraries. Programs call it before they import those libraries."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries(*, on_cpu: bool) -> None:
    """Disables progress bars and reports of transformers, and sets DeepSpeed's accelerator so that none is searched."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextmanager
def muted_stdout() -> Iterator[None]:
    """Redirects standard output to /dev/null inside the block, output of compiled code included."""
    sys.stdout.flush()
    stdout = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
        sys.stdout.flush()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(sink)
