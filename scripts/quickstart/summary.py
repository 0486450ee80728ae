"""Writes the quickstart's summary.json and prints its main figures: losses, seconds, and what the answers depend on.

Reads the run folders, the evaluation and steps.tsv. It fails if the model does not read the small letters from the
tiles of their own image, by the margins below.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

SOURCE = "quickstart_letters"
LEAST_QUESTIONS = 300
LEAST_GAIN_OVER_BASE_VIEW = 0.30
LEAST_GAIN_OVER_OTHER_IMAGE = 0.20


def read_losses(run_dir: Path) -> dict[str, Any]:
    """Loss at the first and the last step of a stage, and the mean of its last tenth."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines]
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": len(losses),
        "samples": int(sum(line["train/samples"] for line in lines)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss_of_last_tenth": sum(tail) / len(tail),
        "training_s": round(sum(line["perf/step_s"] for line in lines), 1),
    }


def find_faults(letters: dict[str, Any]) -> list[str]:
    """Sentences on what the answers to the small letters lack; empty if they are read from the tiles."""
    faults = []
    if letters["num_questions"] < LEAST_QUESTIONS:
        faults.append(f"{letters['num_questions']} questions were asked; at least {LEAST_QUESTIONS} are required")
    for name, key, least in (
        ("the base view alone", "base_view_difference", LEAST_GAIN_OVER_BASE_VIEW),
        ("another image", "difference", LEAST_GAIN_OVER_OTHER_IMAGE),
    ):
        if letters[key] < least:
            faults.append(f"the tiles give {letters[key]:+.1%} over {name}; at least {least:+.0%} is required")
    return faults


def read_seconds(steps: Path) -> dict[str, float]:
    """Seconds of every step of quickstart.sh, by its title."""
    if not steps.is_file():
        return {}
    rows = [line.split("\t") for line in steps.read_text().splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) >= 2}


def main() -> int:
    """Writes summary.json and prints its main figures; exit code 1 if the check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--served", action="store_true", help="vLLM can serve a model with this tower")
    options = parser.parse_args()
    out: Path = options.out
    evaluation = json.loads((out / "finetune" / "evaluation.json").read_text())
    faults = find_faults(evaluation["by_source"][SOURCE])
    summary = {
        "passed": not faults,
        "faults": faults,
        "accuracy": evaluation["all"],
        "accuracy_by_source": evaluation["by_source"],
        "stages": {stage: read_losses(out / stage) for stage in ("align", "finetune")},
        "seconds": read_seconds(out / "steps.tsv"),
        "generated": evaluation["generated"],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print(summary, out, is_served=options.served)
    for fault in faults:
        print(f"quickstart: the check failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _print(summary: dict[str, Any], out: Path, *, is_served: bool) -> None:
    print(f"Report: {(out / 'report.html').resolve()}\n")
    for stage, row in summary["stages"].items():
        print(
            f"{stage:<9} {row['steps']:>4} steps, {row['samples']:,} samples, {row['training_s']:.0f} s: "
            f"loss {row['first_loss']:.2f} -> {row['mean_loss_of_last_tenth']:.2f}"
        )
    print(f"\n{_format_accuracy(summary['accuracy_by_source'])}\n")
    letters = summary["accuracy_by_source"][SOURCE]
    base_view = _format_control(letters, "base_view", "base_view_difference", "base_view_interval")
    other_image = _format_control(letters, "other_picture", "difference", "interval")
    print(
        f"{letters['num_questions']} small letters on held-out pages: {letters['right_picture']:.1%} read with AnyRes "
        f"tiles; {base_view} with the base view alone; {other_image} with another image."
    )
    serve = f"""
  ./scripts/vllm_env.sh   # vLLM for CPUs, 2.5 GB; on a GPU use your own
  vllm serve {out}/finetune/export --dtype float32 --mm-processor-kwargs '{{"backend": "pil"}}'"""
    print(f"""
Files:
  {out}/finetune/export       the model; stock transformers loads it
  {out}/align/connector       stage 1's connector
  {out}/summary.json          all of the above

Next commands:
  python -m train.chat {out}/finetune photograph.jpg --ask "What is in the picture?"
  python -m train.inspect {out}/finetune --step 20 --loss
  python -m train --help   # your own data: docs/data.md{serve if is_served else ""}""")


def _format_accuracy(by_source: dict[str, dict[str, Any]]) -> str:
    """A table of the shares of exact answers of all sources with questions, also where they are zero."""
    rows = []
    for source, row in by_source.items():
        if "num_questions" in row:
            shares = (f"{row[key]:.1%}" for key in ("right_picture", "base_view", "other_picture", "commonest_answer"))
            rows.append((source, row["num_questions"], *shares))
    head = ["exact answers", "questions", "own image", "base view alone", "another image", "commonest"]
    return tabulate(rows, head, "plain", disable_numparse=True, colalign=("left", *["right"] * 5))


def _format_control(row: dict[str, Any], control: str, difference: str, interval: str) -> str:
    """'24.1% (difference +60.2%, 95 % interval +54.0% to +66.1%)'."""
    low, high = row[interval]
    return f"{row[control]:.1%} (difference {row[difference]:+.1%}, 95 % interval {low:+.1%} to {high:+.1%})"


if __name__ == "__main__":
    sys.exit(main())
