"""Which stores or slices must be made, and what they will take; the others stand.

Owns: comparing what lies there with what is asked for, one line about each that stands.
Leaves: making them to `writing/` and `slices.py`, what a source is made from to `source.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_recipes.prepare.disk_space import Need, survey
from data_recipes.prepare.shared_files import group_by_file, read_together
from data_recipes.prepare.slices import num_slice_bytes, read_slices, remove_slices, slice_path, slices_folder
from data_recipes.schema.source import NoRawFolder, RawState, SourceInfo, raw_state
from data_recipes.store.reader import read_manifest
from data_recipes.writing.sample_stream import WHOLE, Slice
from data_recipes.writing.writer import read_inputs, refresh_description


@dataclass(frozen=True)
class Work:
    """A store or slice that must be made.

    Attributes:
        name: what is printed.
        inputs: digests of what it is made from.
        need: what merging slices takes; None where the raw files have yet to be surveyed.
    """

    source: SourceInfo
    name: str
    path: Path
    inputs: dict[str, str]
    need: Need | None = None


def find_work(
    sources: Sequence[SourceInfo], raw: Path, stores: Path, part: Slice = WHOLE, merge: int | None = None
) -> list[list[Work]]:
    """What must be made, in groups that are read from one raw file; a line is printed for what stands.

    Args:
        raw: the folder that holds the raw folders.
        stores: where the stores go.
        part: the slice to make.
        merge: how many slices to merge instead.

    Raises:
        NoRawFolder: all raw folders that are not there.
        DataError: a reader, an option or a slice that is not there.
    """
    _state_of.cache_clear()
    work, to_fetch = {}, []
    for source in sources:
        try:
            if part != WHOLE:
                found = _one_slice(source, raw, stores, part)
            elif merge is not None:
                found = _merged(source, stores, merge)
            else:
                found = _whole(source, raw, stores)
        except NoRawFolder:
            to_fetch.append(source)
            continue
        if found is not None:
            work[source.name] = found
    if to_fetch:
        raise NoRawFolder(to_fetch, raw)  # all at once: each may take a day to fetch
    if merge is not None:
        return [[item] for item in work.values()]
    groups = group_by_file([source for source in sources if source.name in work])
    return [[work[source.name] for source in group] for group in groups]


def survey_work(raw: Path, stores: Path, part: Slice, group: Sequence[Work]) -> list[Need]:
    """What each store or slice of a group will take; runs in a process of the pool."""
    known = [work.need for work in group if work.need is not None]
    if known:
        return known
    folder = group[0].source.raw_folder(raw)
    records = read_together([work.source for work in group], raw)
    names = {work.source.name: work.name for work in group}
    return survey(names, records, lambda: raw_state(folder, stores).num_bytes, part)


def report_up_to_date(work: Work) -> None:
    """One line, and the description of the source as its YAML has it now."""
    refresh_description(work.path, work.source)
    print(f"{work.name}: already prepared, {(read_manifest(work.path) or {})['num_samples']:,} samples")


def _whole(source: SourceInfo, raw: Path, stores: Path) -> Work | None:
    """What must be made of a source; None, and one line, if it stands."""
    path, recipe = stores / source.name, source.recipe_digest()
    kept = read_inputs(path)
    if kept.get("recipe") == recipe and not (raw / source.root).is_dir():
        refresh_description(path, source)
        print(f"{source.name}: already prepared (its raw folder is gone, its store is kept)")
        return None
    source.samples(raw)  # a generator: nothing is read yet, but reader, options and folder are checked
    inputs = {"recipe": recipe, "raw": _state_of(source.raw_folder(raw), stores).digest}
    return _unless_it_stands(Work(source, source.name, path, inputs), kept == inputs)


def _one_slice(source: SourceInfo, raw: Path, stores: Path, part: Slice) -> Work | None:
    """The same for a slice, which stands if its YAML has not changed: 32 jobs need not look at every file 32 times.

    The first slice looks, for the merged store; and each has a digest of all records, which merging compares.
    """
    path, recipe = slice_path(stores / source.name, part), source.recipe_digest()
    inputs = {"recipe": recipe}
    if read_inputs(path).get("recipe") == recipe:
        return _unless_it_stands(Work(source, f"{source.name} {part}", path, inputs), True)
    source.samples(raw)
    if part.number == 1:
        inputs["raw"] = _state_of(source.raw_folder(raw), stores).digest
    return Work(source, f"{source.name} {part}", path, inputs)


def _merged(source: SourceInfo, stores: Path, num_slices: int) -> Work | None:
    """The same for a store whose slices are there."""
    path, recipe = stores / source.name, source.recipe_digest()
    kept = read_inputs(path)
    if kept.get("recipe") == recipe and not slices_folder(path).exists():
        return _unless_it_stands(Work(source, source.name, path, kept), True)
    folders = read_slices(path, num_slices, recipe)
    inputs = read_inputs(folders[0])
    if kept == inputs:
        remove_slices(path)  # an earlier start had merged them
        return _unless_it_stands(Work(source, source.name, path, inputs), True)
    num_records = sum((read_manifest(folder) or {})["num_records"] for folder in folders)
    return Work(source, source.name, path, inputs, Need(source.name, num_records, num_slice_bytes(folders)))


def _unless_it_stands(work: Work, stands: bool) -> Work | None:
    if stands:
        report_up_to_date(work)
        return None
    return work


@cache
def _state_of(folder: Path, stores: Path) -> RawState:
    """Sources that are parts of one file have one raw folder: it is looked at once."""
    return raw_state(folder, stores)
