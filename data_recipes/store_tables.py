"""The contents of a store while it is written: two tables, what was met before, the counts, the fingerprint.

Owns: the columns, keeping a picture once, telling ids apart, counting rejects and repairs, the manifest.
Leaves: where the folder stands, and that it appears whole or not at all, to `store.py`.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datasets import Features, List, Value

from data_recipes.arrow_folder import TableWriter, write_dict_file
from data_recipes.pictures import LoadedPicture
from data_recipes.sample import Reason, Reject, Sample
from data_recipes.seen import SeenIndex
from data_recipes.source import SourceInfo, describe

FORMAT = 1  # of the store; another number is another layout

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
    """The two tables, the index of what was met, the counts and the fingerprint, while they grow."""

    def __init__(self, folder: Path, source: SourceInfo) -> None:
        self._folder = folder
        self._source = source
        self._samples = TableWriter(folder / "samples", _SAMPLES, batch_rows=1000)
        self._pictures = TableWriter(folder / "pictures", _PICTURES, batch_rows=100)
        self._seen = SeenIndex(folder / "seen.sqlite")
        self._content = hashlib.sha256(b"data_recipes store 1\n")
        self._picture_bytes = 0
        self.num_records = 0
        self.rejects: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()

    def add(self, item: tuple[Sample, list[LoadedPicture]] | Reject, quarantine: IO[str], strict: bool) -> None:
        self.num_records += 1
        result = item if isinstance(item, Reject) else self._add_sample(*item)
        if result is None:
            return
        if strict:
            raise RejectedError(
                f"source {self._source.name}: {result.reason} at {result.place or result.id}: "
                f"{result.detail} "
                "(--strict stops at the first bad record; without it, bad records are left out and counted)."
            )
        self.rejects[result.reason.value] += 1
        line = {"id": result.id, "reason": result.reason, "detail": result.detail, "place": result.place}
        quarantine.write(json.dumps(line) + "\n")

    def _add_sample(self, sample: Sample, pictures: list[LoadedPicture]) -> Reject | None:
        messages = [[message.role, message.text] for message in sample.messages]
        hashes = [picture.info.sha256 for picture in pictures]
        content = hashlib.sha256(_canonical([messages, hashes])).digest()
        sample_id = sample.id
        repairs = list(sample.repairs)
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
        rows = [self._picture_row(picture) for picture in pictures]
        turns = [{"role": role, "text": text} for role, text in messages]
        num_bytes = sum(len(text) for _, text in messages)
        self._samples.write({"id": sample_id, "messages": turns, "pictures": rows}, num_bytes)
        self._content.update(_canonical([sample_id, messages, hashes]))
        return None

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
        return row

    def finish(self, path: Path, inputs: dict[str, str]) -> StoreReport:
        fingerprint = self._content.hexdigest()
        self._samples.close(fingerprint[:16])
        self._pictures.close(fingerprint[16:32])
        self._seen.close()
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
            "inputs": inputs,
        }
        manifest["files"] = {name: _describe_file(self._folder / name) for name in table_files(self._folder)}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "manifest.json").write_text(text, encoding="utf-8")
        return report

    def abandon(self) -> None:
        self._samples.abandon()
        self._pictures.abandon()
        self._seen.close()


def table_files(store: Path) -> list[str]:
    """The files that hold both tables, relative to the store, sorted: what its manifest lists."""
    tables = (path for table in ("samples", "pictures") for path in (store / table).iterdir())
    return sorted(str(path.relative_to(store)) for path in (store / "dataset_dict.json", *tables))


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
