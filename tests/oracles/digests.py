"""The form in which outputs are written to a fixture and compared: short digests, and a few complete outputs.

Used by the programs in authors/ and by the tests. Standard library only.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

IGNORE = -100
IMAGE = -200
"""The authors' id for an image: one position, which their model replaces by the image's features."""

BLOCK = 500
NUM_WHOLE = 20
NUM_WHOLE_SIZES = 300


def numbers_digest(values: Sequence[int]) -> str:
    """16 hex digits for a sequence of integers."""
    return hashlib.sha256(",".join(str(int(value)) for value in values).encode()).hexdigest()[:16]


def bytes_digest(data: bytes) -> str:
    """16 hex digits for bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def supervised_runs(labels: Sequence[int]) -> list[list[int]]:
    """Supervised positions as half-open ranges."""
    runs: list[list[int]] = []
    for position, label in enumerate(labels):
        if label != IGNORE:
            if runs and runs[-1][1] == position:
                runs[-1][1] = position + 1
            else:
                runs.append([position, position + 1])
    return runs


def size_line(
    size_hw: tuple[int, int], grid: tuple[int, int], kept_hw: tuple[int, int], first: int, num_tokens: int
) -> str:
    """The geometry of one image size. `first` is the merged map's first kept cell, counted row by row (-1: none)."""
    numbers = (*size_hw, *grid, *kept_hw, first, num_tokens)
    return " ".join(str(int(number)) for number in numbers)


def block_digests(lines: Sequence[str]) -> list[str]:
    """One digest for each BLOCK lines."""
    blocks = (lines[start : start + BLOCK] for start in range(0, len(lines), BLOCK))
    return [hashlib.sha256("\n".join(block).encode()).hexdigest()[:32] for block in blocks]


def whole_indices(lengths: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """The conversations that a fixture has completely: of every kind the shortest, then the next shortest."""
    rank: dict[str, int] = {}
    order = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        kind = kinds[index]
        order.append((rank.get(kind, 0), lengths[index], index))
        rank[kind] = rank.get(kind, 0) + 1
    return sorted(index for _, _, index in sorted(order)[:NUM_WHOLE])


def prompt_outputs(ids: list[list[int]], labels: list[list[int]], kinds: Sequence[str]) -> dict[str, Any]:
    """The entry of a fixture for ids and labels: one "ids labels" digest per conversation, and some complete ones."""
    whole = whole_indices([len(row) for row in ids], kinds)
    return {
        "digests": [f"{numbers_digest(i)} {numbers_digest(la)}" for i, la in zip(ids, labels, strict=True)],
        "whole": {str(n): {"ids": ids[n], "supervised": supervised_runs(labels[n])} for n in whole},
    }
