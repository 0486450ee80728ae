"""Writes the contents of a store: both tables, the quarantine, the checkpoints, and the manifest.

Each distinct image is stored once, and sample ids are made unique. `writer.py` makes the store appear atomically.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Features, List, Value

from data_recipes.raw.image_files import LoadedImage
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo, describe_source
from data_recipes.store.durable import sync_folder
from data_recipes.store.reader import FORMAT
from data_recipes.writing.arrow_folder import Shard, TableWriter, describe_file, write_dataset_dict
from data_recipes.writing.sample_stream import LoadedRecord, StreamPosition
from data_recipes.writing.seen import SeenIndex

# A checkpoint completes a shard of both tables, which also limits the size of the files.
CHECKPOINT_BYTES = 1 << 30
CHECKPOINT_RECORDS = 100_000
MAX_NOTES = 100
"""Different notes that a manifest lists; a file whose keys are ids would have one for each record."""
OTHER_NOTES = "other"

_SAMPLES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "text": Value("string")}),
        "pictures": List(Value("int32")),
    }
)
_IMAGES = Features(
    {
        "sha256": Value("string"),
        "bytes": Value("binary"),
        "height": Value("int32"),
        "width": Value("int32"),
        "format": Value("string"),
    }
)


class RejectedError(Exception):
    """Too many records were rejected, or one with `--strict`. No store was written.

    Attributes:
        all_rejected: names of the sources of which every record was rejected.
    """

    def __init__(self, message: str, all_rejected: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.all_rejected = tuple(all_rejected)


class IncompleteError(DataError):
    """The raw files have too few records, because a part of them is missing. No store was written."""


@dataclass(frozen=True)
class StoreReport:
    """Counts and fingerprint of a complete store.

    Attributes:
        name: name of the source.
        path: path of the store.
        num_records: number of raw records.
        num_samples: number of samples in the store.
        num_images: number of distinct images.
        rejects: {reason: number of rejected records}.
        repairs: {repair: number of changed samples}.
        notes: {note: {"records": number of samples, "example": of the first one}}.
        fingerprint: sha256 of the samples.
    """

    name: str
    path: Path
    num_records: int
    num_samples: int
    num_images: int
    rejects: dict[str, int]
    repairs: dict[str, int]
    notes: dict[str, dict[str, Any]]
    fingerprint: str


class StoreTables:
    """The tables, index, counts and fingerprint of a store that is being written.

    The state of the last `checkpoint` can be opened again. It depends on the stream only, so a resumed store is byte
    for byte the one that an uninterrupted run writes.
    """

    features: ClassVar[Features] = _SAMPLES

    def __init__(self, folder: Path, source: SourceInfo) -> None:
        """Open the folder at its last checkpoint, or start a new store."""
        self._folder = folder
        self._source = source
        self._seen = SeenIndex(folder / "seen.sqlite")
        progress = self._seen.progress() or {}
        self.has_checkpoint = bool(progress)
        self._samples = TableWriter(
            folder / "samples", self.features, batch_rows=1000, shards=[Shard(**s) for s in progress.get("samples", [])]
        )
        self._images = TableWriter(
            folder / "pictures", _IMAGES, batch_rows=100, shards=[Shard(**s) for s in progress.get("pictures", [])]
        )
        self._quarantine = (folder / "quarantine.jsonl").open("ab")
        self._quarantine.truncate(progress.get("quarantine_bytes", 0))
        self._content = bytes.fromhex(progress.get("content", "")) or hashlib.sha256(b"data_recipes store 2\n").digest()
        self._image_bytes: int = progress.get("picture_bytes", 0)
        self._bytes_since = 0
        self._records_since = 0
        self.position = StreamPosition(*progress.get("mark", ()))
        self.num_records: int = progress.get("num_records", 0)
        self.rejects: Counter[str] = Counter(progress.get("rejects", {}))
        self.repairs: Counter[str] = Counter(progress.get("repairs", {}))
        self.notes: dict[str, dict[str, Any]] = progress.get("notes", {})

    def add(self, loaded: LoadedRecord, position: StreamPosition, strict: bool = False) -> Reject | None:
        """Add one record.

        Args:
            loaded: the record.
            position: position in the stream after the record.
            strict: raise an error if the record is rejected.

        Returns:
            The `Reject` if the record is rejected, else None.

        Raises:
            RejectedError: the record is rejected, and `strict` is set.
            OSError: the disk is full or failing.
        """
        reject = loaded if isinstance(loaded, Reject) else self._add_sample(*loaded, position)
        if reject is not None:
            if strict:
                raise RejectedError(
                    f"source {self._source.name}: {reject.reason} at {reject.location or reject.id}: "
                    f"{reject.detail} "
                    "(--strict stops at the first invalid record; without it, invalid records are skipped and counted)."
                )
            self.rejects[reject.reason.value] += 1
            self._quarantine.write(json.dumps(self._quarantine_line(reject, position)).encode() + b"\n")
        self.position = position
        self.num_records += 1
        self._records_since += 1
        if self._bytes_since >= CHECKPOINT_BYTES or self._records_since >= CHECKPOINT_RECORDS:
            self.checkpoint()
        return reject

    def checkpoint(self) -> None:
        """Make the current state durable, so that a later run can resume from it.

        Raises:
            OSError: the disk is full or failing.
        """
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        progress = {
            "mark": self.position,
            "samples": [asdict(shard) for shard in self._samples.finish_shard()],
            "pictures": [asdict(shard) for shard in self._images.finish_shard()],
            "quarantine_bytes": self._quarantine.tell(),
            "content": self._content.hex(),
            "picture_bytes": self._image_bytes,
            "num_records": self.num_records,
            "rejects": self.rejects,
            "repairs": self.repairs,
            "notes": self.notes,
        }
        self._seen.commit(progress)
        self.has_checkpoint = True
        self._bytes_since = self._records_since = 0

    def finish(self, path: Path, extra_manifest: Mapping[str, Any] | None = None) -> StoreReport:
        """Write the remaining data and, after it is durable, the manifest.

        Args:
            path: final path of the store, for the report.
            extra_manifest: additional entries of the manifest.

        Raises:
            OSError: the disk is full or failing.
        """
        fingerprint = self._content.hex()
        self._samples.close(fingerprint[:16])
        self._images.close(fingerprint[16:32])
        self._quarantine.close()
        write_dataset_dict(self._folder, ["samples", "pictures"])
        report = StoreReport(
            name=self._source.name,
            path=path,
            num_records=self.num_records,
            num_samples=self._samples.num_rows,
            num_images=self._images.num_rows,
            rejects=dict(sorted(self.rejects.items())),
            repairs=dict(sorted(self.repairs.items())),
            notes=dict(sorted(self.notes.items())),
            fingerprint=fingerprint,
        )
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            **describe_source(self._source),
            "num_records": report.num_records,
            "num_samples": report.num_samples,
            "num_pictures": report.num_images,
            "num_picture_bytes": self._image_bytes,
            "rejects": report.rejects,
            "repairs": report.repairs,
            "notes": report.notes,
            **(extra_manifest or {}),
            "files": self._files(),
        }
        sync_folder(self._folder)
        with (self._folder / "manifest.json").open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._seen.remove()
        return report

    def abort(self) -> None:
        """Close the open files. The state of the last checkpoint remains in the folder."""
        self._samples.abort()
        self._images.abort()
        self._seen.close()
        with suppress(OSError):  # the unwritten data is after the last checkpoint
            self._quarantine.close()

    def _add_sample(self, sample: Sample, images: list[LoadedImage], position: StreamPosition) -> Reject | None:
        messages = [[message.role, message.text] for message in sample.messages]
        hashes = [image.info.sha256 for image in images]
        content = hashlib.sha256(_canonical([messages, hashes])).digest()
        sample_id = sample.id
        repairs = [*sample.repairs, *(note for image in images for note in image.notes)]
        if self._seen.has_id(sample_id) and not self._seen.has_sample(sample_id, content):
            # Not a duplicate: LLaVA-158K has three different conversations with the id of the same COCO image.
            sample_id = f"{sample_id}~{content.hex()[:12]}"
            repairs.append("id_made_unique")
        if self._seen.has_id(sample_id):
            detail = "duplicate of an earlier record with the same id and content"
            return Reject(sample.id, Reason.DUPLICATE_ID, detail, sample.location)
        self._seen.add_sample(sample.id, content)
        self._seen.add_sample(sample_id, content)
        self.repairs.update(repairs)
        self._count_notes(sample)
        self._write_sample(sample_id, sample, images)
        self._content = hashlib.sha256(self._content + _canonical([sample_id, messages, hashes])).digest()
        return None

    def _count_notes(self, sample: Sample) -> None:
        for name, example in sample.notes:
            if name not in self.notes and len(self.notes) >= MAX_NOTES:
                name, example = OTHER_NOTES, f"{name}: {example}"
            note = self.notes.setdefault(name, {"records": 0, "example": example})
            note["records"] += 1

    def _write_sample(self, sample_id: str, sample: Sample, images: list[LoadedImage], **extra: object) -> None:
        rows = [self._image_row(image) for image in images]
        turns = [{"role": message.role, "text": message.text} for message in sample.messages]
        num_bytes = sum(len(message.text) for message in sample.messages)
        self._samples.write({"id": sample_id, "messages": turns, "pictures": rows, **extra}, num_bytes)
        self._bytes_since += num_bytes

    def _image_row(self, image: LoadedImage) -> int:
        info = image.info
        row = self._seen.image_row(info.sha256)
        if row is None:
            record = {
                "sha256": info.sha256,
                "bytes": image.data,
                "height": info.height,
                "width": info.width,
                "format": info.format,
            }
            row = self._images.write(record, len(image.data))
            self._seen.add_image(info.sha256, row)
            self._image_bytes += len(image.data)
            self._bytes_since += len(image.data)
        return row

    def _quarantine_line(self, reject: Reject, position: StreamPosition) -> dict[str, object]:
        return {"id": reject.id, "reason": reject.reason, "detail": reject.detail, "place": reject.location}

    def _files(self) -> dict[str, dict[str, Any]]:
        """Return {path in the store: size and sha256} of every file except the manifest, to verify copies."""
        files = {}
        for table, writer in (("samples", self._samples), ("pictures", self._images)):
            for shard in writer.shards:
                files[f"{table}/{shard.name}"] = {"bytes": shard.num_bytes, "sha256": shard.sha256}
            for name in ("state.json", "dataset_info.json"):
                files[f"{table}/{name}"] = describe_file(self._folder / table / name)
        for name in ("dataset_dict.json", "quarantine.jsonl"):
            files[name] = describe_file(self._folder / name)
        return dict(sorted(files.items()))


def _canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
