"""Measures the input: from raw files to stores, and from stores to batches.

    python scripts/bench/input.py stores [--parts rate memory]
    python scripts/bench/input.py batches [--parts tiles lengths plan loader]
    python scripts/bench/input.py archives [--images 100000]

SUBCOMMAND --help lists the options of each. `stores` and `batches` need the quickstart's assets:
`python scripts/quickstart/assets.py`.
"""

from collections.abc import Sequence

from measuring.subcommands import run_subcommand

SUBCOMMANDS = {"stores": "input_path.stores", "batches": "input_path.batches", "archives": "input_path.archives"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code of the subcommand."""
    return run_subcommand(str(__doc__), SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
