"""`python -m train.report RUN...`: one or several runs on one HTML page that needs no other file and no network.

Results first: losses, scores, questions with their images and answers. Then the curves of losses, rates, speed, time by
kind and memory, which share their charts for several runs; then what differs between the runs, resumes, data and
configuration. No run is loaded or changed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_recipes.schema.arguments import ArgumentParser, output_file, path_argument
from data_recipes.schema.console import run_program
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.html.page import write_page
from train.observability.run_folder import read_runs
from train.report.report_page import page_values


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    try:
        runs = read_runs(options.runs)
    except (ConfigError, OSError) as error:
        return report_mistake(error)
    for run in runs:
        for remark in run.remarks:
            print(f"{run.label}: {remark}", file=sys.stderr)
    out = options.out or Path(os.path.commonpath([run.path for run in runs])) / "report.html"
    write_page(out, "report.html", **page_values(runs, options.samples))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.report", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("runs", type=path_argument, nargs="+", metavar="RUN", help="the folder of a stage")
    samples = "at most so many questions of the evaluation, and of the training (%(default)s; 0: none)"
    add("--samples", type=int, default=12, help=samples)
    out = "the page (default: RUN/report.html; of several, in the folder that holds them all)"
    add("--out", type=output_file, help=out)
    options = parser.parse_args(arguments)
    if options.samples < 0:
        parser.error(f"--samples {options.samples}: must be at least 0")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
