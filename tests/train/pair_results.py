"""The table of pairs in docs/backbones.md, made of what test_shipped_backbones.py saw.

pytest -m full tests/train/test_shipped_backbones.py --record-pairs docs/pairs.json
python -m tests.train.pair_results        prints the table, to be pasted into the page
"""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

RECORDS = Path(__file__).resolve().parents[2] / "docs" / "pairs.json"
_HEAD = (
    "language model", "vision tower", "tokenizer", "template", "ZeRO of stages 1, 2", "recomputed", "packed and alone",
    "export", "stock logits", "answers",
)  # fmt: skip


def record(file: Path, pair: dict[str, Any]) -> None:
    """Adds a pair to the file, in place of an earlier one with the same models."""
    pairs = json.loads(file.read_text()) if file.is_file() else []
    pairs = [each for each in pairs if _models(each) != _models(pair)]
    file.write_text(json.dumps(sorted([*pairs, pair], key=_models), indent=2) + "\n")


def _models(pair: dict[str, Any]) -> tuple[str, str]:
    return pair["language_model"], pair["vision_tower"]


def format_table(pairs: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    rows = [
        (
            f"`{pair['language_model']}`",
            f"`{pair['vision_tower']}`",
            pair["tokenizer"],
            pair["template"],
            ", ".join(map(str, pair["zero_stages"])),
            ", ".join(part.replace("_", " ") for part in pair["recompute"]) or "-",
            _format_difference(pair["packed_difference"]),
            pair["exported_as"],
            "refused" if pair["logits_difference"] is None else _format_difference(pair["logits_difference"]),
            pair["answers"],
        )
        for pair in pairs
    ]
    return tabulate(rows, _HEAD, "github", disable_numparse=True)


def _format_difference(value: float) -> str:
    return f"{value:.0e}" if value else "equal"


if __name__ == "__main__":
    print(format_table(json.loads(RECORDS.read_text())))
