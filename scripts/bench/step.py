"""Measures a training step: this project's trainer against stock transformers and the authors' trainer.

    python scripts/bench/step.py cpu [--quick] [--profile]   a small model with real geometry, on this machine's cores
    python scripts/bench/step.py gpu [--profile]             CLIP ViT-L and layers of a 7B on one GPU, against stock

SUBCOMMAND --help lists the options of each.
"""

from collections.abc import Sequence

from measuring.subcommands import run_subcommand

SUBCOMMANDS = {"cpu": "training_step.on_cpu", "gpu": "training_step.on_gpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code of the subcommand."""
    return run_subcommand(str(__doc__), SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
