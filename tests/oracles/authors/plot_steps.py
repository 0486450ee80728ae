"""Plots the loss curves of steps.json and steps_ours.json (tests/oracles/fixtures) in docs/images/authors_steps.svg.

    python -m tests.oracles.authors.plot_steps [--check]

Runs in the environment that scripts/oracles.sh makes.
"""

import argparse
import hashlib
import io
import json
from typing import Any

import matplotlib  # type: ignore[import-not-found]
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, NullLocator  # type: ignore[import-not-found]

from tests.oracles.save_fixture import FIXTURES, PLOT
from tests.oracles.tiny_runs import RUNS

THEIRS, OURS = "#b8c4d6", "#b3261e"
LIMIT = 1e-4
"""Of tests/oracles/test_steps.py."""
TITLES = {
    "align_square": "stage 1, square pictures",
    "align_anyres": "stage 1, AnyRes, newline frozen",
    "finetune_anyres": "stage 2, AnyRes, tower frozen",
}


def draw(authors: dict[str, Any], ours: dict[str, Any], sources: str) -> str:
    """The plot as SVG text; `sources` identifies its input files in it."""
    matplotlib.rcParams.update({"svg.hashsalt": "steps", "svg.fonttype": "none", "font.size": 9})
    matplotlib.rcParams["font.sans-serif"] = [
        "DejaVu Sans",
        "sans-serif",
    ]  # text stays text, for whatever font is there
    figure, rows = pyplot.subplots(
        2, len(RUNS), figsize=(10, 4.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for column, run in enumerate(RUNS):
        above, below = rows[0][column], rows[1][column]
        a, b = authors[run.name]["losses"], ours[run.name]["losses"]
        steps = range(1, len(a) + 1)
        above.plot(steps, a, color=THEIRS, linewidth=6, solid_capstyle="round", label="the authors' trainer")
        above.plot(steps, b, color=OURS, linewidth=1.2, marker="o", markersize=2.5, label="ours")
        above.set_title(TITLES[run.name], fontsize=9.5)
        below.bar(steps, [abs(x - y) for x, y in zip(a, b, strict=True)], color=OURS, width=0.7)
        below.axhline(LIMIT, color="black", linewidth=0.8, linestyle="--")
        below.set_yscale("log")
        below.set_ylim(1e-8, 1e-3)
        below.yaxis.set_major_locator(FixedLocator([1e-8, 1e-6, 1e-4]))
        below.yaxis.set_minor_locator(NullLocator())
        below.set_xlabel("step")
        below.xaxis.set_major_locator(FixedLocator([1, 5, 10, 15, 20]))
        for axes in (above, below):
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.set_axisbelow(True)
    rows[0][0].set_ylabel("loss")
    rows[1][0].set_ylabel("difference")
    rows[1][0].annotate("what the tests allow", (20.4, LIMIT), ha="right", va="bottom", fontsize=8)
    rows[0][0].legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Description": sources})
    pyplot.close(figure)
    return "\n".join(line.strip() for line in text.getvalue().splitlines()) + "\n"


def main() -> int:
    """The program; returns 1 if the plot is not of these files under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    files = [FIXTURES / "steps.json", FIXTURES / "steps_ours.json"]
    authors, ours = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    sources = ", ".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    path = PLOT
    if check:
        same = path.exists() and sources in path.read_text(encoding="utf-8")
        print(f"  {path.name}: {'is of these files' if same else 'is NOT of these files'}", flush=True)
        return 0 if same else 1
    path.write_text(draw(authors, ours, sources), encoding="utf-8")
    print(f"  {path.name}: written, {path.stat().st_size / 1024:.0f} KiB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
