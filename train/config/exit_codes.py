"""The exit codes of `python -m train` and of the other programs, and how they report a user's mistake."""

import sys

EXIT_FAILED = 1
"""A run or a check failed."""
EXIT_USAGE = 2
"""A mistake in the configuration or in the data that it names: the same command cannot succeed."""
EXIT_INTERRUPTED = 75
"""The run was asked to stop (EX_TEMPFAIL) and saved a checkpoint if a step was done: the same command continues it."""
EXIT_AT_ONCE = 130
"""The run exited without saving: it was asked to stop twice, or Ctrl-C came before the first step (a shell's code)."""


def report_mistake(error: Exception | str, *, is_main: bool = True) -> int:
    """Prints a user's mistake to stderr on the main rank, and returns EXIT_USAGE."""
    if is_main:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USAGE
