"""Sources that are parts of one raw file: the file is read once for all of them.

Owns: which sources go together, their common stream.
Leaves: telling the parts apart to the reader (`samples_by_component`), filling their stores to `writing/`.

mix665k is ten sources and one gigabyte of JSON. Read for each of them, and once more to measure the room, it takes four
minutes of a core, in each of a cluster's jobs too; read for all at once, one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.schema.sample import DataError
from data_recipes.schema.source import SourceInfo, find_reader
from data_recipes.writing.sample_stream import Named

FUNCTION = "samples_by_component"


def group_by_file(sources: Sequence[SourceInfo]) -> list[list[SourceInfo]]:
    """The sources in groups, each of one raw file, in the order of their first ones; most stand alone.

    Together go sources with the same reader, raw folder and options but for another `component`, if the reader has
    a function `samples_by_component`.
    """
    groups: list[list[SourceInfo]] = []
    for source in sources:
        group = next((group for group in groups if _is_of_one_file(group, source)), None)
        if group is None:
            groups.append([source])
        else:
            group.append(source)
    return groups


def read_together(group: Sequence[SourceInfo], raw_root: Path) -> Iterator[Named]:
    """The records of a group, each with the name of its source; None where it is every source's.

    Raises:
        DataError: as `SourceInfo.samples`.
    """
    first = group[0]
    if len(group) == 1:
        yield from ((None, record) for record in first.samples(raw_root))
        return
    names = {source.options["component"]: source.name for source in group}
    reader = find_reader(first.name, first.reader, FUNCTION)
    for component, record in reader(first.raw_folder(raw_root), list(names), **_shared_options(first)):
        yield None if component is None else names[component], record


def _is_of_one_file(group: Sequence[SourceInfo], source: SourceInfo) -> bool:
    first, component = group[0], source.options.get("component")
    if not isinstance(component, str) or component in [other.options.get("component") for other in group]:
        return False
    if (first.reader, first.root, _shared_options(first)) != (source.reader, source.root, _shared_options(source)):
        return False
    try:
        find_reader(source.name, source.reader, FUNCTION)
    except DataError:
        return False
    return True


def _shared_options(source: SourceInfo) -> dict[str, object]:
    return {key: value for key, value in source.options.items() if key != "component"}
