"""Describes a look at a raw folder and the trials of readers, as text and as YAML."""

from collections.abc import Sequence

import yaml
from tabulate import tabulate

from data_recipes.guess.candidates import Candidate
from data_recipes.guess.first_records import shorten
from data_recipes.guess.folder_look import FolderLook
from data_recipes.guess.trial import NUM_RECORDS, Trial
from data_recipes.raw.image_files import ImageInfo
from data_recipes.schema.sample import Sample

_MAX_LISTED = 6
_TEXT_WIDTH = 100


def describe_look(look: FolderLook) -> str:
    """Describe in one line what is in a folder."""
    kinds = {"tables": look.tables, "parquet files": look.parquet, "archives": look.archives, "Arrow files": look.arrow}
    parts = [f"folders {len(look.folders):,}", f"images {look.num_images:,}"]
    for kind, names in kinds.items():
        if names:
            parts.append(f"{kind} {len(names):,} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    more = "; there is more, which was not looked at" if look.is_cut else ""
    return f"{look.root}: {', '.join(parts)}{more}"


def describe_best(trial: Trial) -> str:
    """Describe the trial of the reader that fits: how much it keeps, why not the rest, and its first samples."""
    tried = f"{trial.num_kept} of the first {trial.num_records} records are kept"
    if trial.num_records < NUM_RECORDS:
        tried = f"{trial.num_kept} of {trial.num_records} records are kept"
    lines = [f"{describe_candidate(trial.candidate)}: {tried}"]
    if trial.first_reject is not None:
        lines.append(f"  rejected: {_describe_rejects(trial)}")
    for sample, images in trial.shown:
        lines += ["", *_describe_sample(sample, images)]
    return "\n".join(lines)


def describe_others(trials: Sequence[Trial]) -> str:
    """Describe in a table what the other readers make of the records, and name those of which no file is there."""
    rows, absent = [], []
    for trial in trials:
        if not trial.has_files:
            absent.append(trial.candidate.reader)
        else:
            kept = "not tried" if trial.error else f"{trial.num_kept} of {trial.num_records} kept"
            why = trial.error or _describe_rejects(trial)
            rows.append([trial.candidate.reader, shorten(trial.candidate.file, 40), kept, shorten(why, 120)])
    head = ["reader", "file", "records", "first rejected"]
    lines = [tabulate(rows, head, "simple", disable_numparse=True)] if rows else []
    if absent:
        lines.append(f"no files in the published layout of {', '.join(absent)}")
    return "\n".join(lines)


def describe_candidate(candidate: Candidate) -> str:
    """Return `reader: llava_json, options: {annotations: train.json}`."""
    options = format_options(candidate)
    return f"reader: {candidate.reader}" + (f", options: {options}" if options else "")


def describe_misfit(look: FolderLook) -> str:
    """Say what a folder without a fitting reader looks like, and what to do."""
    if (look.root / "manifest.json").is_file() and (look.root / "inputs.json").is_file():
        return "It is a prepared store: name its parent folder in data.store_root."
    if look.arrow and not (look.tables or look.parquet):
        return (
            "It was written by save_to_disk of the datasets library: write it as parquet, "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE), and look at that."
        )
    if look.num_images and not (look.tables or look.parquet):
        return (
            "It has images and no texts. If the folders are classes, decide what to ask and answer, and write "
            'metadata.jsonl with lines {"file_name": "cat/1.jpg", "text": "A cat."} for the reader imagefolder.'
        )
    return (
        "If its texts are in columns of other names, name them in `columns` of the source's options; for another "
        "layout, write a reader of your own (docs/data.md)."
    )


def format_options(candidate: Candidate) -> str:
    """Return the options as YAML in one line; empty if there are none."""
    if not candidate.options:
        return ""
    return str(yaml.safe_dump(dict(candidate.options), default_flow_style=True, sort_keys=False, width=10_000)).strip()


def format_source(trial: Trial, root: str) -> str:
    """Return the YAML of a source.

    Args:
        trial: the trial of its reader.
        root: the raw folder, as the source is to name it.
    """
    lines = [
        f"# Written by data_recipes.guess: {trial.num_kept} of {trial.num_records} records that were tried are kept.",
        f"reader: {trial.candidate.reader}",
        f"root: {yaml.safe_dump(root, width=10_000).splitlines()[0]}",
    ]
    options = format_options(trial.candidate)
    return "\n".join([*lines, *([f"options: {options}"] if options else [])]) + "\n"


def format_mixture(name: str, source: str) -> str:
    """Return the YAML of a mixture of one source."""
    values = {"name": name, "seed": 0, "sources": {source: {"count": None, "holdout": 0}}}
    note = "# holdout: samples that are set aside for the evaluation\n"
    return note + str(yaml.safe_dump(values, sort_keys=False))


def _describe_rejects(trial: Trial) -> str:
    if trial.first_reject is None:
        return "there are no records" if trial.num_records == 0 else ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in trial.rejects.most_common())
    reject = trial.first_reject
    return f"{reasons}; {reject.location or reject.id}: {shorten(reject.detail, 160)}"


def _describe_sample(sample: Sample, images: Sequence[ImageInfo]) -> list[str]:
    sizes = ", ".join(f"{image.width} x {image.height} {image.format}" for image in images)
    shown = f"images {sizes} (width x height)" if images else "no image"
    lines = [f"{shorten(sample.location or sample.id, 80)}: {shown}"]
    for message in sample.messages[:_MAX_LISTED]:
        lines.append(f"  {message.role:9}  {shorten(message.text, _TEXT_WIDTH)}")
    if len(sample.messages) > _MAX_LISTED:
        lines.append(f"  and {len(sample.messages) - _MAX_LISTED} more turns")
    return lines
