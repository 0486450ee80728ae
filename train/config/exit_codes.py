"""The exit codes of `python -m train` and the programs beside it, and how they report a user's mistake."""

import sys

EXIT_FAILED = 1
"""A run or a check failed."""
EXIT_USAGE = 2
"""A mistake in the configuration or the data it names: the same command cannot succeed."""
EXIT_INTERRUPTED = 75
"""The run was asked to stop (EX_TEMPFAIL) and saved if there was a step: the same command continues it."""
EXIT_AT_ONCE = 130
"""The run left without saving: asked to stop a second time, or by Ctrl-C before the first step (as shells count it)."""


def report_mistake(error: Exception | str, *, is_main: bool = True) -> int:
    """Prints a user's mistake to stderr, on the main rank alone; returns the exit code that goes with it."""
    if is_main:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USAGE
