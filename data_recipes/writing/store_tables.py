"""The contents of a store while it is written: two tables, what was met before, the counts, the fingerprint.

Owns: the columns, keeping a picture once, telling ids apart, counting rejects and repairs, the quarantine, the
checkpoints that a killed start goes on from, the manifest.
Leaves: where the folder stands, and that it appears whole or not at all, to `writer.py`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Features, List, Value

from data_recipes.raw.image_files import LoadedPicture
from data_recipes.schema.sample import Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo, describe
from data_recipes.store.durable import sync
from data_recipes.store.reader import FORMAT
from data_recipes.writing.arrow_folder import Shard, TableWriter, file_digest, write_dict_file
from data_recipes.writing.sample_stream import Loaded, Mark
from data_recipes.writing.seen import SeenIndex

# A checkpoint ends a shard of both tables, so that no file grows beyond what file systems and copies like.
CHECKPOINT_BYTES = 1 << 30
CHECKPOINT_RECORDS = 100_000

_SAMPLES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "text": Value("string")}),
        "pictures": List(Value("int32")),
    }
)
_PICTURES = Features(
    {
        "sha256": Value("string"),
        "bytes": Value("binary"),
        "height": Value("int32"),
        "width": Value("int32"),
        "format": Value("string"),
    }
)


class RejectedError(Exception):
    """Too many records were rejected, or the first one under `--strict`; no store was written."""


@dataclass(frozen=True)
class StoreReport:
    """What became of one source's records."""

    name: str
    path: Path
    num_records: int
    num_samples: int
    num_pictures: int
    rejects: dict[str, int]
    repairs: dict[str, int]
    fingerprint: str


class StoreTables:
    """The two tables, the index of what was met, the counts and the fingerprint, while they grow.

    Everything up to the last `checkpoint` can be opened again; it is a function of the stream alone, so a store
    that was gone on with is, byte for byte, the one that was made in one go.
    """

    features: ClassVar[Features] = _SAMPLES

    def __init__(self, folder: Path, source: SourceInfo) -> None:
        """Open the folder at its last checkpoint, or begin it."""
        self._folder = folder
        self._source = source
        self._seen = SeenIndex(folder / "seen.sqlite")
        at = self._seen.progress() or {}
        self.has_checkpoint = bool(at)
        self._samples = TableWriter(
            folder / "samples", self.features, batch_rows=1000, shards=[Shard(**s) for s in at.get("samples", [])]
        )
        self._pictures = TableWriter(
            folder / "pictures", _PICTURES, batch_rows=100, shards=[Shard(**s) for s in at.get("pictures", [])]
        )
        self._quarantine = (folder / "quarantine.jsonl").open("ab")
        self._quarantine.truncate(at.get("quarantine_bytes", 0))
        self._content = bytes.fromhex(at.get("content", "")) or hashlib.sha256(b"data_recipes store 2\n").digest()
        self._picture_bytes: int = at.get("picture_bytes", 0)
        self._bytes_since = 0
        self._records_since = 0
        self.mark = Mark(*at.get("mark", ()))
        self.num_records: int = at.get("num_records", 0)
        self.rejects: Counter[str] = Counter(at.get("rejects", {}))
        self.repairs: Counter[str] = Counter(at.get("repairs", {}))

    def add(self, loaded: Loaded, mark: Mark, strict: bool = False) -> Reject | None:
        """Take in one record; returns it if it is left out. `mark` lies behind it.

        Raises:
            RejectedError: it is left out, and `strict`.
            OSError: the disk is full or failing.
        """
        rejected = loaded if isinstance(loaded, Reject) else self._add_sample(*loaded, mark)
        if rejected is not None:
            if strict:
                raise RejectedError(
                    f"source {self._source.name}: {rejected.reason} at {rejected.place or rejected.id}: "
                    f"{rejected.detail} "
                    "(--strict stops at the first bad record; without it, bad records are left out and counted)."
                )
            self.rejects[rejected.reason.value] += 1
            self._quarantine.write(json.dumps(self._quarantine_line(rejected, mark)).encode() + b"\n")
        self.mark = mark
        self.num_records += 1
        self._records_since += 1
        if self._bytes_since >= CHECKPOINT_BYTES or self._records_since >= CHECKPOINT_RECORDS:
            self.checkpoint()
        return rejected

    def checkpoint(self) -> None:
        """Force everything onto the disk: a later start goes on from here.

        Raises:
            OSError: the disk is full or failing.
        """
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        progress = {
            "mark": self.mark,
            "samples": [asdict(shard) for shard in self._samples.cut()],
            "pictures": [asdict(shard) for shard in self._pictures.cut()],
            "quarantine_bytes": self._quarantine.tell(),
            "content": self._content.hex(),
            "picture_bytes": self._picture_bytes,
            "num_records": self.num_records,
            "rejects": self.rejects,
            "repairs": self.repairs,
        }
        self._seen.commit(progress)
        self.has_checkpoint = True
        self._bytes_since = self._records_since = 0

    def finish(self, path: Path, about: Mapping[str, Any] | None = None) -> StoreReport:
        """Write what is left, and, when all of it is on the disk, the manifest; `about` goes into it.

        Raises:
            OSError: the disk is full or failing.
        """
        fingerprint = self._content.hex()
        self._samples.close(fingerprint[:16])
        self._pictures.close(fingerprint[16:32])
        self._quarantine.close()
        write_dict_file(self._folder, ["samples", "pictures"])
        report = StoreReport(
            name=self._source.name,
            path=path,
            num_records=self.num_records,
            num_samples=self._samples.num_rows,
            num_pictures=self._pictures.num_rows,
            rejects=dict(sorted(self.rejects.items())),
            repairs=dict(sorted(self.repairs.items())),
            fingerprint=fingerprint,
        )
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            **describe(self._source),
            "num_records": report.num_records,
            "num_samples": report.num_samples,
            "num_pictures": report.num_pictures,
            "num_picture_bytes": self._picture_bytes,
            "rejects": report.rejects,
            "repairs": report.repairs,
            **(about or {}),
            "files": self._files(),
        }
        sync(self._folder)
        with (self._folder / "manifest.json").open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._seen.remove()
        return report

    def abandon(self) -> None:
        """Let go of the open files; what was checkpointed stays in the folder."""
        self._samples.abandon()
        self._pictures.abandon()
        self._seen.close()
        with suppress(OSError):  # what it could not write is behind the checkpoint
            self._quarantine.close()

    def _add_sample(self, sample: Sample, pictures: list[LoadedPicture], mark: Mark) -> Reject | None:
        messages = [[message.role, message.text] for message in sample.messages]
        hashes = [picture.info.sha256 for picture in pictures]
        content = hashlib.sha256(_canonical([messages, hashes])).digest()
        sample_id = sample.id
        repairs = [*sample.repairs, *(note for picture in pictures for note in picture.notes)]
        if self._seen.has_id(sample_id) and not self._seen.has_sample(sample_id, content):
            # LLaVA-158K names three different conversations after one COCO picture: not a repetition.
            sample_id = f"{sample_id}~{content.hex()[:12]}"
            repairs.append("id_made_unique")
        if self._seen.has_id(sample_id):
            detail = "a record of this id and this content came before"
            return Reject(sample.id, Reason.DUPLICATE_ID, detail, sample.place)
        self._seen.add_sample(sample.id, content)
        self._seen.add_sample(sample_id, content)
        self.repairs.update(repairs)
        self._write_sample(sample_id, sample, pictures)
        self._content = hashlib.sha256(self._content + _canonical([sample_id, messages, hashes])).digest()
        return None

    def _write_sample(self, sample_id: str, sample: Sample, pictures: list[LoadedPicture], **more: object) -> None:
        rows = [self._picture_row(picture) for picture in pictures]
        turns = [{"role": message.role, "text": message.text} for message in sample.messages]
        num_bytes = sum(len(message.text) for message in sample.messages)
        self._samples.write({"id": sample_id, "messages": turns, "pictures": rows, **more}, num_bytes)
        self._bytes_since += num_bytes

    def _picture_row(self, picture: LoadedPicture) -> int:
        info = picture.info
        row = self._seen.picture_row(info.sha256)
        if row is None:
            record = {
                "sha256": info.sha256,
                "bytes": picture.data,
                "height": info.height,
                "width": info.width,
                "format": info.format,
            }
            row = self._pictures.write(record, len(picture.data))
            self._seen.add_picture(info.sha256, row)
            self._picture_bytes += len(picture.data)
            self._bytes_since += len(picture.data)
        return row

    def _quarantine_line(self, reject: Reject, mark: Mark) -> dict[str, object]:
        return {"id": reject.id, "reason": reject.reason, "detail": reject.detail, "place": reject.place}

    def _files(self) -> dict[str, dict[str, Any]]:
        """{path in the store: bytes and sha256} of every file but the manifest itself, for whoever copies it."""
        files = {}
        for table, writer in (("samples", self._samples), ("pictures", self._pictures)):
            for shard in writer.shards:
                files[f"{table}/{shard.name}"] = {"bytes": shard.num_bytes, "sha256": shard.sha256}
            for name in ("state.json", "dataset_info.json"):
                files[f"{table}/{name}"] = file_digest(self._folder / table / name)
        for name in ("dataset_dict.json", "quarantine.jsonl"):
            files[name] = file_digest(self._folder / name)
        return dict(sorted(files.items()))


def _canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
