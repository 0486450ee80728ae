"""Measures the planning of runs: the planner against runs, the balance of ranks, and what limits large runs.

    python scripts/bench/plan.py accuracy [--quick]     memory and step time, planned and measured
    python scripts/bench/plan.py balance                how evenly a step's work is divided among ranks
    python scripts/bench/plan.py scale [--quick]        64 to 4,096 ranks, 1 to 100 million samples
    python scripts/bench/plan.py network                communication at 32 and 1,024 ranks by the rate of the network
    python scripts/bench/plan.py published              communication, planned and published by others

SUBCOMMAND --help lists the options of each.
"""

from collections.abc import Sequence

from measuring.subcommands import run_subcommand

SUBCOMMANDS = {name: f"planner.{name}" for name in ("accuracy", "balance", "scale", "network", "published")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code of the subcommand."""
    return run_subcommand(str(__doc__), SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
