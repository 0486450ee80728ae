"""Formats the results of an evaluation, as plain values for JSON and as text tables."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tabulate import tabulate

from train.evaluate.answers import Answer
from train.evaluate.image_questions import Accuracy

_NUM_SHOWN = 2


@dataclass(frozen=True)
class SourceReport:
    """The results of one source.

    Attributes:
        num_samples, num_tokens: samples and supervised tokens of the loss.
        num_rejected: samples that are too long for the stage or have no supervised token.
        metric: name of the metric of the answers.
        accuracy: with the right and with another image; None if no sample has exactly one image.
        num_unasked: questions that cannot be asked (with other images: `filter_askable`).
        unasked_reason: why not.
    """

    source: str
    num_samples: int
    num_rejected: int
    num_tokens: int
    loss: float | None
    metric: str
    answers: list[Answer] = field(default_factory=list)
    accuracy: Accuracy | None = None
    num_unasked: int = 0
    unasked_reason: str = "too long, or a set without another of its size"

    @property
    def scores(self) -> list[float]:
        """Scores of the answers that the metric can score."""
        return [answer.score for answer in self.answers if answer.score is not None]

    def as_dict(self) -> dict[str, Any]:
        """Returns all results, those of the image questions included, as plain values."""
        scores = self.scores
        values: dict[str, Any] = {
            "num_samples": self.num_samples,
            "num_left_out": self.num_rejected,
            "num_tokens": self.num_tokens,
            "loss": self.loss,
            "metric": self.metric,
            "score": float(np.mean(scores)) if scores else None,
            "num_answers": len(self.answers),
            "num_scored": len(scores),
            "num_cut": sum(answer.is_cut for answer in self.answers),
            "num_unasked": self.num_unasked,
            "unasked_reason": self.unasked_reason,
        }
        if self.metric == "grounding_iou" and scores:
            values["iou_at_least_half"] = float(np.mean(np.array(scores) >= 0.5))
        return values | (asdict(self.accuracy) if self.accuracy else {})


def make_result(header: dict[str, Any], reports: list[SourceReport], accuracy: Accuracy | None) -> dict[str, Any]:
    """Returns all results as plain values.

    Args:
        header: what was evaluated, and the seed.
        accuracy: over the questions of all sources.
    """
    return {
        **header,
        "all": asdict(accuracy) if accuracy else None,
        "by_source": {report.source: report.as_dict() for report in reports},
        "generated": [asdict(answer) for report in reports for answer in report.answers[:_NUM_SHOWN]],
    }


def format_tables(result: dict[str, Any]) -> str:
    """Returns a table of losses and scores, and tables of the accuracy with the own image and with a control."""
    head = ["source", "samples", "tokens", "loss", "metric", "score", "answers", ""]
    rows = []
    for source, row in result["by_source"].items():
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        score = "-" if row["score"] is None else f"{row['score']:.1%}"
        counts = (row["num_samples"], f"{row['num_tokens']:,}", loss)
        rows.append((source, *counts, row["metric"], score, row["num_scored"], _format_remarks(row)))
    align = ("left", "right", "right", "right", "left", "right", "right", "left")
    tables = [tabulate(rows, head, "plain", disable_numparse=True, colalign=align)]
    with_questions = {source: row for source, row in result["by_source"].items() if "num_questions" in row}
    if with_questions:
        accuracies = [*with_questions.items(), ("all", result["all"])]
        tables.append(_format_controls(accuracies, "another image", "other_picture", "difference", "interval"))
        if result["all"]["base_view"] is not None:
            control = ("base view alone", "base_view", "base_view_difference", "base_view_interval")
            tables.append(_format_controls(accuracies, *control))
    return "\n\n".join(tables)


def _format_controls(accuracies: list[tuple[str, dict[str, Any]]], name: str, *keys: str) -> str:
    """Returns a table of the exact answers beside those with a control.

    Args:
        accuracies: (source, accuracy).
        name: of the control.
        keys: of the share of right answers with the control, of the difference to it, and of the interval of that.
    """
    control, difference, interval = keys
    head = ["exact answers", "questions", "own image", name, "commonest", "difference", ""]
    cells = []
    for source, row in accuracies:
        low, high = row[interval]
        shares = (f"{row[key]:.1%}" for key in ("right_picture", control, "commonest_answer"))
        bounds = f"(95 %: {low:+.1%} to {high:+.1%})"
        cells.append((source, row["num_questions"], *shares, f"{row[difference]:+.1%}", bounds))
    return tabulate(cells, head, "plain", disable_numparse=True, colalign=("left", *["right"] * 5, "left"))


def _format_remarks(row: dict[str, Any]) -> str:
    """Returns what limits the results: rejected samples, questions that were not asked, and the like."""
    remarks = []
    if row["num_left_out"]:
        remarks.append(f"{row['num_left_out']} samples rejected")
    if row["num_unasked"]:
        remarks.append(f"{row['num_unasked']} questions not asked: {row['unasked_reason']}")
    if row["num_cut"]:
        remarks.append(f"{row['num_cut']} answers cut at --max-new-tokens")
    if row["metric"] != "none" and row["num_scored"] < row["num_answers"]:
        remarks.append(f"{row['num_answers'] - row['num_scored']} answers without a score")
    if "iou_at_least_half" in row:
        remarks.append(f"IoU of at least 0.5: {row['iou_at_least_half']:.1%}")
    return "; ".join(remarks)
