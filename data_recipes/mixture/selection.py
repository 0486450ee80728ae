"""Which samples of a store are held out, which may be trained on, and which are used: functions of their hashes.

Owns: those three choices for one store, and how many samples a share comes to.
Leaves: putting sources together to `mixture.py`, what is in a store to `reader.py`.

A hash stands for its first 64 bits wherever only an order is wanted: eight bytes a picture, not two hundred, and of a
million hashes two share them once in ten million mixtures.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from data_recipes.schema.mixture_config import SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.store.reader import Store

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def choose_heldout(store: Store, num_wanted: int) -> Rows:
    """Rows to hold out, in the order of their hashes: the samples with the smallest picture hashes.

    Samples that share a picture, directly or through others, go together; a group that would exceed the
    number is passed over. The seed has no say, so every mixture holds out the same samples of a source.

    Raises:
        DataError: groups do not make up the number.
    """
    if num_wanted == 0:
        return np.zeros(0, dtype=np.int64)
    starts, pictures = store.picture_rows()
    keys, groups = _keys_and_groups(store, starts, pictures)
    _, first_rows, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    group_keys = np.full(len(first_rows), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(group_keys, group_of_row, keys)
    sizes = np.bincount(group_of_row, minlength=len(first_rows))
    place = np.full(len(first_rows), -1, dtype=np.int64)  # of a chosen group among the chosen
    num_chosen = num_groups = 0
    for group in np.lexsort((first_rows, group_keys)):
        if num_chosen + sizes[group] <= num_wanted:
            place[group] = num_groups
            num_groups += 1
            num_chosen += int(sizes[group])
        if num_chosen == num_wanted:
            rows = np.flatnonzero(place[group_of_row] >= 0)
            return rows[np.argsort(place[group_of_row[rows]], kind="stable")].astype(np.int64)
    raise DataError(
        f"source {store.name}: holdout {num_wanted}, but only {num_chosen} of its {len(store)} samples can be held "
        "out (samples that share a picture stay together). Lower `holdout`."
    )


def _keys_and_groups(store: Store, starts: Rows, pictures: Rows) -> tuple[Keys, Rows]:
    """For each sample its smallest hash, and the number of the group that it is held out with.

    A text-only sample has the hash of its id, and is a group of its own.
    """
    picture_keys = store.picture_keys()
    shows = np.diff(starts) > 0
    keys = np.zeros(len(store), dtype=np.uint64)
    groups = len(picture_keys) + np.arange(len(store), dtype=np.int64)
    if shows.any():
        keys[shows] = np.minimum.reduceat(picture_keys[pictures], starts[:-1][shows])
        groups[shows] = _connected(starts, pictures, len(picture_keys))[pictures[starts[:-1][shows]]]
    for row, sample_id in enumerate(store.iter_ids()):
        if not shows[row]:
            keys[row] = _key(sample_id)
    return keys, groups


def _connected(starts: Rows, pictures: Rows, num_pictures: int) -> Rows:
    """For each picture the smallest picture it is connected with, through samples that show several."""
    parent = np.arange(num_pictures, dtype=np.int64)

    def root(picture: int) -> int:
        while parent[picture] != picture:
            parent[picture] = parent[parent[picture]]
            picture = int(parent[picture])
        return picture

    for row in np.flatnonzero(np.diff(starts) > 1):
        roots = sorted({root(int(picture)) for picture in pictures[starts[row] : starts[row + 1]]})
        parent[roots] = roots[0]
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent


def hashes_of(store: Store, rows: Rows) -> npt.NDArray[np.bytes_]:
    """sha256 of every picture that these samples show, 64 letters each."""
    return np.array([h for row in rows for h in store.picture_hashes(int(row))], dtype="S64")


def unique_hashes(hashes: Sequence[npt.NDArray[np.bytes_]]) -> npt.NDArray[np.bytes_]:
    """All of them, each once."""
    return np.unique(np.concatenate([np.zeros(0, dtype="S64"), *hashes]))


def free_rows(store: Store, heldout: Rows, excluded: npt.NDArray[np.bytes_]) -> Rows:
    """Rows that are neither held out nor show a picture of an excluded store."""
    free = ~_shows_any(store, excluded)
    free[heldout] = False
    return np.flatnonzero(free).astype(np.int64)


def without_held_out(store: Store, rows: Rows, hidden: npt.NDArray[np.bytes_]) -> Rows:
    """Those of `rows` that show none of the hidden pictures."""
    return rows[~_shows_any(store, hidden)[rows]]


def _shows_any(store: Store, hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    """Which samples show any of these pictures, bool [num_samples]."""
    if not len(hashes):
        return np.zeros(len(store), dtype=bool)
    starts, pictures = store.picture_rows()
    hit = np.isin(store.picture_keys(), first_64_bits(hashes))
    alike = np.flatnonzero(hit)
    hit[alike] = np.isin(store.hashes_of_pictures(alike), hashes)  # all of the hash, where its start is the same
    running = np.concatenate([[0], np.cumsum(hit[pictures])])
    return np.asarray(running[starts[1:]] > running[starts[:-1]])


def resolve_counts(shares: Mapping[str, SourceShare], num_found: Mapping[str, int]) -> dict[str, int | None]:
    """How many samples of each source: its count, its share of the whole, or None for all that were found."""
    wanted: dict[str, int | None] = {name: share.count for name, share in shares.items()}
    parts = {name: share.exact_share for name, share in shares.items() if share.exact_share is not None}
    if not parts:
        return wanted
    counted = [num_found[name] if count is None else count for name, count in wanted.items() if name not in parts]
    if counted:
        total = Fraction(sum(counted)) / (1 - sum(parts.values()))
    else:
        total = min(Fraction(num_found[name]) / part for name, part in parts.items())
    return wanted | {name: int(total * part) for name, part in parts.items()}


def choose_used(store: Store, num_samples: int | None, candidates: Rows, seed: int) -> Rows:
    """Rows to train on, in store order: all candidates, or those with the smallest hash(seed, source, id)."""
    if num_samples is None or num_samples == len(candidates):
        return candidates
    prefix = json.dumps([seed, store.name])
    keys = np.fromiter((_key(prefix + sample_id) for sample_id in store.iter_ids()), dtype=np.uint64, count=len(store))
    order = np.argsort(keys[candidates], kind="stable")
    return np.sort(candidates[order[:num_samples]])


def first_64_bits(hashes: npt.NDArray[np.bytes_]) -> Keys:
    """Of hashes as 64 hexadecimal letters each."""
    letters = np.ascontiguousarray(hashes.astype("S64")).view("S1").reshape(-1, 64)[:, :16]
    return np.frombuffer(bytes.fromhex(letters.tobytes().decode("ascii")), dtype=">u8").astype(np.uint64)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
