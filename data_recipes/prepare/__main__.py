"""The program that turns raw files into stores.

    python -m data_recipes.prepare --mixture NAME --raw DIR --stores DIR [--workers N] [--strict]
    ... --slice 3/32     one of 32 jobs of a cluster;     ... --merge 32     then, once

Owns: the command line, what is done in which order, exit codes.
Leaves: which sources need work to `work_list.py`, the making of a store to `writing/` and `slices.py`, raw layouts to
`readers/`, choosing samples to `mixture.py`, what is printed and written about a mixture to `summary.py` and
`manifest.py`.

Exit codes: 0 done; 1 the data or the machine failed (too many bad records, a full disk); 2 the user's
mistake, in one sentence; 130 stopped by Ctrl-C. Needs neither torch nor deepspeed.
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

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.prepare import summary
from data_recipes.prepare.disk_space import Need, check_space
from data_recipes.prepare.manifest import write_manifest
from data_recipes.prepare.shared_files import read_together
from data_recipes.prepare.slices import merge_slices, read_slices, slice_writer
from data_recipes.prepare.work_list import Work, find_work, report_up_to_date, survey_work
from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_source
from data_recipes.store.durable import only_one
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import WHOLE, Loaded, Mark, NumberedStream, Slice, StreamChangedError
from data_recipes.writing.store_tables import RejectedError, StoreReport
from data_recipes.writing.writer import StoreWriter, finish_interrupted, read_inputs, write_records


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    mixture: str | None
    source: list[str]
    raw: Path
    stores: Path
    workers: int
    strict: bool
    max_rejects: float | None
    slice: Slice
    merge: int | None
    configs: Path


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line; argparse itself leaves with 2 on what it does not understand."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes.prepare", description="raw files → stores")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mixture", help="prepare every source of configs/mixture/NAME.yaml")
    what.add_argument("--source", nargs="+", default=[], help="prepare these of configs/source/*.yaml")
    parser.add_argument("--raw", type=Path, required=True, help="the folder that holds the raw folders")
    parser.add_argument("--stores", type=Path, required=True, help="where the stores go, one folder a source")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode pictures (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument(
        "--max-rejects",
        type=float,
        metavar="SHARE",
        help="fail above this share of bad records, 0 to 1 (default: each source's max_reject_share)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--slice", type=_slice, default=WHOLE, metavar="K/N", help="make slice K of N only, for a cluster's array jobs"
    )
    part.add_argument("--merge", type=int, metavar="N", help="make the stores of their N slices, and remove those")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="the YAML folder (%(default)s)")
    arguments = Arguments(**vars(parser.parse_args(argv)))
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1 is needed")
    if arguments.max_rejects is not None and not 0 <= arguments.max_rejects <= 1:
        parser.error(f"--max-rejects {arguments.max_rejects}: a share lies between 0 and 1")
    if arguments.merge is not None and arguments.merge < 1:
        parser.error(f"--merge {arguments.merge}: at least 1 slice is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    arguments = parse(argv)
    again = "What was done is kept: the same command goes on from there"
    try:
        prepare(arguments)
    except DataError as error:
        return _fail(2, str(error))
    except RejectedError as error:
        return _fail(1, str(error))
    except BrokenProcessPool:
        return _fail(
            1,
            "a process that decodes pictures was killed, most likely because memory ran out. Try fewer --workers. "
            f"{again}.",
        )
    except OSError as error:
        return _fail(1, f"{error}. {again} once this is mended.")
    except KeyboardInterrupt:
        return _fail(130, f"stopped. {again}.")
    return 0


def prepare(arguments: Arguments) -> None:
    """Make every store that is asked for and is not there yet, then print what came of it.

    All raw folders and readers are looked for before the first is read, and the room is measured: a run of hours
    should not end on a wrong name at its last source.
    """
    if not arguments.configs.is_dir():
        raise DataError(f"no folder {arguments.configs}: start in the checkout, or name it with --configs.")
    config = read_mixture(arguments.configs, arguments.mixture) if arguments.mixture else None
    names = sorted({*config.sources, *config.exclude}) if config else list(dict.fromkeys(arguments.source))
    sources = [read_source(arguments.configs, name) for name in names]
    if arguments.max_rejects is not None:
        sources = [replace(source, max_reject_share=arguments.max_rejects) for source in sources]
    work = find_work(sources, arguments.raw, arguments.stores, arguments.slice, arguments.merge)
    # Before any other thread starts: the pool forks. One pool serves all sources.
    num_workers = arguments.workers if work and arguments.merge is None else 1
    with PicturePool(num_workers) as pool:
        if work:
            needs = pool.run_all(partial(survey_work, arguments.raw, arguments.stores, arguments.slice), work)
            print(check_space([need for group in needs for need in group], arguments.stores), flush=True)
            for group, measured in zip(work, needs, strict=True):
                _make(group, measured, arguments, pool)
    if arguments.slice != WHOLE:
        print(f"slice {arguments.slice} is done; when all are: --merge {arguments.slice.num_slices}")
    elif config is None:
        summary.print_sources(sources, arguments.stores)
    else:
        mixture = Mixture.open(config, arguments.stores)
        summary.print_mixture(mixture, arguments.stores)
        print(f"written: {write_manifest(mixture, arguments.stores)}/manifest.json, .md, .tex, .bib")


def _make(group: Sequence[Work], needs: Sequence[Need], arguments: Arguments, pool: PicturePool) -> None:
    """Make the stores or slices of one raw file, all at once."""
    with ExitStack() as locks:
        for work in group:
            locks.enter_context(only_one(work.path))
        # Another program may have made one since it was looked at, or an earlier start had not yet renamed it.
        todo = []
        for work in group:
            if read_inputs(work.path) == work.inputs or finish_interrupted(work.path, work.inputs):
                report_up_to_date(work)
            else:
                todo.append(work)
        if not todo:
            return
        try:
            reports = _write(todo, needs, arguments, pool)
        except StreamChangedError:
            print(f"{todo[0].name}: the raw files have changed since an interrupted start; from the beginning")
            reports = _write(todo, needs, arguments, pool)
    names = {work.source.name: work.name for work in todo}
    for report in reports:
        left_out = sum(report.rejects.values())
        counts = f"{report.num_samples:,} samples, {report.num_pictures:,} pictures, {left_out:,} left out"
        print(f"{names[report.name]}: {counts}", flush=True)


def _write(group: Sequence[Work], needs: Sequence[Need], arguments: Arguments, pool: PicturePool) -> list[StoreReport]:
    names = [work.name for work in group]
    counts = [need.num_records for need in needs if need.name in names]
    num_records = None if None in counts else sum(count for count in counts if count is not None)
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    with Progress(shown, num_records) as progress:
        if arguments.merge is not None:
            folders = read_slices(group[0].path, arguments.merge, group[0].inputs["recipe"])
            return [merge_slices(group[0].path, group[0].source, folders, progress)]
        writers = [_writer(work, arguments) for work in group]

        def records(starts: Mapping[str, Mark]) -> Iterator[tuple[str, Mark, Loaded | None]]:
            stream = read_together([work.source for work in group], arguments.raw)
            root = arguments.raw / group[0].source.root
            return NumberedStream(stream, root, starts, arguments.slice).load(pool)

        return write_records(writers, records, progress)


def _writer(work: Work, arguments: Arguments) -> StoreWriter:
    if arguments.slice == WHOLE:
        return StoreWriter(work.path, work.source, work.inputs, strict=arguments.strict)
    store = arguments.stores / work.source.name
    return slice_writer(store, arguments.slice, work.source, work.inputs, arguments.strict)


def _slice(text: str) -> Slice:
    try:
        return Slice.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fail(code: int, sentence: str) -> int:
    print(f"prepare: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
