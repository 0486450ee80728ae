"""Writes the quickstart's summary.json: seconds, losses, and whether the model's answers depend on its images.

Reads the run folders, the evaluation and steps.tsv, and fails if the answers depend on the image by less than the
margins below.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LEAST_DIFFERENCE = 0.15
LEAST_QUESTIONS = 500


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


def find_faults(accuracy: dict[str, Any]) -> list[str]:
    """Sentences on what the evaluation lacks; empty if the answers depend on the images."""
    faults = []
    if accuracy["num_questions"] < LEAST_QUESTIONS:
        faults.append(f"{accuracy['num_questions']} questions were asked; at least {LEAST_QUESTIONS} are required")
    if accuracy["difference"] < LEAST_DIFFERENCE:
        faults.append(
            f"the right image gives {accuracy['difference']:+.1%} over another one; at least "
            f"{LEAST_DIFFERENCE:+.0%} is required"
        )
    if accuracy["right_picture"] <= accuracy["commonest_answer"]:
        faults.append(
            f"{accuracy['right_picture']:.1%} with the right image is not better than always answering "
            f"{accuracy['commonest']!r} ({accuracy['commonest_answer']:.1%})"
        )
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
    out: Path = parser.parse_args().out
    evaluation = json.loads((out / "evaluation.json").read_text())
    faults = find_faults(evaluation["all"])
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
    _print(summary, out)
    for fault in faults:
        print(f"quickstart: the check failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _print(summary: dict[str, Any], out: Path) -> None:
    for stage, row in summary["stages"].items():
        print(
            f"{stage:<9} {row['steps']:>4} steps, {row['samples']:,} samples, {row['training_s']:.0f} s: "
            f"loss {row['first_loss']:.2f} -> {row['mean_loss_of_last_tenth']:.2f}"
        )
    accuracy = summary["accuracy"]
    low, high = accuracy["interval"]
    print(
        f"{accuracy['num_questions']} questions on {accuracy['num_pictures']} held-out images: "
        f"{accuracy['right_picture']:.1%} right; with another image {accuracy['other_picture']:.1%} "
        f"(difference {accuracy['difference']:+.1%}, 95 % interval {low:+.1%} to {high:+.1%}); always "
        f"{accuracy['commonest']!r}: {accuracy['commonest_answer']:.1%}"
    )
    for answer in summary["generated"]:
        print(f"  {answer['text']!r} -> {answer['answer']!r}   (truth: {answer['truth']!r}, {answer['source']})")
    print(f"""
Files:
  {out}/align/connector       stage 1's connector, with the description that stage 2 checked
  {out}/finetune/export       the model; stock transformers loads it
  {out}/*/metrics.jsonl       one line per step
  {out}/summary.json          all of the above

Next commands:
  python -m train experiment=quickstart stage=finetune name=mine stage.epochs=2 stage.init_from={out}/align/connector
  python -m train --help
  (your own data: the section Data of README.md)""")


if __name__ == "__main__":
    sys.exit(main())
