"""`train.evaluate` with another script in place of scripts/lmms_eval.sh, which is the first argument."""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.evaluate import __main__ as program
from train.evaluate import suite_run


def main(arguments: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    suite_run.SCRIPT = Path(arguments[0])
    return program.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
