"""The length table: tokens, supervised tokens, tiles and source of every sample, and who has no place in this run.

Made once per data fingerprint (mixture + processor), from text and picture headers alone, by one writer with several
processes; kept beside the stores and memory-mapped by every rank. It knows the counts of a whole step before any
sample is read, so a step's loss can be divided by the right number.

This is the second gate: sound records that are too long for this backbone, or have no answer left, are counted here
with their reason and written to the run's own quarantine.
"""

import gc
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_recipes.mixture.mixture import Mixture
from data_recipes.raw.image_pool import follow_parent
from llava_next.config import ModelError
from llava_next.inputs.processor import Processor, SampleRejected
from train.config.schema import ConfigError, PackingConfig
from train.distributed.world import heartbeat_mtime, wait_for

ROW = np.dtype([("sample", "<i8"), ("tokens", "<i4"), ("supervised", "<i4"), ("tiles", "<i4"), ("source", "<i2")])
"""One kept sample: its number in the mixture, its lengths, and its source's number."""

_CHUNK = 512
_DEAD_AFTER_S = 600.0  # a writer gives a sign of life every second


@dataclass(frozen=True)
class LengthTable:
    """The kept samples of a mixture, in the mixture's order.

    `rows` is a memory map of ROW; the sample numbers that `data_recipes.mixture.order` draws are positions in it.
    """

    rows: np.ndarray
    fingerprint: str
    folder: Path
    rejects: dict[str, int]
    num_rounds_cut: int
    special_texts: dict[str, dict[str, int]] | None = None
    """By source and special token the kept samples whose own text has that token's text, and so the token; None for a
    table that was made before they were counted."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def quarantine(self) -> Path:
        """JSON lines: id, source, reason, detail of every sample left out."""
        return self.folder / "quarantine.jsonl"

    def rejects_by_source(self) -> dict[str, dict[str, int]]:
        """`rejects` of each source that has some, counted in the quarantine."""
        found: dict[str, Counter[str]] = {}
        with self.quarantine.open() as lines:
            for entry in map(json.loads, lines):
                found.setdefault(entry["source"], Counter())[entry["reason"]] += 1
        return {source: dict(sorted(reasons.items())) for source, reasons in sorted(found.items())}


def data_fingerprint(mixture: Mixture, processor: Processor) -> str:
    """Names the data of a run: which samples, and how each becomes tokens and tiles."""
    return hashlib.sha256(f"{mixture.fingerprint}\0{processor.fingerprint}".encode()).hexdigest()


def open_table(
    mixture: Mixture,
    processor: Processor,
    folder: Path,
    *,
    is_writer: bool,
    num_workers: int,
    show_progress: bool,
) -> LengthTable:
    """The table of this mixture and processor, made first if there is none.

    Args:
        folder: where tables are kept, each in a folder of its fingerprint.
        is_writer: this process makes the table if need be; the others wait for it.
        num_workers: processes that count; 0 takes one per core.
        show_progress: draw a bar with an ETA.

    Raises:
        ConfigError: every sample, or every sample of a source, was rejected.
        ModelError: a stored sample's placeholders and pictures differ in number; names it.
        TimeoutError: the writer gave no sign of life.
    """
    fingerprint = data_fingerprint(mixture, processor)
    place = folder / fingerprint[:16]
    if not _is_complete(place):
        if is_writer:
            _write(mixture, processor, place, fingerprint, num_workers or os.cpu_count() or 1, show_progress)
        else:
            wait_for(lambda: _is_complete(place), lambda: heartbeat_mtime(_beat(place)), what=f"length table {place}")
    about = json.loads((place / "table.json").read_text())
    rows = np.load(place / "rows.npy", mmap_mode="r")
    if not len(rows):
        reasons = ", ".join(f"{number} {reason}" for reason, number in about["rejects"].items())
        raise ConfigError(
            f"stage.max_length={processor.config.max_length} leaves no sample of mixture {mixture.config.name} "
            f"({reasons}); raise it, or look at {place / 'quarantine.jsonl'}"
        )
    table = LengthTable(rows, fingerprint, place, about["rejects"], about["num_rounds_cut"], about.get("special_texts"))
    _refuse_lost_sources(mixture, table)
    return table


def check_budgets(table: LengthTable, packing: PackingConfig) -> None:
    """Refuses a row budget that the mixture's own longest sample exceeds, before anything is trained.

    Raises:
        ConfigError: names the key and the smallest value that would do.
    """
    for name, budget in (("tokens", packing.max_tokens), ("tiles", packing.max_tiles)):
        largest = int(table.rows[name].max())
        if largest > budget:
            raise ConfigError(
                f"packing.max_{name}={budget}, but a sample of this mixture has {largest} {name}; raise it to at least "
                f"{largest}"
            )


def _refuse_lost_sources(mixture: Mixture, table: LengthTable) -> None:
    """Raises ConfigError where a source has samples in the mixture and none in the table."""
    num_sources = len(mixture.source_names)
    offered = np.bincount(mixture.source_ids, minlength=num_sources)
    kept = np.bincount(table.rows["source"], minlength=num_sources)
    lost = [mixture.source_names[number] for number in np.flatnonzero((offered > 0) & (kept == 0))]
    if not lost:
        return
    reasons = table.rejects_by_source()[lost[0]]
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    others = f" (nor of {', '.join(lost[1:])})" if lost[1:] else ""
    raise ConfigError(
        f"mixture.sources.{lost[0]}: none of its {sum(reasons.values())} samples has a place in this run{others}: "
        f"{counts}; raise stage.max_length where they are too long, choose another template, or remove the source from "
        f"the mixture; {table.quarantine} tells them one by one"
    )


def _is_complete(place: Path) -> bool:
    return (place / "table.json").is_file()


def _beat(place: Path) -> Path:
    return place.with_name(place.name + ".beat")


def _write(
    mixture: Mixture,
    processor: Processor,
    place: Path,
    fingerprint: str,
    num_workers: int,
    show_progress: bool,
) -> None:
    partial = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    os.utime(partial)
    _remove_leftovers(partial)
    beat = _beat(place)
    beat.touch()
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
            for sign_of_life in (beat, partial):
                os.utime(sign_of_life)
    _save_rows(partial)
    about = {
        "fingerprint": fingerprint,
        "mixture": mixture.fingerprint,
        "processor": processor.fingerprint,
        "rejects": dict(sorted(rejects.items())),
        "num_rounds_cut": cut,
        "special_texts": {source: dict(sorted(counts.items())) for source, counts in sorted(special_texts.items())},
    }
    (partial / "table.json").write_text(json.dumps(about, indent=1) + "\n")
    try:
        partial.rename(place)
    except OSError:
        if not _is_complete(place):  # another run made the same table meanwhile: then ours is not needed
            raise
    beat.unlink(missing_ok=True)


def _save_rows(partial: Path) -> None:
    """rows.raw as rows.npy, which says its type and length; by memory map, since there may be tens of millions."""
    raw = partial / "rows.raw"
    np.save(partial / "rows.npy", np.memmap(raw, ROW, "r") if raw.stat().st_size else np.zeros(0, ROW))
    raw.unlink()


def _remove_leftovers(own: Path) -> None:
    """Removes what killed writers left: their process is gone from this host, or silent for ten minutes on another.

    Times are the file system's, so that clocks of hosts may differ: `own` has just been touched.
    """
    now = heartbeat_mtime(own) or 0
    for partial in own.parent.glob("*.partial"):
        host, _, pid = partial.stem.partition(".")[2].rpartition(".")
        is_gone = host == socket.gethostname() and not Path("/proc", pid).exists()
        if is_gone or now - (heartbeat_mtime(partial) or now) > _DEAD_AFTER_S * 1e9:
            shutil.rmtree(partial, ignore_errors=True)


_Counted = tuple[np.ndarray, list[dict[str, object]], int, dict[str, Counter[str]]]

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
    follow_parent(parent)
    gc.freeze()  # what was there before the fork stays shared: a collection would write to all of its pages
    _set_shared(mixture, processor)


def _set_shared(mixture: Mixture, processor: Processor) -> None:
    global _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shared = (mixture, processor)


def _count(numbers: range) -> _Counted:
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
        found = processor.special_texts(text.messages)
        if found:
            special.setdefault(text.source, Counter()).update(found)
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
