"""`python -m train.requeue` with the arguments of a run: decides whether Slurm may requeue the job of that run.

    exit code 0   yes
    exit code 1   no: several starts in a row have saved no new step

The batch script calls it after exit code 75 and before `scontrol requeue`. Progress is the step of the newest
checkpoint, which is stored in `requeues.json` in the run folder.
"""

import json
import sys
from pathlib import Path

from data_recipes.schema.console import run_program
from train.__main__ import compose
from train.config.exit_codes import EXIT_FAILED, EXIT_USAGE, report_mistake
from train.config.schema import ConfigError

MAX_STARTS_WITHOUT_PROGRESS = 3
"""Number of starts in a row without a new saved step after which the run is not requeued."""


def main() -> int:
    """Reads the configuration as the run does, prints the decision, and returns the exit code."""
    try:
        config = compose()
    except (ConfigError, OSError) as error:
        return report_mistake(error)
    if config is None:
        return EXIT_USAGE
    step, num = update_count(config.run_dir)
    if num >= MAX_STARTS_WITHOUT_PROGRESS:
        print(
            f"error: {config.run_dir} is not requeued: {num} starts in a row have saved nothing after step {step}; "
            "request more time (--time) or an earlier signal (--signal), and submit the job again",
            file=sys.stderr,
        )
        (config.run_dir / "requeues.json").unlink()
        return EXIT_FAILED
    print(f"{config.run_dir} is requeued after step {step}", file=sys.stderr)
    return 0


def update_count(run_dir: Path) -> tuple[int, int]:
    """Updates requeues.json.

    Returns:
        The step of the newest checkpoint (0 without one), and the number of starts in a row that saved no newer one.
    """
    step = max((int(number) for number in _list_saved_steps(run_dir / "checkpoints")), default=0)
    path = run_dir / "requeues.json"
    try:
        previous = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        previous = {"step": -1, "num": 0}
    num = previous["num"] + 1 if previous["step"] == step else 0
    path.write_text(json.dumps({"step": step, "num": num}) + "\n")
    return step, num


def _list_saved_steps(folder: Path) -> list[str]:
    numbers = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    return [number for number in numbers if number.isdigit()]  # without step_*.partial


if __name__ == "__main__":
    sys.exit(run_program(main))
