"""Short questions on pictures, merged: all questions on one picture become one conversation.

Owns: the wording that asks for a short answer, the merging rule and its order.
Leaves: finding questions and pictures to the readers of VQA-like layouts.

LLaVA-1.5 merged the question sets this way, and the released LLaVA-NeXT set has one conversation per chart
(recipe 4.2, 4.4): the picture, by far the longest part of a sequence, is then paid for once.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_recipes.sample import IMAGE_PLACEHOLDER, Reject, Sample, assemble

SHORT_ANSWER = "Answer the question using a single word or phrase."  # recipe 4.3


def merge(
    sample_id: str,
    questions: Sequence[tuple[str, str]],
    picture: Path | bytes,
    place: str,
    suffix: str = SHORT_ANSWER,
) -> Sample | Reject:
    """One conversation of (question, answer) pairs in their order; the picture stands before the first."""
    turns: list[tuple[object, object]] = []
    for number, (question, answer) in enumerate(questions):
        opening = f"{IMAGE_PLACEHOLDER}\n" if number == 0 else ""
        turns.append(("user", f"{opening}{question}\n{suffix}".rstrip("\n")))
        turns.append(("assistant", answer))
    return assemble(sample_id, turns, [picture], place)


def by_hash(questions: Sequence[tuple[str, str]], num_wanted: int | None = None) -> list[tuple[str, str]]:
    """The questions ordered by their hash, the first `num_wanted` of them.

    A hash mixes the kinds of questions that files list in blocks, needs no seed, and a smaller number is
    always a part of a larger one.
    """
    return sorted(questions, key=lambda pair: hashlib.sha256("\n".join(pair).encode("utf-8", "replace")).digest())[
        :num_wanted
    ]
