"""Program that prepares stores from raw files.

    python -m data_recipes.prepare --mixture NAME... --raw DIR --stores DIR [--workers N] [--strict]
    ... --partial        although the raw files have fewer records than were published
    ... --slice 3/32     one of 32 jobs of a cluster;     ... --merge 32     afterwards, once

Exit codes: 0 success; 1 data or machine error, such as too many invalid records or a full disk; 2 user error; 130
interrupted by Ctrl-C. Neither torch nor DeepSpeed is needed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data_recipes.guess.explain import explain_rejected
from data_recipes.mixture.mixture import Mixture, list_sources, read_mixture
from data_recipes.prepare import summary
from data_recipes.prepare.completeness import MIN_SHARE, check_complete, count_required
from data_recipes.prepare.disk_space import SpaceNeed, check_space
from data_recipes.prepare.manifest import write_manifest
from data_recipes.prepare.shared_files import read_group
from data_recipes.prepare.slices import make_slice_writer, merge_slices, read_slices
from data_recipes.prepare.work_list import WorkItem, estimate_group_space, plan_work, report_up_to_date
from data_recipes.raw.archives import archives_cached_in, describe_copies
from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.arguments import (
    ArgumentParser,
    add_source_arguments,
    output_folder,
    path_argument,
)
from data_recipes.schema.config_dir import list_config_folders
from data_recipes.schema.console import run_program
from data_recipes.schema.denied_files import describe_error
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import SourceInfo, read_source
from data_recipes.store.durable import exclusive_lock
from data_recipes.store.reader import read_manifest
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import (
    WHOLE_SOURCE,
    LoadedRecord,
    NumberedStream,
    Slice,
    StreamChangedError,
    StreamPosition,
)
from data_recipes.writing.store_tables import RejectedError, StoreReport
from data_recipes.writing.writer import StoreWriter, complete_interrupted, read_inputs, write_records


@dataclass(frozen=True)
class Arguments:
    """The parsed command line; the fields are its options."""

    mixture: list[str]
    source: list[str]
    raw: Path
    stores: Path
    workers: int
    strict: bool
    max_rejects: float | None
    partial: bool
    slice: Slice
    merge: int | None
    config_dir: Path | None
    configs: Path


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line; argparse exits with code 2 on invalid arguments."""
    parser = ArgumentParser(prog="python -m data_recipes.prepare", description="Prepare stores from raw files.")
    add_source_arguments(parser, "prepare")
    parser.add_argument("--raw", type=path_argument, required=True, help="folder that contains the raw folders")
    parser.add_argument("--stores", type=_stores_argument, required=True, help="output folder of the stores")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode images (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first invalid record")
    parser.add_argument(
        "--max-rejects",
        type=float,
        metavar="SHARE",
        help="fail above this fraction of rejected records, 0 to 1 (default: each source's max_reject_share)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help=f"accept raw files with less than {MIN_SHARE:.0%} of the published number of samples".replace("%", "%%"),
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--slice",
        type=_parse_slice,
        default=WHOLE_SOURCE,
        metavar="K/N",
        help="prepare slice K of N only, for array jobs",
    )
    part.add_argument("--merge", type=int, metavar="N", help="merge N slices per source to stores, and remove them")
    arguments = Arguments(**vars(parser.parse_args(argv)))
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if arguments.max_rejects is not None and not 0 <= arguments.max_rejects <= 1:
        parser.error(f"--max-rejects {arguments.max_rejects}: must be between 0 and 1")
    if arguments.merge is not None and arguments.merge < 1:
        parser.error(f"--merge {arguments.merge}: must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse_arguments(argv)
    resume_hint = "Completed work is kept; run the same command again to continue"
    try:
        prepare(arguments)
    except DataError as error:
        return _fail(2, str(error))
    except RejectedError as error:
        return _fail(1, str(error))
    except BrokenProcessPool:
        return _fail(
            1,
            "a worker process was killed, probably because the machine ran out of memory. Try fewer --workers. "
            f"{resume_hint}.",
        )
    except PermissionError as error:
        return _fail(2, f"{describe_error(error)}. {resume_hint} after resolving the error.")
    except OSError as error:
        return _fail(1, f"{error}. {resume_hint} after resolving the error.")
    except KeyboardInterrupt:
        return _fail(130, f"interrupted. {resume_hint}.")
    return 0


def prepare(arguments: Arguments) -> None:
    """Prepare all requested stores that are not up to date, then print a summary.

    Raw folders, readers and disk space are checked for all sources before any file is read, so that errors are found
    early.

    Raises:
        DataError: user error in the configuration or the command line, or incomplete raw files.
        RejectedError: too many records are invalid.
        OSError: the disk is full or failing.
    """
    with archives_cached_in(arguments.stores / ".archives"):
        _prepare(arguments)


def _prepare(arguments: Arguments) -> None:
    configs = list_config_folders(arguments.configs, arguments.config_dir)
    mixtures = [read_mixture(configs, name) for name in dict.fromkeys(arguments.mixture)]
    sources = [read_source(configs, name) for name in dict.fromkeys(arguments.source) or list_sources(mixtures)]
    required = {each.name: count_required(each, mixtures, arguments.partial) for each in sources}
    if arguments.max_rejects is not None:
        sources = [replace(source, max_reject_share=arguments.max_rejects) for source in sources]
    work = plan_work(sources, arguments.raw, arguments.stores, arguments.slice, arguments.merge)
    # The pool forks, so it is created before any thread. It is shared by all sources.
    num_workers = arguments.workers if work and arguments.merge is None else 1
    with ImagePool(num_workers) as pool:
        needs = pool.map_items(partial(estimate_group_space, arguments.raw, arguments.stores, arguments.slice), work)
        if arguments.slice == WHOLE_SOURCE:
            check_complete(sources, _count_records(sources, work, needs, arguments.stores), required)
        if work:
            print(check_space([need for group in needs for need in group], arguments.stores), flush=True)
            for group, measured in zip(work, needs, strict=True):
                _prepare_group(group, measured, arguments, pool, required)
    if work and arguments.slice == WHOLE_SOURCE and (copies := describe_copies()):
        print(copies)
    if arguments.slice != WHOLE_SOURCE:
        print(f"slice {arguments.slice} is complete; after all slices, run --merge {arguments.slice.num_slices}")
    elif not mixtures:
        summary.print_sources(sources, arguments.stores)
    for config in mixtures if arguments.slice == WHOLE_SOURCE else ():
        mixture = Mixture.open(config, arguments.stores)
        summary.print_mixture(mixture, arguments.stores)
        print(f"written: {write_manifest(mixture, arguments.stores)}/manifest.json, .md, .tex, .bib")


def _count_records(
    sources: Sequence[SourceInfo],
    work: Sequence[Sequence[WorkItem]],
    needs: Sequence[Sequence[SpaceNeed]],
    stores: Path,
) -> dict[str, int]:
    """Return the number of records of each source, as far as it is known before its raw files are read."""
    counts: dict[str, int] = {}
    for group, measured in zip(work, needs, strict=True):
        for item, need in zip(group, measured, strict=True):
            if need.num_records is not None:
                counts[item.source.name] = need.num_records
    to_do = {item.source.name for group in work for item in group}
    for source in sources:
        if source.name not in to_do:  # up to date
            manifest = read_manifest(stores / source.name) or {}
            counts[source.name] = manifest["num_records"] if manifest["num_samples"] else 0
    return counts


def _prepare_group(
    group: Sequence[WorkItem],
    needs: Sequence[SpaceNeed],
    arguments: Arguments,
    pool: ImagePool,
    required: Mapping[str, int],
) -> None:
    """Prepare the stores or slices that are read from one raw file, in one pass."""
    with ExitStack() as locks:
        for work in group:
            locks.enter_context(exclusive_lock(work.path))
        # Another program may have prepared one in the meantime, or an interrupted run may have completed it.
        todo = []
        for work in group:
            if read_inputs(work.path) == work.inputs or complete_interrupted(work.path, work.inputs):
                report_up_to_date(work)
            else:
                todo.append(work)
        if not todo:
            return
        try:
            reports = _write_group(todo, needs, arguments, pool, required)
        except StreamChangedError:
            print(f"{todo[0].name}: the raw files have changed since the interrupted run; starting over")
            reports = _write_group(todo, needs, arguments, pool, required)
        except RejectedError as error:
            raise _explain(error, todo, arguments.raw) from error
    names = {work.source.name: work.name for work in todo}
    for report in reports:
        num_rejected = sum(report.rejects.values())
        counts = f"{report.num_samples:,} samples, {report.num_images:,} images, {num_rejected:,} rejected"
        print(f"{names[report.name]}: {counts}", flush=True)


def _explain(error: RejectedError, group: Sequence[WorkItem], raw: Path) -> RejectedError | DataError:
    """Add to an error why all records of a source were rejected. The wrong reader or option is a user error."""
    lines: list[str] = []
    has_other_reader = False
    for work in group:
        if work.source.name in error.all_rejected:
            more, is_fitting = explain_rejected(work.source, raw / work.source.root)
            lines += more
            has_other_reader |= is_fitting
    message = "\n".join([str(error), *dict.fromkeys(lines)])
    return DataError(message) if has_other_reader else RejectedError(message)


def _write_group(
    group: Sequence[WorkItem],
    needs: Sequence[SpaceNeed],
    arguments: Arguments,
    pool: ImagePool,
    required: Mapping[str, int],
) -> list[StoreReport]:
    names = [work.name for work in group]
    counts = [need.num_records for need in needs if need.name in names]
    num_records = None if None in counts else sum(count for count in counts if count is not None)
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    with Progress(title, num_records) as progress:
        if arguments.merge is not None:
            folders = read_slices(group[0].path, arguments.merge, group[0].inputs["recipe"])
            min_records = required[group[0].source.name]
            return [merge_slices(group[0].path, group[0].source, folders, progress, min_records)]
        writers = [_make_writer(work, arguments, required[work.source.name]) for work in group]

        def records(starts: Mapping[str, StreamPosition]) -> Iterator[tuple[str, StreamPosition, LoadedRecord | None]]:
            stream = read_group([work.source for work in group], arguments.raw)
            root = arguments.raw / group[0].source.root
            return NumberedStream(stream, root, starts, arguments.slice).load(pool)

        return write_records(writers, records, progress)


def _make_writer(work: WorkItem, arguments: Arguments, min_records: int) -> StoreWriter:
    if arguments.slice == WHOLE_SOURCE:
        return StoreWriter(work.path, work.source, work.inputs, min_records=min_records, strict=arguments.strict)
    store = arguments.stores / work.source.name
    return make_slice_writer(store, arguments.slice, work.source, work.inputs, arguments.strict)


def _parse_slice(text: str) -> Slice:
    try:
        return Slice.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _stores_argument(text: str) -> Path:
    stores = output_folder(text)
    for name, kind in (("config.yaml", "the folder of a run"), ("manifest.json", "a store itself")):
        if (stores / name).is_file():
            raise argparse.ArgumentTypeError(f"{text} is {kind} (it has a {name}); name the folder of all stores")
    return stores


def _fail(code: int, message: str) -> int:
    print(f"prepare: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_program(main))
