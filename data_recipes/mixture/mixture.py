"""Sources with counts, put together: one global index, exact numbers, held-out samples, one fingerprint.

Owns: the YAML's rules, keeping held-out pictures out of training in every source, the global numbers, the fingerprint.
Leaves: what is chosen of one store to `selection.py`, what is in it to `reader.py`, the order of an epoch to
`order.py`.
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
    choose_heldout,
    choose_used,
    free_rows,
    hashes_of,
    resolve_counts,
    unique_hashes,
    without_held_out,
)
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_yaml, refuse_unknown
from data_recipes.store.reader import Store, StoredSample, StoredText


def read_mixture(configs: Path, name: str) -> MixtureConfig:
    """The mixture `configs/mixture/<name>.yaml`, for programs that do without Hydra.

    Raises:
        DataError: there is none (the known ones are listed), or it has unknown keys or values of a wrong
            type.
    """
    values = read_yaml(configs, "mixture", name)
    place = f"configs/mixture/{name}.yaml"
    refuse_unknown(place, values, ("name", "seed", "sources", "exclude"))
    seed, sources = values.get("seed", 0), values.get("sources")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise DataError(f"{place}: `seed` is {seed!r}, and must be a whole number, 0 or more.")
    if not isinstance(sources, dict):
        raise DataError(f"{place}: `sources` must map names of sources to counts.")
    shares: dict[str, SourceShare] = {}
    for source, share in sources.items():
        share = share or {}
        if not isinstance(share, dict):
            raise DataError(f"{place}: `sources.{source}` is {share!r}; write {{count: {share}}}.")
        refuse_unknown(f"{place}: `sources.{source}`", share, ("count", "holdout", "share"))
        for key, value in share.items():
            kinds = {"count": int | None, "holdout": int, "share": int | float | None}[key]
            if isinstance(value, bool) or not isinstance(value, kinds):
                what = "a number between 0 and 1" if key == "share" else "a whole number"
                raise DataError(f"{place}: `sources.{source}.{key}` is {value!r}, and must be {what}.")
        try:
            shares[str(source)] = SourceShare(**share)
        except DataError as error:
            raise DataError(f"{place}: sources.{source}.{error}") from error
    exclude = values.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(entry, str) for entry in exclude):
        raise DataError(f"{place}: `exclude` must be a list of names of sources, got {exclude!r}.")
    return MixtureConfig(str(values.get("name", name)), seed, shares, tuple(exclude))


@dataclass(frozen=True)
class _Part:
    """One source's place in a mixture: rows of its store, and how they came about."""

    store: Store
    share: SourceShare
    num_wanted: int | None
    used: Rows
    heldout: Rows
    num_excluded: int
    num_beside_heldout: int


class Mixture:
    """The training side of a mixture by global number, and its held-out samples by source.

    Samples are numbered source by source, sources by name, in each source by its store's order: the order in
    which a YAML lists sources changes nothing. Holds row numbers only, so it is cheap to pickle into loader
    workers.
    """

    def __init__(self, config: MixtureConfig, parts: Sequence[_Part]) -> None:
        self.config = config
        self._parts = tuple(parts)
        self.source_names: tuple[str, ...] = tuple(part.store.name for part in parts)
        counts = [len(part.used) for part in parts]
        self.source_ids: npt.NDArray[np.int16] = np.repeat(np.arange(len(parts), dtype=np.int16), counts)
        self.num_samples = int(sum(counts))
        self.excluded: dict[str, int] = {part.store.name: part.num_excluded for part in parts}
        self.beside_heldout: dict[str, int] = {part.store.name: part.num_beside_heldout for part in parts}
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.fingerprint = _fingerprint(parts)

    @classmethod
    def open(cls, config: MixtureConfig, store_root: Path, copies: Mapping[str, Path] | None = None) -> "Mixture":
        """Open the stores `store_root/<source>`, or a source's copy where there is one, and choose.

        A held-out picture, or one of an excluded store, is in the training side of no source: samples of any
        source that show one are left out, and counted apart (`excluded`, `beside_heldout`).

        Raises:
            DataError: a store is absent or unfinished, or more is wanted than was found.
        """
        store_root = Path(store_root)
        names = sorted(config.sources)
        places = {name: store_root / name for name in names} | dict(copies or {})
        stores = {name: Store.open(places[name]) for name in names}
        heldout = {name: choose_heldout(stores[name], config.sources[name].holdout) for name in names}
        excluded = unique_hashes([Store.open(store_root / name).all_picture_hashes() for name in config.exclude])
        free = {name: free_rows(stores[name], heldout[name], excluded) for name in names}
        hidden = unique_hashes([hashes_of(stores[name], heldout[name]) for name in names])
        candidates = {name: without_held_out(stores[name], free[name], hidden) for name in names}
        wanted = resolve_counts(config.sources, {name: len(rows) for name, rows in candidates.items()})
        parts = []
        for name in names:
            store = stores[name]
            num_excluded = len(store) - len(heldout[name]) - len(free[name])
            num_beside = len(free[name]) - len(candidates[name])
            if (wanted[name] or 0) > len(candidates[name]):
                raise _too_few(store, config.sources[name], wanted[name] or 0, num_excluded, num_beside)
            used = choose_used(store, wanted[name], candidates[name], config.seed)
            share = config.sources[name]
            parts.append(_Part(store, share, wanted[name], used, heldout[name], num_excluded, num_beside))
        return cls(config, parts)

    def text(self, index: int) -> StoredText:
        """Sample `index` without picture bytes; `.source` names where it is from."""
        part, row = self._find(index)
        return part.store.text(row)

    def sample(self, index: int) -> StoredSample:
        """Sample `index` with its pictures; `.source` names where it is from."""
        part, row = self._find(index)
        return part.store.sample(row)

    def heldout(self, source: str) -> list[int]:
        """The numbers of the held-out samples of `source`, for `heldout_sample`: 0 .. holdout - 1.

        They stand in the order of their hashes, so the first hundred are a fair draw of all.
        """
        return list(range(len(self._part(source).heldout)))

    def heldout_sample(self, source: str, number: int) -> StoredSample:
        """Held-out sample `number` of `source`."""
        part = self._part(source)
        return part.store.sample(int(part.heldout[number]))

    def heldout_text(self, source: str, number: int) -> StoredText:
        """Held-out sample `number` of `source`, without picture bytes."""
        part = self._part(source)
        return part.store.text(int(part.heldout[number]))

    def table(self) -> list[dict[str, Any]]:
        """One row per source: what was wanted, published and found, and what became of it."""
        return [
            {
                "source": part.store.name,
                "wanted": part.num_wanted,
                "expected_count": part.store.manifest["expected_count"],
                "found": len(part.store),
                "held_out": len(part.heldout),
                "beside_heldout": part.num_beside_heldout,
                "excluded": part.num_excluded,
                "used": len(part.used),
                "share": len(part.used) / max(1, self.num_samples),
                "rejects": dict(part.store.manifest["rejects"]),
                "licence": part.store.manifest["licence"],
            }
            for part in self._parts
        ]

    def store(self, source: str) -> Store:
        """The store of `source`."""
        return self._part(source).store

    def describe(self, index: int) -> str:
        """Which sample `index` is, for a message: its id, or its row where even the text cannot be read."""
        part, row = self._find(index)
        try:
            return f"sample {part.store.text(row).id!r} of source {part.store.name}"
        except (OSError, ValueError):
            return f"the sample in row {row} of source {part.store.name}"

    def _find(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of mixture {self.config.name}, which has {self.num_samples}")
        number = int(self.source_ids[index])
        part = self._parts[number]
        return part, int(part.used[index - self._starts[number]])

    def _part(self, source: str) -> _Part:
        for part in self._parts:
            if part.store.name == source:
                return part
        raise DataError(f"mixture {self.config.name} has no source {source!r}; it has {', '.join(self.source_names)}.")


def _too_few(store: Store, share: SourceShare, num_wanted: int, num_excluded: int, num_beside: int) -> DataError:
    left = len(store) - share.holdout - num_excluded - num_beside
    key = f"sources.{store.name}." + ("count" if share.share is None else "share")
    return DataError(
        f"source {store.name}: {num_wanted} samples wanted, {left} found ({len(store)} in the store, "
        f"{share.holdout} held out, {num_beside} left out because they show a held-out picture, {num_excluded} because "
        f"they show one of `exclude`). Lower `{key}`" + (", or set it to null for all." if share.share is None else ".")
    )


def _fingerprint(parts: Sequence[_Part]) -> str:
    """sha256 over every store's fingerprint and the rows chosen of it: together they name the samples.

    Nothing else is in it: a renamed file, `count: null` where the count is all there is, or another seed that
    chooses nothing change nothing that is learned.
    """
    digest = hashlib.sha256(b"data_recipes mixture 2\n")
    for part in parts:
        head = [part.store.name, part.store.fingerprint, len(part.used), len(part.heldout)]
        digest.update(json.dumps(head).encode())
        digest.update(part.used.astype("<i8").tobytes())
        digest.update(part.heldout.astype("<i8").tobytes())
    return digest.hexdigest()
