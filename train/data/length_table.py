"""The length table: tokens, supervised tokens, tiles and source of every sample of a mixture.

It is built once per data fingerprint (mixture and processor) from texts and image sizes, stored next to the stores, and
memory-mapped by every rank. A step's counts are therefore known before its samples are read. Samples that are too long
for the model or have no supervised token are rejected here, counted by reason, and listed in the quarantine file.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_recipes.mixture.mixture import Mixture
from data_recipes.raw.image_pool import exit_with_parent
from llava_next.config import ModelError
from llava_next.file_access import write_problem
from llava_next.inputs.processor import Processor, SampleRejected
from train.config.schema import ConfigError, PackingConfig, RunConfig
from train.distributed.world import heartbeat_mtime, wait_for

logger = logging.getLogger(__name__)

ROW = np.dtype([("sample", "<i8"), ("tokens", "<i4"), ("supervised", "<i4"), ("tiles", "<i4"), ("source", "<i2")])
"""One accepted sample: its number in the mixture, its lengths, and the number of its source."""

_CHUNK = 512  # samples that a worker counts at a time
_DEAD_AFTER_S = 600.0  # a writer updates its heartbeat about every second


@dataclass(frozen=True)
class LengthTable:
    """The accepted samples of a mixture, in the order of the mixture.

    Attributes:
        rows: memory map of `ROW` [num_samples]; `data_recipes.mixture.order` draws positions in it.
        fingerprint: `data_fingerprint` of the mixture and the processor.
        folder: of the table's files.
        rejects: number of rejected samples by reason.
        num_rounds_cut: conversation rounds that were removed to fit the maximum length.
    """

    rows: np.ndarray
    fingerprint: str
    folder: Path
    rejects: dict[str, int]
    num_rounds_cut: int
    special_texts: dict[str, dict[str, int]] | None = None
    """Number of accepted samples, by source and special token, whose text contains that token's text and is therefore
    encoded as the token. None for tables that were built before these were counted."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def quarantine(self) -> Path:
        """Path of a JSON lines file with id, source, reason and detail of every rejected sample."""
        return self.folder / "quarantine.jsonl"

    def rejects_by_source(self) -> dict[str, dict[str, int]]:
        """Counts the rejected samples of the quarantine file, by source and reason."""
        counts: dict[str, Counter[str]] = {}
        with self.quarantine.open() as lines:
            for entry in map(json.loads, lines):
                counts.setdefault(entry["source"], Counter())[entry["reason"]] += 1
        return {source: dict(sorted(reasons.items())) for source, reasons in sorted(counts.items())}


def data_fingerprint(mixture: Mixture, processor: Processor) -> str:
    """Returns the sha256 that identifies the samples of a run and how they are encoded as tokens and tiles."""
    return hashlib.sha256(f"{mixture.fingerprint}\0{processor.fingerprint}".encode()).hexdigest()


def table_folders(config: RunConfig) -> tuple[Path, Path]:
    """The folders of a run's length tables, in the order in which they are searched: beside the stores, where every run
    finds them, and the run's own, since the stores may belong to another user."""
    return Path(config.data.store_root) / ".lengths", config.run_dir / "lengths"


def find_table(mixture: Mixture, processor: Processor, folders: Sequence[Path]) -> Path | None:
    """Returns the first of the folders that holds the table of a mixture and a processor; None if there is no table."""
    name = _table_name(data_fingerprint(mixture, processor))
    return next((folder for folder in folders if _is_complete(folder / name)), None)


def open_table(
    mixture: Mixture,
    processor: Processor,
    folder: Path,
    *,
    is_writer: bool,
    num_workers: int,
    show_progress: bool,
    fallbacks: Sequence[Path] = (),
) -> LengthTable:
    """Opens the table of a mixture and a processor; the writer builds it if there is none.

    Args:
        folder: of all tables; each has a subfolder named after its fingerprint.
        is_writer: whether this process builds a missing table; other processes wait for it.
        num_workers: processes that count; 0 uses one per core that this process may use.
        show_progress: show a progress bar.
        fallbacks: folders for a missing table if `folder` cannot be written, in this order.

    Raises:
        ConfigError: no folder can be written; or every sample, or every sample of a source, was rejected.
        ModelError: a stored sample's placeholders and images differ in number; the message names it.
        TimeoutError: the writer's heartbeat stopped.
    """
    fingerprint = data_fingerprint(mixture, processor)
    paths = [each / _table_name(fingerprint) for each in (folder, *fallbacks)]
    if is_writer and not any(map(_is_complete, paths)):
        path = _first_writable(paths)
        _write(mixture, processor, path, fingerprint, num_workers or len(os.sched_getaffinity(0)), show_progress)
    else:
        wait_for(
            lambda: any(map(_is_complete, paths)),
            lambda: [_last_sign(path) for path in paths],
            what=f"length table {' or '.join(map(str, paths))}",
        )
        path = next(filter(_is_complete, paths))
    content = json.loads((path / "table.json").read_text())
    rows = np.load(path / "rows.npy", mmap_mode="r")
    if not len(rows):
        reasons = ", ".join(f"{number} {reason}" for reason, number in content["rejects"].items())
        raise ConfigError(
            f"stage.max_length={processor.config.max_length} leaves no sample of mixture {mixture.config.name} "
            f"({reasons}); raise it; the rejected samples are listed in {path / 'quarantine.jsonl'}"
        )
    table = LengthTable(
        rows, fingerprint, path, content["rejects"], content["num_rounds_cut"], content.get("special_texts")
    )
    _check_all_sources_have_samples(mixture, table)
    return table


def check_budgets(table: LengthTable, packing: PackingConfig) -> None:
    """Checks that the largest sample fits the budgets of a row.

    Raises:
        ConfigError: it does not; the message has the key and the smallest sufficient value.
    """
    for name, budget in (("tokens", packing.max_tokens), ("tiles", packing.max_tiles)):
        largest = int(table.rows[name].max())
        if largest > budget:
            raise ConfigError(
                f"packing.max_{name}={budget}, but a sample of this mixture has {largest} {name}; raise it to at least "
                f"{largest}"
            )


def _check_all_sources_have_samples(mixture: Mixture, table: LengthTable) -> None:
    """Raises ConfigError if a source has samples in the mixture but none in the table."""
    num_sources = len(mixture.source_names)
    num_offered = np.bincount(mixture.source_ids, minlength=num_sources)
    num_accepted = np.bincount(table.rows["source"], minlength=num_sources)
    lost = [mixture.source_names[number] for number in np.flatnonzero((num_offered > 0) & (num_accepted == 0))]
    if not lost:
        return
    reasons = table.rejects_by_source()[lost[0]]
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    others = f" (nor of {', '.join(lost[1:])})" if lost[1:] else ""
    raise ConfigError(
        f"mixture.sources.{lost[0]}: none of its {sum(reasons.values())} samples has a place in this run{others}: "
        f"{counts}; raise stage.max_length if they are too long, set stage.views.several if they have several images, "
        f"choose another template, or remove the source from the mixture; {table.quarantine} lists them"
    )


def _first_writable(paths: Sequence[Path]) -> Path:
    """Returns the first path whose directory can be written, with a warning if it is not the first.

    Raises:
        ConfigError: there is none.
    """
    problems = []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            problems.append(write_problem(path.parent, error))
            continue
        if problems:
            logger.warning("the length table is written to %s: %s", path.parent, "; ".join(problems))
        return path
    raise ConfigError(
        f"the length table of the mixture cannot be stored: {'; '.join(problems)}; make data.store_root writable, or "
        "start once as its owner, which writes the table"
    )


def _table_name(fingerprint: str) -> str:
    return fingerprint[:16]


def _is_complete(path: Path) -> bool:
    try:
        return (path / "table.json").is_file()
    except PermissionError:  # a folder that another user has closed
        return False


def _last_sign(path: Path) -> int | None:
    try:
        return heartbeat_mtime(_heartbeat(path))
    except OSError:
        return None


def _heartbeat(path: Path) -> Path:
    return path.with_name(path.name + ".beat")


def _write(
    mixture: Mixture,
    processor: Processor,
    path: Path,
    fingerprint: str,
    num_workers: int,
    show_progress: bool,
) -> None:
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    os.utime(partial)
    _remove_leftovers(partial)
    heartbeat = _heartbeat(path)
    heartbeat.touch()
    rejects, cut, special_texts = Counter[str](), 0, dict[str, Counter[str]]()
    with (
        tqdm(
            total=mixture.num_samples, desc="lengths", unit="sample", disable=not show_progress, mininterval=0.5
        ) as bar,
        (partial / "rows.raw").open("wb") as rows_file,
        (partial / "quarantine.jsonl").open("w") as quarantine,
    ):
        for rows, rejected, rounds_cut, special in _count_all(mixture, processor, num_workers):
            rows.tofile(rows_file)
            quarantine.writelines(json.dumps(reject) + "\n" for reject in rejected)
            rejects.update(str(reject["reason"]) for reject in rejected)
            cut += rounds_cut
            for source, counts in special.items():
                special_texts.setdefault(source, Counter()).update(counts)
            bar.update(len(rows) + len(rejected))
            for touched in (heartbeat, partial):
                os.utime(touched)
    _save_rows(partial)
    content = {
        "fingerprint": fingerprint,
        "mixture": mixture.fingerprint,
        "processor": processor.fingerprint,
        "rejects": dict(sorted(rejects.items())),
        "num_rounds_cut": cut,
        "special_texts": {source: dict(sorted(counts.items())) for source, counts in sorted(special_texts.items())},
    }
    (partial / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    try:
        partial.rename(path)
    except OSError:
        if not _is_complete(path):  # otherwise another run has built the same table
            raise
    heartbeat.unlink(missing_ok=True)


def _save_rows(partial: Path) -> None:
    """Converts rows.raw to rows.npy through a memory map, since there may be tens of millions of rows."""
    raw = partial / "rows.raw"
    np.save(partial / "rows.npy", np.memmap(raw, ROW, "r") if raw.stat().st_size else np.zeros(0, ROW))
    raw.unlink()


def _remove_leftovers(current: Path) -> None:
    """Removes partial folders of killed writers: their process has ended, or had no heartbeat for ten minutes.

    Ages are differences of file times, since clocks of hosts may differ; `current` must have been touched just before.
    """
    now = heartbeat_mtime(current) or 0
    for partial in current.parent.glob("*.partial"):
        host, _, pid = partial.stem.partition(".")[2].rpartition(".")
        has_ended = host == socket.gethostname() and not Path("/proc", pid).exists()
        if has_ended or now - (heartbeat_mtime(partial) or now) > _DEAD_AFTER_S * 1e9:
            shutil.rmtree(partial, ignore_errors=True)


_Counted = tuple[np.ndarray, list[dict[str, object]], int, dict[str, Counter[str]]]
"""Rows, rejected samples, number of removed rounds, and special tokens by source."""

_shared: tuple[Mixture, Processor] | None = None


def _count_all(mixture: Mixture, processor: Processor, num_workers: int) -> "Iterator[_Counted]":
    ranges = [range(start, min(start + _CHUNK, mixture.num_samples)) for start in range(0, mixture.num_samples, _CHUNK)]
    if num_workers == 1 or len(ranges) <= 2:
        _set_shared(mixture, processor)
        yield from map(_count, ranges)
        return
    with ProcessPoolExecutor(
        min(num_workers, len(ranges)),
        mp_context=get_context("fork"),
        initializer=_start_worker,
        initargs=(os.getpid(), mixture, processor),
    ) as pool:
        yield from pool.map(_count, ranges)


def _start_worker(parent: int, mixture: Mixture, processor: Processor) -> None:
    exit_with_parent(parent)
    gc.freeze()  # a collection would write to the pages that are shared with the parent process
    _set_shared(mixture, processor)


def _set_shared(mixture: Mixture, processor: Processor) -> None:
    global _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shared = (mixture, processor)


def _count(numbers: range) -> _Counted:
    """Counts the samples of these numbers. Runs in the workers."""
    assert _shared is not None
    mixture, processor = _shared
    rows: list[tuple[int, int, int, int, int]] = []
    rejects: list[dict[str, object]] = []
    cut, special = 0, dict[str, Counter[str]]()
    for number in numbers:
        text = mixture.text(number)
        try:
            layout = processor.layout(text.messages, text.sizes_hw)
        except SampleRejected as rejected:
            rejects.append(
                {
                    "id": text.id,
                    "source": text.source,
                    "reason": rejected.reason.value,
                    "detail": rejected.detail,
                }
            )
            continue
        except ModelError as error:
            raise ModelError(
                f"sample {text.id!r} of source {text.source}: {error}; prepare the source again"
            ) from error
        cut += layout.num_rounds_cut
        special_counts = processor.special_texts(text.messages)
        if special_counts:
            special.setdefault(text.source, Counter()).update(special_counts)
        rows.append(
            (
                number,
                layout.num_tokens,
                layout.num_supervised,
                layout.num_tiles,
                int(mixture.source_ids[number]),
            )
        )
    return np.array(rows, dtype=ROW), rejects, cut, special
