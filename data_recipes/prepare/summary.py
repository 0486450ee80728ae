"""Prints the tables of sources, mixtures, rejected records and notes at the end of `prepare`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from data_recipes.mixture.mixture import Mixture
from data_recipes.prepare.manifest import format_counts
from data_recipes.schema.source import NOT_STATED, SourceInfo
from data_recipes.store.reader import read_manifest


def print_sources(sources: Sequence[SourceInfo], stores: Path) -> None:
    """Print the counts and licence of each source, then its rejected records."""
    rows = []
    for source in sources:
        manifest = read_manifest(stores / source.name) or {}
        rows.append(
            [
                source.name,
                *format_counts(source.expected_count, manifest["num_samples"]),
                f"{sum(manifest['rejects'].values()):,}",
                _shorten(source.licence),
            ]
        )
    print(text_table(["source", "published", "found", "rejected", "licence"], rows))
    print_rejects([source.name for source in sources], stores)
    print_notes([source.name for source in sources], stores)


def print_mixture(mixture: Mixture, stores: Path) -> None:
    """Print the counts and share of each source of a mixture, its fingerprint, and the rejected records."""
    rows = [
        [
            row["source"],
            "all" if row["wanted"] is None else f"{row['wanted']:,}",
            *format_counts(row["expected_count"], row["found"]),
            f"{sum(row['rejects'].values()):,}",
            f"{row['held_out']:,}",
            f"{row['beside_heldout']:,}",
            f"{row['excluded']:,}",
            f"{row['used']:,}",
            f"{row['share']:.1%}",
            _shorten(row["licence"]),
        ]
        for row in mixture.table()
    ]
    head = ["source", "count", "published", "found", "rejected", "held out", "shared", "excluded", "used", "share"]
    print(text_table([*head, "licence"], rows))
    if any(row["expected_count"] not in (None, row["found"]) for row in mixture.table()):
        print("found: the number in parentheses is the difference to the published number; check the release.")
    if any(row["beside_heldout"] or row["excluded"] for row in mixture.table()):
        print("shared: has a held-out image; excluded: has an image of a store in `exclude`.")
    print(f"{mixture.config.name}: {mixture.num_samples:,} samples, fingerprint {mixture.fingerprint}")
    print_rejects([*mixture.source_names, *mixture.config.exclude], stores)
    print_notes(mixture.source_names, stores)


def print_rejects(names: Sequence[str], stores: Path) -> None:
    """Print the number of rejected records per source and reason, with the first of them."""
    rows = []
    for name in names:
        manifest = read_manifest(stores / name) or {}
        firsts = _find_first_rejects(stores / name / "quarantine.jsonl", set(manifest["rejects"]))
        for reason, count in manifest["rejects"].items():
            first = firsts.get(reason, {})
            example = f"{first.get('place') or first.get('id')}: {first.get('detail')}"
            rows.append([name, reason, f"{count:,}", f"{count / manifest['num_records']:.2%}", _shorten(example, 60)])
    if rows:
        print(text_table(["rejected in", "reason", "records", "share", "first record"], rows))
        print(f"All rejected records are listed in {stores}/SOURCE/quarantine.jsonl.")


def print_notes(names: Sequence[str], stores: Path) -> None:
    """Print what the records of each source hold and the samples do not, such as unknown keys, with an example."""
    rows = []
    for name in names:
        notes = (read_manifest(stores / name) or {}).get("notes", {})
        rows += [[name, note, f"{each['records']:,}", _shorten(each["example"], 60)] for note, each in notes.items()]
    if rows:
        print(text_table(["noted in", "note", "records", "example"], rows))
        print("unknown_key: the key is not used. `columns` in the source's options names keys that are to be used.")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with left-aligned columns."""
    return tabulate(rows, head, "simple", disable_numparse=True)


def _find_first_rejects(quarantine: Path, reasons: set[str]) -> dict[str, dict[str, Any]]:
    firsts: dict[str, dict[str, Any]] = {}
    with quarantine.open(encoding="utf-8") as stream:
        for line in stream:
            if len(firsts) == len(reasons):
                break
            reject = json.loads(line)
            firsts.setdefault(reject["reason"], reject)
    return firsts


def _shorten(text: str, limit: int = 40) -> str:
    """Shorten a text for a table; the manifest has the complete text."""
    text = " ".join(text.split()) or NOT_STATED
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
