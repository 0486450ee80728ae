"""The program that turns raw files into stores.

    python -m data_recipes.prepare --mixture NAME --raw DIR --stores DIR [--workers N] [--strict]
    ... --slice 3/32     one of 32 jobs of a cluster;     ... --merge 32     then, once

Owns: the command line, which sources need work, exit codes.
Leaves: the making of one store to `store_writer.py` and `slices.py`, raw layouts to `readers/`, choosing samples to
`mixture.py`, what is printed and written about a mixture to `summary.py` and `manifest.py`.

Exit codes: 0 done; 1 the data or the machine failed (too many bad records, a full disk); 2 the user's
mistake, in one sentence; 130 stopped by Ctrl-C. Needs neither torch nor deepspeed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from data_recipes import summary
from data_recipes.manifest import write_manifest
from data_recipes.mixture import Mixture, read_mixture
from data_recipes.pictures import PicturePool
from data_recipes.progress import Progress
from data_recipes.sample import DataError
from data_recipes.slices import (
    merge_slices,
    num_slice_bytes,
    read_slices,
    remove_slices,
    slice_path,
    slices_folder,
    write_slice,
)
from data_recipes.source import RawState, SourceInfo, raw_state, read_source
from data_recipes.space import Need, check_space, survey
from data_recipes.store import read_manifest
from data_recipes.store_tables import RejectedError, StoreReport
from data_recipes.store_writer import finish_interrupted, only_one, read_inputs, refresh_description, write_store
from data_recipes.stream import WHOLE, Slice, StreamChangedError


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
            "a process that decodes pictures was killed, most likely for want of memory. Try fewer --workers. "
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
    look = _one_slice if arguments.slice != WHOLE else _merged if arguments.merge is not None else _whole
    _state_of.cache_clear()
    work = [found for source in sources if (found := look(source, arguments)) is not None]
    # Before any other thread starts: the pool forks. One pool serves all sources.
    num_workers = arguments.workers if work and arguments.merge is None else 1
    with PicturePool(num_workers) as pool:
        if work:
            needs = pool.run_all(partial(_survey, arguments), work)
            print(check_space(needs, arguments.stores), flush=True)
            for item, need in zip(work, needs, strict=True):
                _make(replace(item, need=need), arguments, pool)
    if arguments.slice != WHOLE:
        print(f"slice {arguments.slice} is done; when all are: --merge {arguments.slice.num_slices}")
    elif config is None:
        summary.print_sources(sources, arguments.stores)
    else:
        mixture = Mixture.open(config, arguments.stores)
        summary.print_mixture(mixture, arguments.stores)
        print(f"written: {write_manifest(mixture, arguments.stores)}/manifest.json, .md, .tex, .bib")


def _whole(source: SourceInfo, arguments: Arguments) -> Work | None:
    """What must be made of a source; None, and one line, if it stands."""
    path, recipe = arguments.stores / source.name, source.recipe_digest()
    kept = read_inputs(path)
    if kept.get("recipe") == recipe and not (arguments.raw / source.root).is_dir():
        refresh_description(path, source)
        print(f"{source.name}: already prepared (its raw folder is gone, its store is kept)")
        return None
    source.samples(arguments.raw)  # a generator: nothing is read yet, but reader, options and folder are checked
    inputs = {"recipe": recipe, "raw": _state_of(source.raw_folder(arguments.raw), arguments.stores).digest}
    if kept == inputs:
        _stands(source, source.name, path)
        return None
    return Work(source, source.name, path, inputs)


def _one_slice(source: SourceInfo, arguments: Arguments) -> Work | None:
    """The same for a slice, which stands if its YAML has not changed: 32 jobs need not look at every file 32 times.

    The first slice looks, for the merged store; and each has a digest of all records, which merging compares.
    """
    path, recipe = slice_path(arguments.stores / source.name, arguments.slice), source.recipe_digest()
    name = f"{source.name} {arguments.slice}"
    if read_inputs(path).get("recipe") == recipe:
        _stands(source, name, path)
        return None
    source.samples(arguments.raw)
    inputs = {"recipe": recipe}
    if arguments.slice.number == 1:
        inputs["raw"] = _state_of(source.raw_folder(arguments.raw), arguments.stores).digest
    return Work(source, name, path, inputs)


def _merged(source: SourceInfo, arguments: Arguments) -> Work | None:
    """The same for a store whose slices are there."""
    path, recipe = arguments.stores / source.name, source.recipe_digest()
    kept = read_inputs(path)
    if kept.get("recipe") == recipe and not slices_folder(path).exists():
        _stands(source, source.name, path)
        return None
    folders = read_slices(path, arguments.merge or 1, recipe)
    inputs = read_inputs(folders[0])
    if kept == inputs:
        remove_slices(path)  # an earlier start had merged them
        _stands(source, source.name, path)
        return None
    num_records = sum((read_manifest(folder) or {})["num_records"] for folder in folders)
    return Work(source, source.name, path, inputs, Need(source.name, num_records, num_slice_bytes(folders)))


def _survey(arguments: Arguments, work: Work) -> Need:
    """What a store or slice will take; runs in a process of the pool."""
    if work.need is not None:
        return work.need
    samples, folder = work.source.samples(arguments.raw), work.source.raw_folder(arguments.raw)
    return survey(work.name, samples, lambda: raw_state(folder, arguments.stores).num_bytes, arguments.slice)


@cache
def _state_of(folder: Path, stores: Path) -> RawState:
    """Sources that are parts of one file have one raw folder: it is looked at once."""
    return raw_state(folder, stores)


def _stands(source: SourceInfo, name: str, path: Path) -> None:
    refresh_description(path, source)
    print(f"{name}: already prepared, {(read_manifest(path) or {})['num_samples']:,} samples")


def _make(work: Work, arguments: Arguments, pool: PicturePool) -> None:
    with only_one(work.path):
        if read_inputs(work.path) == work.inputs or finish_interrupted(work.path, work.inputs):
            _stands(work.source, work.name, work.path)  # another program has made it since, or had not yet renamed it
            return
        try:
            report = _write(work, arguments, pool)
        except StreamChangedError:
            print(f"{work.source.name}: the raw files have changed since an interrupted start; from the beginning")
            report = _write(work, arguments, pool)
    left_out = sum(report.rejects.values())
    print(
        f"{work.name}: {report.num_samples:,} samples, {report.num_pictures:,} pictures, {left_out:,} left out",
        flush=True,
    )


def _write(work: Work, arguments: Arguments, pool: PicturePool) -> StoreReport:
    source, root = work.source, arguments.raw / work.source.root
    num_records = work.need.num_records if work.need else None
    with Progress(work.name, num_records) as progress:
        if arguments.merge is not None:
            folders = read_slices(work.path, arguments.merge, work.inputs["recipe"])
            return merge_slices(work.path, source, folders, progress)
        samples = source.samples(arguments.raw)
        if arguments.slice != WHOLE:
            store = arguments.stores / source.name
            return write_slice(
                store, arguments.slice, source, samples, pool, work.inputs, arguments.strict, progress, root
            )
        return write_store(work.path, source, samples, pool, work.inputs, arguments.strict, progress, root)


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
