"""What was found, as one value for JSON and as tables for a person."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from train.evaluate.answers import Answer
from train.evaluate.image_questions import Accuracy

_NUM_SHOWN = 2


@dataclass(frozen=True)
class SourceReport:
    """One source: the loss of its held-out samples, the metric of its answers, and whether the model looks.

    `num_left_out` are samples that have no place in the stage, `num_unasked` questions too long to be asked with every
    picture. `accuracy` is None where no sample shows exactly one picture.
    """

    source: str
    num_samples: int
    num_left_out: int
    num_tokens: int
    loss: float | None
    metric: str
    answers: list[Answer] = field(default_factory=list)
    accuracy: Accuracy | None = None
    num_unasked: int = 0

    @property
    def scores(self) -> list[float]:
        """Of the answers that the metric can judge."""
        return [answer.score for answer in self.answers if answer.score is not None]

    def as_dict(self) -> dict[str, Any]:
        """All figures; the picture questions' stand beside the others, under their own names."""
        scores = self.scores
        found: dict[str, Any] = {
            "num_samples": self.num_samples,
            "num_left_out": self.num_left_out,
            "num_tokens": self.num_tokens,
            "loss": self.loss,
            "metric": self.metric,
            "score": float(np.mean(scores)) if scores else None,
            "num_answers": len(self.answers),
            "num_scored": len(scores),
            "num_cut": sum(answer.is_cut for answer in self.answers),
            "num_unasked": self.num_unasked,
        }
        if self.metric == "grounding_iou" and scores:
            found["iou_at_least_half"] = float(np.mean(np.array(scores) >= 0.5))
        return found | (asdict(self.accuracy) if self.accuracy else {})


def as_result(of: dict[str, Any], reports: list[SourceReport], everything: Accuracy | None) -> dict[str, Any]:
    """All figures as plain values; `of` says what was evaluated, and how."""
    return {
        **of,
        "all": asdict(everything) if everything else None,
        "by_source": {report.source: report.as_dict() for report in reports},
        "generated": [asdict(answer) for report in reports for answer in report.answers[:_NUM_SHOWN]],
    }


def format_tables(result: dict[str, Any]) -> str:
    """Losses and scores of each source, and below them what the pictures are worth, in percent."""
    lines = [f"{'source':<26}{'samples':>8}{'tokens':>10}{'loss':>9}  {'metric':<17}{'score':>7}{'answers':>9}"]
    for source, row in result["by_source"].items():
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        score = "-" if row["score"] is None else f"{row['score']:.1%}"
        lines.append(
            f"{source:<26}{row['num_samples']:>8}{row['num_tokens']:>10,}{loss:>9}  {row['metric']:<17}{score:>7}"
            f"{row['num_scored']:>9}{_remarks(row)}"
        )
    asked = {source: row for source, row in result["by_source"].items() if "num_questions" in row}
    if not asked:
        return "\n".join(lines)
    lines += [
        "",
        f"{'exact answers, with':<26}{'questions':>10}{'its own':>9}{'other':>8}{'common':>8}{'difference':>12}",
    ]
    for source, row in [*asked.items(), ("all", result["all"])]:
        low, high = row["interval"]
        lines.append(
            f"{source:<26}{row['num_questions']:>10}{row['right_picture']:>9.1%}{row['other_picture']:>8.1%}"
            f"{row['commonest_answer']:>8.1%}{row['difference']:>+12.1%}  (95 %: {low:+.1%} to {high:+.1%})"
        )
    return "\n".join(lines)


def _remarks(row: dict[str, Any]) -> str:
    """What is not as the figures alone look."""
    said = []
    if row["num_left_out"]:
        said.append(f"{row['num_left_out']} samples left out, too long")
    if row["num_unasked"]:
        said.append(f"{row['num_unasked']} questions unasked, too long")
    if row["num_cut"]:
        said.append(f"{row['num_cut']} answers cut off at --max-new-tokens")
    if row["metric"] != "none" and row["num_scored"] < row["num_answers"]:
        said.append(f"{row['num_answers'] - row['num_scored']} answers without a score")
    if "iou_at_least_half" in row:
        said.append(f"IoU of at least 0.5: {row['iou_at_least_half']:.1%}")
    return "  " + "; ".join(said) if said else ""
