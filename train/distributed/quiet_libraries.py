"""Keeps libraries from talking into the terminal of somebody who trains: their news go to the log files.

Imported for its functions by programs, before the libraries it concerns.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries(*, on_cpu: bool) -> None:
    """Progress bars and reports of transformers off; DeepSpeed told its accelerator instead of guessing aloud."""
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
    """Inside, nothing reaches standard output, compiled code's prints included."""
    sys.stdout.flush()
    kept = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
        sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)
