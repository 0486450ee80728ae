"""What a mixture is, to be cited: `manifest.json` with its fingerprint, and a paper's data section.

Owns: `<stores>/mixtures/<name>/manifest.{json,md,tex,bib}`.
Leaves: the numbers to `mixture.py`, what is printed on the terminal to `summary.py`.

Nothing in these files depends on the machine, its paths or the time: the same raw files give the same four files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.source import NOT_STATED
from data_recipes.store.reader import Store

FOLDER = "mixtures"

_COLUMNS = ("Source", "Published", "Found", "Held out", "Left out", "Used", "Share", "Licence")
_EXPLANATION = (
    "Found: samples of the raw files, in brackets how many more or fewer than were published. Left out: unusable "
    "records of the source, samples that show a held-out picture, and samples that show a picture of an excluded set."
)


def write_manifest(mixture: Mixture, stores: Path) -> Path:
    """Write the four files; returns their folder.

    `manifest.json` has the counts and fingerprints of every source, `manifest.md` and `manifest.tex` the same as a
    table (the latter wants no package), `manifest.bib` the citations that the table's keys name.
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
        scratch = folder / f".{name}.new"
        scratch.write_text(data, encoding="utf-8")
        scratch.replace(folder / name)
    return folder


def describe_mixture(mixture: Mixture, stores: Path) -> dict[str, Any]:
    """What `manifest.json` holds."""
    excluded = [Store.open(stores / name) for name in sorted(mixture.config.exclude)]
    return {
        "name": mixture.config.name,
        "fingerprint": mixture.fingerprint,
        "seed": mixture.config.seed,
        "num_samples": mixture.num_samples,
        "sources": [
            {**_about(mixture.store(row["source"])), **row, "share": round(row["share"], 6)} for row in mixture.table()
        ],
        "excluded_sets": [_about(store) for store in excluded],
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """The data section in Markdown."""
    rows = [_COLUMNS, ("---", *["---:"] * 6, "---"), *_rows(content["sources"])]
    lines = [f"# Training data: {content['name']}", "", _sentence(content, "`"), ""]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", _EXPLANATION, ""]
    lines += [f"- {source['source']}: {_note(source)}" for source in content["sources"]]
    lines += [f"- {store['source']} (excluded from training): {_note(store)}" for store in content["excluded_sets"]]
    return "\n".join(lines) + "\n"


def to_latex(content: Mapping[str, Any]) -> str:
    """The data section as a LaTeX table; it needs no package, and `manifest.bib` for its citations."""
    lines = [
        "% Written by data_recipes.prepare. \\bibliography{manifest} has the citations.",
        "\\begin{table}",
        "\\centering",
        "\\begin{tabular}{lrrrrrrp{0.25\\linewidth}}",
        "\\hline",
        " & ".join(_COLUMNS) + " \\\\",
        "\\hline",
    ]
    for source, row in zip(content["sources"], _rows(content["sources"]), strict=True):
        cells = [_tex(cell) for cell in row]
        cells[0] += f"~\\cite{{{_key(source)}}}" if source["citation"] else ""
        lines.append(" & ".join(cells) + " \\\\")
    caption = f"Training data, mixture {_tex(content['name'])}. {_tex(_sentence(content, ''))} {_tex(_EXPLANATION)}"
    lines += ["\\hline", "\\end{tabular}", f"\\caption{{{caption}}}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def to_bibtex(content: Mapping[str, Any]) -> str:
    """One entry per cited work, in the order of their keys."""
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
        body = "".join(f"  {key} = {{{_bib(key, str(value))}}},\n" for key, value in values.items())
        entries[_key(source)] = f"@{kind}{{{_key(source)},\n{body}}}\n"
    return "\n".join(entries[key] for key in sorted(entries))


def published_and_found(published: int | None, found: int) -> tuple[str, str]:
    """Two cells of a table; the second tells the difference: `72,101 (-39)`."""
    if published is None:
        return NOT_STATED, f"{found:,}"
    return f"{published:,}", f"{found:,}" + (f" ({found - published:+,})" if found != published else "")


def _about(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    kept = ("publisher", "licence", "citation", "num_records", "num_pictures", "repairs")
    return {
        "source": store.name,
        "fingerprint": store.fingerprint,
        **{key: manifest.get(key) for key in kept},
    }


def _rows(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            source["source"],
            *published_and_found(source["expected_count"], source["found"]),
            f"{source['held_out']:,}",
            f"{sum(source['rejects'].values()) + source['beside_heldout'] + source['excluded']:,}",
            f"{source['used']:,}",
            f"{source['share']:.1%}",
            " ".join((source["licence"] or NOT_STATED).split()),
        )
        for source in sources
    ]


def _sentence(content: Mapping[str, Any], quote: str) -> str:
    excluded = ", ".join(store["source"] for store in content["excluded_sets"])
    text = f"{content['num_samples']:,} samples, seed {content['seed']}, "
    text += f"fingerprint {quote}{content['fingerprint']}{quote}."
    return text + (f" No picture of {excluded} is among them." if excluded else "")


def _note(source: Mapping[str, Any]) -> str:
    """Everything about a source that the table has no room for."""
    parts = [source["publisher"] or f"publisher {NOT_STATED}", f"store {source['fingerprint'][:16]}"]
    parts.append(f"{source['num_records']:,} records, {source['num_pictures']:,} pictures")
    for title, counts in (("left out", source.get("rejects")), ("repaired", source["repairs"])):
        if counts:
            parts.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items()))
    return "; ".join(parts)


def _key(source: Mapping[str, Any]) -> str:
    citation = source["citation"]
    if isinstance(citation, Mapping) and citation.get("key"):
        return str(citation["key"])
    return re.sub(r"\W+", "_", source["source"])


def _bib(key: str, value: str) -> str:
    """A BibTeX value: braces and backslashes in it are meant, addresses stay as they are, and a title its capitals."""
    if key in ("url", "doi"):
        return value
    escaped = re.sub(r"(?<!\\)([&%$#_])", r"\\\1", value)
    return f"{{{escaped}}}" if key == "title" else escaped


def _tex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
