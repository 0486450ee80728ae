"""`python -m train.report RUN...`: one or several runs on one HTML page that stands alone.

Losses, rates, speed, where the time goes, memory, evaluation with pictures, resumes, data, configuration; of several
runs the curves lie over one another, and the page opens with what differs. Nothing of a run is loaded or changed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.report.charts import need_matplotlib
from train.report.page import write_page
from train.report.run_folder import read_runs

_NUM_SAMPLES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    try:
        need_matplotlib()
        runs = read_runs(options.runs)
    except ConfigError as error:
        return report_mistake(error)
    for run in runs:
        for remark in run.remarks:
            print(f"{run.label}: {remark}", file=sys.stderr)
    out = options.out or _place([run.path for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    page = write_page(runs, options.samples)
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # a broken record may hold half a character
    partial.rename(out)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB); open it in a browser")
    return 0


def _place(folders: Sequence[Path]) -> Path:
    """A run's own folder; of several runs the one that holds all of them."""
    return Path(os.path.commonpath(folders)) / "report.html"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a stage")
    parser.add_argument(
        "--samples",
        type=int,
        default=_NUM_SAMPLES,
        help="at most so many questions of the evaluation, and of the run's course (%(default)s; 0: none)",
    )
    parser.add_argument(
        "--out", type=Path, help="the page (default: RUN/report.html; of several, in the folder that holds them all)"
    )
    options = parser.parse_args(arguments)
    if options.samples < 0:
        parser.error(f"--samples {options.samples}: must be at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
