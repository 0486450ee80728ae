"""`python -m train.requeue` with a run's own arguments: may Slurm start this run again?

    exit code 0   yes
    exit code 1   no: it has been started again several times in a row and saved no new step; the sentence says so

The batch script asks after exit code 75 (saved, run me again) and before `scontrol requeue`. Progress is the newest
checkpoint's step, remembered in `requeues.json` of the run's folder.
"""

import json
import sys
from pathlib import Path

from train.__main__ import compose
from train.config.exit_codes import EXIT_FAILED, EXIT_USAGE, report_mistake
from train.config.schema import ConfigError

MOST_WITHOUT_PROGRESS = 3
"""The run is given up after so many starts in a row that saved no new step."""


def main() -> int:
    """Reads the configuration as the run does, decides, prints one sentence; returns the exit code."""
    try:
        config = compose()
    except ConfigError as error:
        return report_mistake(error)
    if config is None:
        return EXIT_USAGE
    step, num = count(config.run_dir)
    if num >= MOST_WITHOUT_PROGRESS:
        print(
            f"error: {config.run_dir} is not started again: {num} starts in a row have saved nothing after step "
            f"{step}; ask for more time (--time) or a smaller lead of the signal (--signal), and submit it again",
            file=sys.stderr,
        )
        (config.run_dir / "requeues.json").unlink()
        return EXIT_FAILED
    print(f"{config.run_dir} goes on after step {step}", file=sys.stderr)
    return 0


def count(run_dir: Path) -> tuple[int, int]:
    """The newest checkpoint's step (0: none), and how many starts in a row have added nothing to it."""
    step = max((int(number) for number in _saved(run_dir / "checkpoints")), default=0)
    kept = run_dir / "requeues.json"
    try:
        before = json.loads(kept.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {"step": -1, "num": 0}
    num = before["num"] + 1 if before["step"] == step else 0
    kept.write_text(json.dumps({"step": step, "num": num}) + "\n")
    return step, num


def _saved(folder: Path) -> list[str]:
    numbers = [place.name.removeprefix("step_") for place in folder.glob("step_*")]
    return [number for number in numbers if number.isdigit()]  # and not .partial


if __name__ == "__main__":
    sys.exit(main())
