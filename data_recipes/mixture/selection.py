"""Selects the held-out and training samples of a store by hash.

Where only an order is needed, the first 64 bits of a hash are used, which take 8 bytes per image. Among a million
hashes a collision has a probability of about 3e-8.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from data_recipes.schema.mixture_config import SourceShare
from data_recipes.schema.sample import DataError
from data_recipes.store.images import first_64_bits
from data_recipes.store.reader import Store

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def select_heldout(store: Store, num_requested: int) -> Rows:
    """Select the held-out samples: those with the smallest image hashes.

    Samples that share an image, directly or through other samples, form a group, which is held out as a whole; a group
    that would exceed the requested number is skipped. The result does not depend on a seed, so every mixture holds out
    the same samples of a source.

    Args:
        store: the source's store.
        num_requested: number of samples to hold out.

    Returns:
        Rows ordered by hash, int64 [num_requested].

    Raises:
        DataError: no combination of the groups in this order has the requested number of samples.
    """
    if num_requested == 0:
        return np.zeros(0, dtype=np.int64)
    starts, images = store.image_rows()
    keys, groups = _keys_and_groups(store, starts, images)
    _, first_rows, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    group_keys = np.full(len(first_rows), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(group_keys, group_of_row, keys)
    sizes = np.bincount(group_of_row, minlength=len(first_rows))
    rank_of_group = np.full(len(first_rows), -1, dtype=np.int64)  # position among the selected groups, or -1
    num_chosen = num_groups = 0
    for group in np.lexsort((first_rows, group_keys)):
        if num_chosen + sizes[group] <= num_requested:
            rank_of_group[group] = num_groups
            num_groups += 1
            num_chosen += int(sizes[group])
        if num_chosen == num_requested:
            rows = np.flatnonzero(rank_of_group[group_of_row] >= 0)
            return rows[np.argsort(rank_of_group[group_of_row[rows]], kind="stable")].astype(np.int64)
    raise DataError(
        f"source {store.name}: holdout {num_requested}, but only {num_chosen} of its {len(store)} samples can be held "
        "out (samples that share an image are held out together). Lower `holdout`."
    )


def _keys_and_groups(store: Store, starts: Rows, images: Rows) -> tuple[Keys, Rows]:
    """Return the smallest hash and the group number of each sample, both [num_samples].

    A text-only sample has the hash of its id and forms its own group.
    """
    image_keys = store.image_keys()
    has_images = np.diff(starts) > 0
    keys = np.zeros(len(store), dtype=np.uint64)
    groups = len(image_keys) + np.arange(len(store), dtype=np.int64)
    if has_images.any():
        first_images = starts[:-1][has_images]
        keys[has_images] = np.minimum.reduceat(image_keys[images], first_images)
        groups[has_images] = _connected_images(starts, images, len(image_keys))[images[first_images]]
    for row, sample_id in enumerate(store.iter_ids()):
        if not has_images[row]:
            keys[row] = _hash_key(sample_id)
    return keys, groups


def _connected_images(starts: Rows, images: Rows, num_images: int) -> Rows:
    """Compute the connected components of images that occur in the same samples (union-find).

    Returns:
        The smallest image of each image's component, int64 [num_images].
    """
    parent = np.arange(num_images, dtype=np.int64)

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = int(parent[image])
        return image

    for row in np.flatnonzero(np.diff(starts) > 1):
        roots = sorted({root(int(image)) for image in images[starts[row] : starts[row + 1]]})
        parent[roots] = roots[0]
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent


def collect_image_hashes(store: Store, rows: Rows) -> npt.NDArray[np.bytes_]:
    """Return the sha256 of all images of these samples as 64 hexadecimal digits, S64 [n], with repetitions."""
    return np.array([h for row in rows for h in store.image_hashes(int(row))], dtype="S64")


def merge_hashes(hashes: Sequence[npt.NDArray[np.bytes_]]) -> npt.NDArray[np.bytes_]:
    """Concatenate arrays of hashes and remove duplicates."""
    return np.unique(np.concatenate([np.zeros(0, dtype="S64"), *hashes]))


def select_trainable_rows(store: Store, heldout: Rows, excluded: npt.NDArray[np.bytes_]) -> Rows:
    """Select the rows that are not held out and have no image of an excluded store.

    Args:
        store: the source's store.
        heldout: rows of the held-out samples.
        excluded: sha256 of the images of the excluded stores, S64 [n].
    """
    is_trainable = ~_has_any_image(store, excluded)
    is_trainable[heldout] = False
    return np.flatnonzero(is_trainable).astype(np.int64)


def drop_heldout_images(store: Store, rows: Rows, heldout_hashes: npt.NDArray[np.bytes_]) -> Rows:
    """Select those of `rows` that have none of the held-out images."""
    return rows[~_has_any_image(store, heldout_hashes)[rows]]


def _has_any_image(store: Store, hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    """Return which samples have any of the images with these hashes, bool [num_samples]."""
    if not len(hashes):
        return np.zeros(len(store), dtype=bool)
    starts, images = store.image_rows()
    is_match = np.isin(store.image_keys(), first_64_bits(hashes))
    candidates = np.flatnonzero(is_match)
    is_match[candidates] = np.isin(store.hashes_of_images(candidates), hashes)  # compare complete hashes
    num_matches = np.concatenate([[0], np.cumsum(is_match[images])])
    return np.asarray(num_matches[starts[1:]] > num_matches[starts[:-1]])


def resolve_counts(shares: Mapping[str, SourceShare], num_available: Mapping[str, int]) -> dict[str, int | None]:
    """Compute the number of training samples of each source; None for all available samples.

    Args:
        shares: {source: configured count or share}.
        num_available: {source: number of samples that may be trained on}.
    """
    requested: dict[str, int | None] = {name: share.count for name, share in shares.items()}
    parts = {name: share.exact_share for name, share in shares.items() if share.exact_share is not None}
    if not parts:
        return requested
    counted = [
        num_available[name] if count is None else count for name, count in requested.items() if name not in parts
    ]
    if counted:
        total = Fraction(sum(counted)) / (1 - sum(parts.values()))
    else:
        total = min(Fraction(num_available[name]) / part for name, part in parts.items())
    return requested | {name: int(total * part) for name, part in parts.items()}


def select_training_rows(store: Store, num_samples: int | None, candidates: Rows, seed: int) -> Rows:
    """Select the training rows in store order: all candidates, or those with the smallest hash(seed, source, id).

    Args:
        store: the source's store.
        num_samples: number of rows; None for all.
        candidates: rows that may be trained on, sorted.
        seed: seed of the mixture.
    """
    if num_samples is None or num_samples == len(candidates):
        return candidates
    prefix = json.dumps([seed, store.name])
    keys = np.fromiter(
        (_hash_key(prefix + sample_id) for sample_id in store.iter_ids()), dtype=np.uint64, count=len(store)
    )
    order = np.argsort(keys[candidates], kind="stable")
    return np.sort(candidates[order[:num_samples]])


def _hash_key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
