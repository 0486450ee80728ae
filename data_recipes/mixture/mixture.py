"""A mixture of prepared sources: one global index of training samples, held-out samples, and a fingerprint.

Held-out images are excluded from the training samples of every source. `selection.py` selects the samples of each
store, `order.py` their order in training.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_recipes.mixture.selection import (
    Rows,
    collect_image_hashes,
    drop_heldout_images,
    merge_hashes,
    resolve_counts,
    select_heldout,
    select_trainable_rows,
    select_training_rows,
)
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_yaml, reject_unknown_keys
from data_recipes.store.reader import Store, StoredSample, StoredText


def list_sources(mixtures: Sequence[MixtureConfig]) -> list[str]:
    """Return the names of all sources of the mixtures, those of `exclude` included, sorted."""
    return sorted({name for each in mixtures for name in (*each.sources, *each.exclude)})


def read_mixture(configs: Path | Sequence[Path], name: str) -> MixtureConfig:
    """Read and validate `mixture/<name>.yaml`, of the first of the folders that has it, without Hydra.

    Raises:
        DataError: the file does not exist, or it has unknown keys or invalid values.
    """
    values = read_yaml(configs, "mixture", name)
    path = f"configs/mixture/{name}.yaml"
    reject_unknown_keys(path, values, ("name", "seed", "sources", "exclude"))
    seed, sources = values.get("seed", 0), values.get("sources")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise DataError(f"{path}: `seed` is {seed!r}, but must be a non-negative integer.")
    if not isinstance(sources, dict):
        raise DataError(f"{path}: `sources` must be a mapping of source names to counts.")
    shares: dict[str, SourceShare] = {}
    for source, share in sources.items():
        share = share or {}
        if not isinstance(share, dict):
            raise DataError(f"{path}: `sources.{source}` is {share!r}; write {{count: {share}}}.")
        reject_unknown_keys(f"{path}: `sources.{source}`", share, ("count", "holdout", "share"))
        for key, value in share.items():
            types = {"count": int | None, "holdout": int, "share": int | float | None}[key]
            if isinstance(value, bool) or not isinstance(value, types):
                expected = "a number between 0 and 1" if key == "share" else "an integer"
                raise DataError(f"{path}: `sources.{source}.{key}` is {value!r}, but must be {expected}.")
        try:
            shares[str(source)] = SourceShare(**share)
        except DataError as error:
            raise DataError(f"{path}: sources.{source}.{error}") from error
    exclude = values.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(entry, str) for entry in exclude):
        raise DataError(f"{path}: `exclude` is {exclude!r}, but must be a list of source names.")
    return MixtureConfig(str(values.get("name", name)), seed, shares, tuple(exclude))


@dataclass(frozen=True)
class _Part:
    """The selected rows of one source, and the counts of its other rows.

    Attributes:
        store: the source's store.
        share: the configured count, share and holdout.
        num_requested: number of training samples; None for all.
        used: rows of the training samples, int64 [n].
        heldout: rows of the held-out samples, int64 [holdout].
        num_excluded: samples that have an image of an excluded store.
        num_sharing_heldout: samples that share an image with a held-out sample.
    """

    store: Store
    share: SourceShare
    num_requested: int | None
    used: Rows
    heldout: Rows
    num_excluded: int
    num_sharing_heldout: int


class Mixture:
    """The training samples of a mixture by global index, and its held-out samples by source.

    Training samples are numbered by source, with sources sorted by name, and by row of the store within a source. The
    order of the sources in the YAML has no effect. Only row numbers are stored, so pickling for loader workers is
    cheap.

    Attributes:
        config: the configuration.
        source_names: names of the sources, sorted.
        source_ids: index of the source of each training sample, int16 [num_samples].
        num_samples: number of training samples.
        num_excluded: {source: samples that have an image of an excluded store}.
        num_sharing_heldout: {source: samples that share an image with a held-out sample}.
        fingerprint: sha256 that identifies the training and held-out samples.
    """

    def __init__(self, config: MixtureConfig, parts: Sequence[_Part]) -> None:
        self.config = config
        self._parts = tuple(parts)
        self.source_names: tuple[str, ...] = tuple(part.store.name for part in parts)
        counts = [len(part.used) for part in parts]
        self.source_ids: npt.NDArray[np.int16] = np.repeat(np.arange(len(parts), dtype=np.int16), counts)
        self.num_samples = int(sum(counts))
        self.num_excluded: dict[str, int] = {part.store.name: part.num_excluded for part in parts}
        self.num_sharing_heldout: dict[str, int] = {part.store.name: part.num_sharing_heldout for part in parts}
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.fingerprint = _fingerprint(parts)

    @classmethod
    def open(cls, config: MixtureConfig, store_root: Path, copies: Mapping[str, Path] | None = None) -> "Mixture":
        """Open the stores of a mixture and select its samples.

        Samples of any source that have a held-out image, or an image of an excluded store, are not used for training.
        They are counted in `num_sharing_heldout` and `num_excluded`.

        Args:
            config: the configuration.
            store_root: folder of the stores `<source>/`.
            copies: {source: path of a local copy of its store}.

        Raises:
            DataError: a store is missing or incomplete, or has fewer samples than requested.
        """
        store_root = Path(store_root)
        names = sorted(config.sources)
        paths = {name: store_root / name for name in names} | dict(copies or {})
        stores = {name: Store.open(paths[name]) for name in names}
        heldout = {name: select_heldout(stores[name], config.sources[name].holdout) for name in names}
        excluded = merge_hashes([Store.open(store_root / name).all_image_hashes() for name in config.exclude])
        trainable = {name: select_trainable_rows(stores[name], heldout[name], excluded) for name in names}
        heldout_hashes = merge_hashes([collect_image_hashes(stores[name], heldout[name]) for name in names])
        candidates = {name: drop_heldout_images(stores[name], trainable[name], heldout_hashes) for name in names}
        requested = resolve_counts(config.sources, {name: len(rows) for name, rows in candidates.items()})
        parts = []
        for name in names:
            store = stores[name]
            num_excluded = len(store) - len(heldout[name]) - len(trainable[name])
            num_sharing = len(trainable[name]) - len(candidates[name])
            if (requested[name] or 0) > len(candidates[name]):
                raise _make_count_error(store, config.sources[name], requested[name] or 0, num_excluded, num_sharing)
            used = select_training_rows(store, requested[name], candidates[name], config.seed)
            share = config.sources[name]
            parts.append(_Part(store, share, requested[name], used, heldout[name], num_excluded, num_sharing))
        return cls(config, parts)

    def text(self, index: int) -> StoredText:
        """Return training sample `index` without its images."""
        part, row = self._locate(index)
        return part.store.text(row)

    def sample(self, index: int) -> StoredSample:
        """Return training sample `index` with its images."""
        part, row = self._locate(index)
        return part.store.sample(row)

    def heldout(self, source: str) -> list[int]:
        """Return the numbers 0 .. holdout - 1 of the held-out samples of `source`, for `heldout_sample`.

        The samples are ordered by hash, so the first n are a random subset.
        """
        return list(range(len(self._part(source).heldout)))

    def heldout_sample(self, source: str, number: int) -> StoredSample:
        """Return held-out sample `number` of `source` with its images."""
        part = self._part(source)
        return part.store.sample(int(part.heldout[number]))

    def heldout_text(self, source: str, number: int) -> StoredText:
        """Return held-out sample `number` of `source` without its images."""
        part = self._part(source)
        return part.store.text(int(part.heldout[number]))

    def table(self) -> list[dict[str, Any]]:
        """Return one dictionary per source with its counts, share of the mixture, rejects and licence."""
        return [
            {
                "source": part.store.name,
                "wanted": part.num_requested,
                "expected_count": part.store.manifest["expected_count"],
                "found": len(part.store),
                "held_out": len(part.heldout),
                "beside_heldout": part.num_sharing_heldout,
                "excluded": part.num_excluded,
                "used": len(part.used),
                "share": len(part.used) / max(1, self.num_samples),
                "rejects": dict(part.store.manifest["rejects"]),
                "licence": part.store.manifest["licence"],
            }
            for part in self._parts
        ]

    def store(self, source: str) -> Store:
        """Return the store of `source`."""
        return self._part(source).store

    def describe_sample(self, index: int) -> str:
        """Describe sample `index` for a message, by its id or, if its text cannot be read, by its row."""
        part, row = self._locate(index)
        try:
            return f"sample {part.store.text(row).id!r} of source {part.store.name}"
        except (OSError, ValueError):
            return f"the sample in row {row} of source {part.store.name}"

    def _locate(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is out of range; mixture {self.config.name} has {self.num_samples}")
        number = int(self.source_ids[index])
        part = self._parts[number]
        return part, int(part.used[index - self._starts[number]])

    def _part(self, source: str) -> _Part:
        for part in self._parts:
            if part.store.name == source:
                return part
        raise DataError(f"mixture {self.config.name} has no source {source!r}; it has {', '.join(self.source_names)}.")


def _make_count_error(
    store: Store, share: SourceShare, num_requested: int, num_excluded: int, num_sharing: int
) -> DataError:
    num_available = len(store) - share.holdout - num_excluded - num_sharing
    key = f"sources.{store.name}." + ("count" if share.share is None else "share")
    return DataError(
        f"source {store.name}: {num_requested} samples requested, {num_available} available ({len(store)} in the "
        f"store, {share.holdout} held out, {num_sharing} with a held-out image, {num_excluded} with an image of "
        f"`exclude`). Lower `{key}`" + (", or set it to null for all." if share.share is None else ".")
    )


def _fingerprint(parts: Sequence[_Part]) -> str:
    """Compute the sha256 over the stores' names and fingerprints and the selected rows.

    It depends on nothing else, so that settings without effect on the samples, such as the name of the mixture or a
    seed where all samples are used, do not change it.
    """
    digest = hashlib.sha256(b"data_recipes mixture 2\n")
    for part in parts:
        head = [part.store.name, part.store.fingerprint, len(part.used), len(part.heldout)]
        digest.update(json.dumps(head).encode())
        digest.update(part.used.astype("<i8").tobytes())
        digest.update(part.heldout.astype("<i8").tobytes())
    return digest.hexdigest()
