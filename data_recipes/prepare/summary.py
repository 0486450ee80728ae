"""What `prepare` prints at its end: a table of sources, and one of what was left out.

Owns: those tables' columns and form.
Leaves: the numbers to the stores' manifests and `mixture.py`, what a paper wants of them to `manifest.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_recipes.mixture.mixture import Mixture
from data_recipes.prepare.manifest import published_and_found
from data_recipes.schema.source import NOT_STATED, SourceInfo
from data_recipes.store.reader import read_manifest


def print_sources(sources: Sequence[SourceInfo], stores: Path) -> None:
    """One line per source: published, found, left out, licence; then what was left out."""
    rows = []
    for source in sources:
        manifest = read_manifest(stores / source.name) or {}
        rows.append(
            [
                source.name,
                *published_and_found(source.expected_count, manifest["num_samples"]),
                f"{sum(manifest['rejects'].values()):,}",
                _short(source.licence),
            ]
        )
    print(text_table(["source", "published", "found", "left out", "licence"], rows))
    print_rejects([source.name for source in sources], stores)


def print_mixture(mixture: Mixture, stores: Path) -> None:
    """One line per source with its share of the mixture, the fingerprint, and what was left out."""
    rows = [
        [
            row["source"],
            "all" if row["wanted"] is None else f"{row['wanted']:,}",
            *published_and_found(row["expected_count"], row["found"]),
            f"{sum(row['rejects'].values()):,}",
            f"{row['held_out']:,}",
            f"{row['beside_heldout']:,}",
            f"{row['excluded']:,}",
            f"{row['used']:,}",
            f"{row['share']:.1%}",
            _short(row["licence"]),
        ]
        for row in mixture.table()
    ]
    head = ["source", "wanted", "published", "found", "left out", "held out", "beside", "excluded", "used", "share"]
    print(text_table([*head, "licence"], rows))
    if any(row["expected_count"] not in (None, row["found"]) for row in mixture.table()):
        print("found (+ or -): so many more or fewer samples than were published; is it the same release?")
    if any(row["beside_heldout"] or row["excluded"] for row in mixture.table()):
        print("beside: shows a held-out picture; excluded: shows a picture of a store in `exclude`.")
    print(f"{mixture.config.name}: {mixture.num_samples:,} samples, fingerprint {mixture.fingerprint}")
    print_rejects([*mixture.source_names, *mixture.config.exclude], stores)


def print_rejects(names: Sequence[str], stores: Path) -> None:
    """One line per source and reason: how many records were left out, and where the first of them is."""
    rows = []
    for name in names:
        manifest = read_manifest(stores / name) or {}
        firsts = _first_of_each(stores / name / "quarantine.jsonl", set(manifest["rejects"]))
        for reason, count in manifest["rejects"].items():
            first = firsts.get(reason, {})
            where = f"{first.get('place') or first.get('id')}: {first.get('detail')}"
            rows.append([name, reason, f"{count:,}", f"{count / manifest['num_records']:.2%}", _short(where, 60)])
    if rows:
        print(text_table(["left out of", "reason", "records", "share", "the first of them"], rows))
        print(f"Each is listed in {stores}/SOURCE/quarantine.jsonl.")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


def _first_of_each(quarantine: Path, reasons: set[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with quarantine.open(encoding="utf-8") as stream:
        for line in stream:
            if len(found) == len(reasons):
                break
            reject = json.loads(line)
            found.setdefault(reject["reason"], reject)
    return found


def _short(text: str, limit: int = 40) -> str:
    """What fits into a table; the whole is in the manifest."""
    text = " ".join(text.split()) or NOT_STATED
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
