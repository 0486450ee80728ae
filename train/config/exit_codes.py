"""The exit codes of `python -m train` and of the other programs, and how they report a user's mistake."""

import errno
import os
import sys
from pathlib import Path

from llava_next.file_access import permission_problem, write_problem

EXIT_FAILED = 1
"""A run or a check failed."""
EXIT_USAGE = 2
"""A mistake in the configuration or in the data that it names: the same command cannot succeed."""
EXIT_INTERRUPTED = 75
"""The run was asked to stop (EX_TEMPFAIL) and saved a checkpoint if a step was done: the same command continues it."""
EXIT_AT_ONCE = 130
"""The run exited without saving: it was asked to stop twice, or Ctrl-C came before the first step (a shell's code)."""


def report_mistake(error: Exception | str, *, is_main: bool = True) -> int:
    """Prints a user's mistake to stderr on the main rank, and returns EXIT_USAGE.

    Raises:
        OSError: it is one, but neither of denied permission nor of a read-only file system.
    """
    if isinstance(error, OSError):
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise error
        error = describe_denied(error)
    if is_main:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # a path may have line breaks
    return EXIT_USAGE


def describe_denied(error: OSError) -> str:
    """Returns a sentence with the path, its owner and the fix for a file that may not be read or written."""
    if error.filename is None:
        return str(error)
    path = Path(os.fsdecode(error.filename))
    return permission_problem(path, depth=0) or write_problem(path, error)
