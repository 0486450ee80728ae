"""Writes the manifest of a mixture, `<stores>/mixtures/<name>/manifest.{json,md,tex,bib}`, for citation in papers.

The files do not depend on the machine, its paths or the time, so the same raw files give the same manifest.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.source import NOT_STATED
from data_recipes.store.durable import write_text_atomically
from data_recipes.store.reader import Store

FOLDER = "mixtures"

_COLUMNS = ("Source", "Published", "Found", "Held out", "Left out", "Used", "Share", "Licence")
_EXPLANATION = (
    "Found: samples in the raw files, with the difference to the published number in parentheses. Left out: invalid "
    "records, samples with a held-out image, and samples with an image of an excluded dataset."
)


def write_manifest(mixture: Mixture, stores: Path) -> Path:
    """Write the manifest of a mixture and return its folder.

    `manifest.json` has the counts and fingerprints of every source, `manifest.md` and `manifest.tex` a table of them,
    and `manifest.bib` the citations of the table.

    Args:
        mixture: the mixture.
        stores: folder of the stores.
    """
    content = describe_mixture(mixture, stores)
    folder = stores / FOLDER / mixture.config.name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for name, data in (
        ("manifest.json", text),
        ("manifest.md", to_markdown(content)),
        ("manifest.tex", to_latex(content)),
        ("manifest.bib", to_bibtex(content)),
    ):
        write_text_atomically(folder / name, data)
    return folder


def describe_mixture(mixture: Mixture, stores: Path) -> dict[str, Any]:
    """Return the content of `manifest.json`."""
    excluded = [Store.open(stores / name) for name in sorted(mixture.config.exclude)]
    return {
        "name": mixture.config.name,
        "fingerprint": mixture.fingerprint,
        "seed": mixture.config.seed,
        "num_samples": mixture.num_samples,
        "sources": [
            {**_describe_store(mixture.store(row["source"])), **row, "share": round(row["share"], 6)}
            for row in mixture.table()
        ],
        "excluded_sets": [_describe_store(store) for store in excluded],
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """Format the manifest in Markdown."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (_COLUMNS, *_table_rows(content["sources"]))]
    align = ("left", *["right"] * 6, "left")
    lines = [f"# Training data: {content['name']}", "", _summarize(content, "`"), ""]
    lines.append(tabulate(rows, head, "pipe", disable_numparse=True, colalign=align))
    lines += ["", _EXPLANATION, ""]
    lines += [f"- {source['source']}: {_describe_details(source)}" for source in content["sources"]]
    lines += [
        f"- {store['source']} (excluded from training): {_describe_details(store)}"
        for store in content["excluded_sets"]
    ]
    return "\n".join(lines) + "\n"


def to_latex(content: Mapping[str, Any]) -> str:
    """Format the manifest as a LaTeX table, which needs no package; its citations are in `manifest.bib`."""
    lines = [
        "% Written by data_recipes.prepare. Cite with \\bibliography{manifest}.",
        "\\begin{table}",
        "\\centering",
        "\\begin{tabular}{lrrrrrrp{0.25\\linewidth}}",
        "\\hline",
        " & ".join(_COLUMNS) + " \\\\",
        "\\hline",
    ]
    for source, row in zip(content["sources"], _table_rows(content["sources"]), strict=True):
        cells = [_escape_latex(cell) for cell in row]
        cells[0] += f"~\\cite{{{_citation_key(source)}}}" if source["citation"] else ""
        lines.append(" & ".join(cells) + " \\\\")
    sentences = (f"Training data, mixture {content['name']}.", _summarize(content, ""), _EXPLANATION)
    caption = " ".join(map(_escape_latex, sentences))
    lines += ["\\hline", "\\end{tabular}", f"\\caption{{{caption}}}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def to_bibtex(content: Mapping[str, Any]) -> str:
    """Format one BibTeX entry per cited work, sorted by key."""
    entries: dict[str, str] = {}
    for source in [*content["sources"], *content["excluded_sets"]]:
        citation = source["citation"]
        if isinstance(citation, Mapping) and citation:
            values = {key: value for key, value in citation.items() if key not in ("key", "type")}
            kind = citation.get("type", "misc")
        elif citation:
            values, kind = {"note": citation}, "misc"
        else:
            continue
        body = "".join(f"  {key} = {{{_escape_bibtex(key, str(value))}}},\n" for key, value in values.items())
        entries[_citation_key(source)] = f"@{kind}{{{_citation_key(source)},\n{body}}}\n"
    return "\n".join(entries[key] for key in sorted(entries))


def format_counts(published: int | None, actual: int) -> tuple[str, str]:
    """Format two table cells, the published number and the actual number with its difference: `72,101 (-39)`."""
    if published is None:
        return NOT_STATED, f"{actual:,}"
    return f"{published:,}", f"{actual:,}" + (f" ({actual - published:+,})" if actual != published else "")


def _describe_store(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    keys = ("publisher", "licence", "citation", "num_records", "num_pictures", "repairs")
    return {
        "source": store.name,
        "fingerprint": store.fingerprint,
        **{key: manifest.get(key) for key in keys},
        "notes": manifest.get("notes", {}),  # stores prepared by earlier versions have none
    }


def _table_rows(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            source["source"],
            *format_counts(source["expected_count"], source["found"]),
            f"{source['held_out']:,}",
            f"{sum(source['rejects'].values()) + source['beside_heldout'] + source['excluded']:,}",
            f"{source['used']:,}",
            f"{source['share']:.1%}",
            " ".join((source["licence"] or NOT_STATED).split()),
        )
        for source in sources
    ]


def _summarize(content: Mapping[str, Any], quote: str) -> str:
    excluded = ", ".join(store["source"] for store in content["excluded_sets"])
    text = f"{content['num_samples']:,} samples, seed {content['seed']}, "
    text += f"fingerprint {quote}{content['fingerprint']}{quote}."
    return text + (f" They contain no image of {excluded}." if excluded else "")


def _describe_details(source: Mapping[str, Any]) -> str:
    """Format the attributes of a source that are not in the table."""
    parts = [source["publisher"] or f"publisher {NOT_STATED}", f"store {source['fingerprint'][:16]}"]
    parts.append(f"{source['num_records']:,} records, {source['num_pictures']:,} images")
    for title, counts in (("rejected", source.get("rejects")), ("repaired", source["repairs"])):
        if counts:
            parts.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items()))
    if source["notes"]:
        notes = (f"{name} {note['records']:,}" for name, note in source["notes"].items())
        parts.append(f"noted: {', '.join(notes)}")
    return "; ".join(parts)


def _citation_key(source: Mapping[str, Any]) -> str:
    citation = source["citation"]
    if isinstance(citation, Mapping) and citation.get("key"):
        return str(citation["key"])
    return re.sub(r"\W+", "_", source["source"])


def _escape_bibtex(key: str, value: str) -> str:
    """Escape a BibTeX value, except for braces and backslashes. URLs are unchanged; braces protect a title's case."""
    if key in ("url", "doi"):
        return value
    escaped = re.sub(r"(?<!\\)([&%$#_])", r"\\\1", value)
    return f"{{{escaped}}}" if key == "title" else escaped


def _escape_latex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
