"""Describes a plan as text: what is fetched, how much, under which licence, and what a person has to do."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from data_recipes.fetch.fetch_plan import ByHand, Item, Plan
from data_recipes.fetch.remote_file import RemoteFile
from data_recipes.fetch.transfer import count_bytes_to_fetch, has_published_size
from data_recipes.schema.sample import DataError
from data_recipes.writing.progress import format_bytes

_MAX_NAMED = 4


def describe_plan(plan: Plan, raw: Path) -> str:
    """Describe everything that is fetched and everything that is not, and the space that it takes."""
    lines = [line for item in plan.items for line in _describe_item(item, raw)]
    if plan.by_hand:
        lines += ["to be fetched by hand:", *(line for entry in plan.by_hand for line in _describe_by_hand(entry))]
    if plan.undescribed:
        lines.append("sources without `download` in their YAML, which are not fetched:")
        lines += [f"  {source.name}: {source.fetch or 'not stated'}" for source in plan.undescribed]
    if plan.problems:
        lines += ["cannot be fetched:", *(f"  {error}" for error in plan.problems)]
    return "\n".join([*lines, *_describe_space(plan, raw)])


def describe_missing(plan: Plan) -> str:
    """Say in one line for each page which files a person must still fetch; empty if all are there."""
    missing = [entry for entry in plan.by_hand if entry.missing]
    if not missing:
        return ""
    lines = [
        f"  {entry.item.title} ({entry.why}): put {_list_names(entry.missing, entry.item.folder)} into "
        f"{entry.item.folder}"
        for entry in missing
    ]
    return "\n".join(["these files must be fetched by hand:", *lines])


def check_space(plan: Plan, raw: Path) -> None:
    """Raise DataError if the files that are not there yet do not fit on the disk of `raw`."""
    needed, _ = count_bytes_to_fetch(plan.files, raw)
    free = _free_bytes(raw)
    if needed > free:
        raise DataError(
            f"--raw {raw}: {format_bytes(needed)} are to be fetched, but only {format_bytes(free)} are free; free "
            "space, or name a folder on another disk."
        )


def _describe_item(item: Item, raw: Path) -> list[str]:
    num_present = sum(has_published_size(file, raw) for file in item.files)
    count = f"{len(item.files)} file{'s' if len(item.files) != 1 else ''}"
    present = f", {num_present if num_present < len(item.files) else 'all'} there" if num_present else ""
    lines = [
        f"{item.title}: {count}, {_format_size(item.files)}{present}, into {item.folder}",
        f"  for {_list_sources(item.sources)}; licence: {item.licence}",
    ]
    if item.refusal:
        lines.append(f"  {item.refusal}")
    elif item.terms:
        lines.append(f"  its terms must be accepted: {item.terms}")
    return lines


def _describe_by_hand(entry: ByHand) -> list[str]:
    item = entry.item
    names = _list_names(entry.files, item.folder)
    state = "all there" if not entry.missing else f"missing: {_list_names(entry.missing, item.folder)}"
    size = "" if entry.num_bytes is None else f", {format_bytes(entry.num_bytes)}"
    return [
        f"  {item.title} ({entry.why}): {names}{size}, into {item.folder} ({state})",
        f"    for {_list_sources(item.sources)}; licence: {item.licence}",
    ]


def _describe_space(plan: Plan, raw: Path) -> list[str]:
    files = [file for item in plan.items for file in item.files]
    by_hand = sum(entry.num_bytes or 0 for entry in plan.by_hand)
    to_fetch, num_unknown = count_bytes_to_fetch(plan.files, raw)
    total = sum(file.size or 0 for file in {file.name: file for file in files}.values())
    unknown = f" and {num_unknown} of unknown size" if num_unknown else ""
    hand = f", and {format_bytes(by_hand)} by hand" if by_hand else ""
    return [
        f"total: {format_bytes(total)}{hand}; to fetch: {format_bytes(to_fetch)}{unknown}; free: "
        f"{format_bytes(_free_bytes(raw))}",
        f"archives are read as they are, without unpacking; stores copy the images of their samples and take up to "
        f"{format_bytes(total + by_hand)} more",
    ]


def _format_size(files: Sequence[RemoteFile]) -> str:
    known = format_bytes(sum(file.size or 0 for file in files))
    num_unknown = sum(file.size is None for file in files)
    return known if not num_unknown else "of unknown size" if num_unknown == len(files) else f"more than {known}"


def _list_sources(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _list_names(paths: Sequence[Path], folder: Path) -> str:
    return ", ".join(path.relative_to(folder).as_posix() for path in paths)


def _free_bytes(folder: Path) -> int:
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(nearest).free
