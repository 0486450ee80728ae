"""Determines which stores or slices must be prepared.

Existing stores and slices are compared with the configuration and the raw files by digest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_recipes.prepare.disk_space import SpaceNeed, estimate_space
from data_recipes.prepare.shared_files import group_by_file, read_group
from data_recipes.prepare.slices import count_slice_bytes, read_slices, remove_slices, slice_path, slices_folder
from data_recipes.schema.source import MissingRawFolderError, RawState, SourceInfo, scan_raw_folder
from data_recipes.store.reader import read_manifest
from data_recipes.writing.sample_stream import WHOLE_SOURCE, Slice
from data_recipes.writing.writer import read_inputs, refresh_description


@dataclass(frozen=True)
class WorkItem:
    """A store or slice that must be prepared.

    Attributes:
        source: the source.
        name: name in messages.
        path: folder of the store or slice.
        inputs: digests of its configuration and raw files.
        need: disk space for merging slices; None if it must be estimated from the raw files.
    """

    source: SourceInfo
    name: str
    path: Path
    inputs: dict[str, str]
    need: SpaceNeed | None = None


def plan_work(
    sources: Sequence[SourceInfo], raw: Path, stores: Path, part: Slice = WHOLE_SOURCE, num_slices: int | None = None
) -> list[list[WorkItem]]:
    """List the stores or slices to prepare, in groups that are read from one raw file; print those that are up to date.

    Args:
        sources: the sources.
        raw: folder that contains the raw folders.
        stores: folder of the stores.
        part: the slice to prepare.
        num_slices: number of slices to merge; None to read raw files instead.

    Raises:
        MissingRawFolderError: raw folders do not exist. All of them are reported together.
        DataError: a reader, option or slice does not exist.
    """
    _scan_cached.cache_clear()
    work, missing = {}, []
    for source in sources:
        try:
            if part != WHOLE_SOURCE:
                item = _plan_slice(source, raw, stores, part)
            elif num_slices is not None:
                item = _plan_merge(source, stores, num_slices)
            else:
                item = _plan_store(source, raw, stores)
        except MissingRawFolderError:
            missing.append(source)
            continue
        if item is not None:
            work[source.name] = item
    if missing:
        raise MissingRawFolderError(missing, raw)  # together, because downloads take long
    if num_slices is not None:
        return [[item] for item in work.values()]
    groups = group_by_file([source for source in sources if source.name in work])
    return [[work[source.name] for source in group] for group in groups]


def estimate_group_space(raw: Path, stores: Path, part: Slice, group: Sequence[WorkItem]) -> list[SpaceNeed]:
    """Estimate the disk space of each store or slice of a group. Runs in a worker process."""
    known = [work.need for work in group if work.need is not None]
    if known:
        return known
    folder = group[0].source.raw_folder(raw)
    records = read_group([work.source for work in group], raw)
    names = {work.source.name: work.name for work in group}
    return estimate_space(names, records, lambda: scan_raw_folder(folder, stores).num_bytes, part)


def report_up_to_date(work: WorkItem) -> None:
    """Print that a store is up to date, and update the source's description in its manifest."""
    refresh_description(work.path, work.source)
    print(f"{work.name}: already prepared, {(read_manifest(work.path) or {})['num_samples']:,} samples")


def _plan_store(source: SourceInfo, raw: Path, stores: Path) -> WorkItem | None:
    """Return the work for a store, or None if it is up to date."""
    path, recipe = stores / source.name, source.recipe_digest()
    stored = read_inputs(path)
    if stored.get("recipe") == recipe and not (raw / source.root).is_dir():
        refresh_description(path, source)
        print(f"{source.name}: already prepared (the raw folder was removed; the store is kept)")
        return None
    source.samples(raw)  # checks reader, options and folder without reading records
    inputs = {"recipe": recipe, "raw": _scan_cached(source.raw_folder(raw), stores).digest}
    return _skip_if_current(WorkItem(source, source.name, path, inputs), stored == inputs)


def _plan_slice(source: SourceInfo, raw: Path, stores: Path, part: Slice) -> WorkItem | None:
    """Return the work for a slice, or None if it is up to date.

    Only the first slice scans the raw folder, so that array jobs do not scan it repeatedly. Every slice has a digest of
    all records, which are compared when merging.
    """
    path, recipe = slice_path(stores / source.name, part), source.recipe_digest()
    inputs = {"recipe": recipe}
    if read_inputs(path).get("recipe") == recipe:
        return _skip_if_current(WorkItem(source, f"{source.name} {part}", path, inputs), True)
    source.samples(raw)
    if part.number == 1:
        inputs["raw"] = _scan_cached(source.raw_folder(raw), stores).digest
    return WorkItem(source, f"{source.name} {part}", path, inputs)


def _plan_merge(source: SourceInfo, stores: Path, num_slices: int) -> WorkItem | None:
    """Return the work for merging slices, or None if the store is up to date."""
    path, recipe = stores / source.name, source.recipe_digest()
    stored = read_inputs(path)
    if stored.get("recipe") == recipe and not slices_folder(path).exists():
        return _skip_if_current(WorkItem(source, source.name, path, stored), True)
    folders = read_slices(path, num_slices, recipe)
    inputs = read_inputs(folders[0])
    if stored == inputs:
        remove_slices(path)  # an interrupted run has merged them
        return _skip_if_current(WorkItem(source, source.name, path, inputs), True)
    num_records = sum((read_manifest(folder) or {})["num_records"] for folder in folders)
    return WorkItem(source, source.name, path, inputs, SpaceNeed(source.name, num_records, count_slice_bytes(folders)))


def _skip_if_current(work: WorkItem, is_current: bool) -> WorkItem | None:
    if is_current:
        report_up_to_date(work)
        return None
    return work


@cache
def _scan_cached(folder: Path, stores: Path) -> RawState:
    """Scan each raw folder once, because the components of a merged file share it."""
    return scan_raw_folder(folder, stores)
