"""Explains why every record of a source was rejected: its first record, and the reader that would fit it."""

from pathlib import Path

from data_recipes.guess.description import describe_candidate
from data_recipes.guess.first_records import describe_record, read_first_records
from data_recipes.guess.folder_look import look_at
from data_recipes.guess.trial import best_of, try_readers
from data_recipes.raw.parquet_records import find_shards
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import SourceInfo


def explain_rejected(source: SourceInfo, folder: Path) -> tuple[list[str], bool]:
    """Return what a user may want to know about a source of which every record was rejected.

    Args:
        source: the source.
        folder: its raw folder, which may have been removed.

    Returns:
        (up to two indented lines of a message: the first record, and the reader and options that fit it; whether such a
        reader was found). Nothing is said about a component of a merged file, of which the reader is right.
    """
    if "components" in source.options:
        return [], False
    try:
        look = look_at(folder)
    except OSError:
        return [], False
    lines = []
    file = _find_file(source, folder)
    if file is not None:
        records = read_first_records(file)
        lines += [f"  the first record: {describe_record(records[0])}"] if records else []
        look.keep_only(file.relative_to(folder).as_posix())
    best = best_of(try_readers(look, published=file is None))
    if best is None:
        lines.append(f"  no reader fits it; why: python -m data_recipes.guess {file or folder}")
        return lines, False
    candidate = best.candidate
    if candidate.reader == source.reader and candidate.options.items() <= source.options.items():
        return lines, False  # the records after the first ones are the trouble
    return [*lines, f"  it looks like {describe_candidate(candidate)}"], True


def _find_file(source: SourceInfo, folder: Path) -> Path | None:
    """The file of records, or its first shard, that the options of a source name; None if they name none."""
    for option in ("annotations", "metadata"):
        path = folder / str(source.options.get(option, ""))
        if option in source.options and path.is_file():
            return path
    try:
        return find_shards(folder, str(source.options["shards"]))[0] if "shards" in source.options else None
    except (DataError, ValueError, NotImplementedError):
        return None
