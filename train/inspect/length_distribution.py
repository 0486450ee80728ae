"""The data around the samples that are looked at: how long they are, how wide, and who was left out and why.

Owns counting them; which samples are looked at is `sample_set.py`'s, the form of a chart `histograms.py`'s.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_recipes.store.reader import StoredText
from llava_next.inputs.processor import Processor, SampleRejected

_MOST_NAMED = 8


@dataclass(frozen=True)
class Spread:
    """Lengths of samples, int [n] each, and width over height of pictures, float64 [m]; which ones, in words."""

    tokens: np.ndarray
    supervised: np.ndarray
    tiles: np.ndarray
    aspects: np.ndarray
    which: str


@dataclass
class LeftOut:
    """The records that a gate left out: how many of each reason, and the first of them."""

    title: str
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        """Counts a record of a quarantine: id, reason, detail."""
        self.counts[entry["reason"]] += 1
        named = self.first.setdefault(entry["reason"], [])
        if len(named) < _MOST_NAMED:
            named.append(entry)


def count(texts: Iterable[StoredText], processor: Processor, which: str) -> tuple[Spread, LeftOut]:
    """How these samples are spread, and those of them that have no place in the processor's stage.

    Args:
        which: which samples they are, in words.
    """
    rejected = LeftOut(f"by this model and stage, of {which}")
    lengths, sizes = [], []
    for text in texts:
        sizes.append(text.sizes_hw)
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected as error:
            rejected.add({"id": text.id, "reason": error.reason.value, "detail": error.detail})
            continue
        lengths.append((layout.num_tokens, layout.num_supervised, layout.num_tiles))
    tokens, supervised, tiles = np.array(lengths, dtype=np.int64).reshape(-1, 3).T
    return Spread(tokens, supervised, tiles, aspects_of(sizes), which), rejected


def aspects_of(sizes_of_samples: Iterable[Sequence[tuple[int, int]]]) -> np.ndarray:
    """Width over height of every picture: float64 [m]."""
    return np.array([width / height for sizes in sizes_of_samples for height, width in sizes], dtype=np.float64)


def read_quarantine(path: Path, title: str) -> LeftOut:
    """What a quarantine.jsonl says; nothing where there is none."""
    left_out = LeftOut(title)
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                left_out.add(json.loads(line))
    return left_out
