"""Tests of mixtures: counts, reproducible subsets, held-out samples and fingerprints."""

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.mixture.selection import select_heldout
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError, Sample
from tests.data_recipes.raw_folders import make_image, make_sample, make_store, write_file


def config(seed: int = 0, **shares: SourceShare) -> MixtureConfig:
    """Build a mixture configuration with the given shares."""
    return MixtureConfig("m", seed, shares)


def training_ids(mixture: Mixture) -> list[tuple[str, str]]:
    """Return (source, id) of every training sample."""
    texts = [mixture.text(i) for i in range(mixture.num_samples)]
    return [(text.source, text.id) for text in texts]


def training_hashes(mixture: Mixture) -> set[str]:
    """Return the hashes of all images in training samples."""
    return {h for i in range(mixture.num_samples) for h in mixture.sample(i).image_hashes}


def heldout_hashes(mixture: Mixture) -> set[str]:
    """Return the hashes of all held-out images."""
    return {
        h
        for source in mixture.source_names
        for j in mixture.heldout(source)
        for h in mixture.heldout_sample(source, j).image_hashes
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`: 40 samples, two for each of 20 images. `b`: 30 samples, ten of them with images of `a`. `t`: 20 text-only
    samples. `chain`: 12 samples with two images each, in groups of three that share images."""
    root = tmp_path_factory.mktemp("stores")
    images = [make_image(n) for n in range(40)]
    make_store(root / "a", [make_sample(f"{n}_{k}", images[n]) for n in range(20) for k in range(2)])
    make_store(root / "b", [make_sample(str(n), images[n + 10]) for n in range(30)])
    make_store(root / "t", [make_sample(str(n)) for n in range(20)])
    chain: Iterable[Sample] = (
        make_sample(f"{group}_{link}", make_image(100 + 4 * group + link), make_image(101 + 4 * group + link))
        for group in range(4)
        for link in range(3)
    )
    make_store(root / "chain", chain)
    return root


def test_all_samples_are_used(stores: Path) -> None:
    """Without counts every sample is used once, ordered by source name and row."""
    mixture = Mixture.open(config(t=SourceShare(), a=SourceShare(), b=SourceShare()), stores)
    assert mixture.source_names == ("a", "b", "t")
    assert mixture.num_samples == 90
    assert mixture.source_ids.dtype == np.int16
    assert np.bincount(mixture.source_ids).tolist() == [40, 30, 20]
    samples = training_ids(mixture)
    assert len(set(samples)) == 90
    assert samples[40] == ("b", "0")
    assert mixture.sample(40).source == "b"
    for index in (-1, 90):
        with pytest.raises(IndexError):
            mixture.text(index)


def test_counts_are_exact_and_nested(stores: Path) -> None:
    """Counts are exact, depend on the seed, and a smaller count gives a subset of a larger one."""
    small, large = (Mixture.open(config(a=SourceShare(n)), stores) for n in (7, 21))
    assert (small.num_samples, large.num_samples) == (7, 21)
    assert set(training_ids(small)) < set(training_ids(large))
    other = Mixture.open(config(1, a=SourceShare(7)), stores)
    assert set(training_ids(other)) != set(training_ids(small))
    assert training_ids(Mixture.open(config(a=SourceShare(7)), stores)) == training_ids(small)


@pytest.mark.parametrize("holdout", [2, 6, 20])
def test_heldout_images_are_not_trained_on(stores: Path, holdout: int) -> None:
    """Samples of `b` that share an image with held-out samples of `a` are removed and counted."""
    chosen = config(a=SourceShare(holdout=holdout), b=SourceShare(holdout=2), t=SourceShare(holdout=3))
    mixture = Mixture.open(chosen, stores)
    assert [len(mixture.heldout(source)) for source in ("a", "b", "t")] == [holdout, 2, 3]
    assert heldout_hashes(mixture)
    assert not heldout_hashes(mixture) & training_hashes(mixture)
    assert len(training_ids(mixture)) == 90 - (holdout + 2 + 3) - sum(mixture.num_sharing_heldout.values())
    assert not any(mixture.num_excluded.values())
    held = {("t", mixture.heldout_text("t", j).id) for j in mixture.heldout("t")}
    assert not held & set(training_ids(mixture))


def test_exclusion_across_sources_is_counted(stores: Path) -> None:
    """Samples of `b` with images of `a` are removed, and counted separately if `a` is held out or excluded."""
    mixture = Mixture.open(config(a=SourceShare(holdout=40), b=SourceShare()), stores)
    assert (mixture.num_sharing_heldout, mixture.num_excluded) == ({"a": 0, "b": 10}, {"a": 0, "b": 0})
    assert mixture.num_samples == 20
    row = mixture.table()[1]
    assert (row["found"], row["beside_heldout"], row["used"], row["share"]) == (30, 10, 20, 1.0)
    mixture = Mixture.open(MixtureConfig("m", 0, {"b": SourceShare()}, exclude=("a",)), stores)
    assert (mixture.num_sharing_heldout, mixture.num_excluded, mixture.num_samples) == ({"b": 0}, {"b": 10}, 20)


def test_samples_with_shared_images_are_held_out_together(stores: Path) -> None:
    """Groups of samples that are connected by shared images are held out as a whole."""
    mixture = Mixture.open(config(a=SourceShare(holdout=6), chain=SourceShare(holdout=6)), stores)
    for source, size in (("a", 2), ("chain", 3)):
        groups = [mixture.heldout_sample(source, j).id.split("_")[0] for j in range(len(mixture.heldout(source)))]
        assert len(groups) == 6
        assert all(groups.count(group) == size for group in groups)
    assert not any(mixture.num_sharing_heldout.values())


def select_heldout_reference(samples: Iterable[Sample], num_requested: int) -> list[str]:
    """Straightforward implementation of the rule: connected groups by their smallest hash, as long as they fit."""
    groups: list[tuple[set[str], list[str]]] = []
    for sample in samples:
        hashes = {hashlib.sha256(data).hexdigest() for data in sample.images if isinstance(data, bytes)}
        tied = [group for group in groups if group[0] & hashes]
        groups = [group for group in groups if group not in tied]
        keys = hashes.union(*(group[0] for group in tied)) or {hashlib.sha256(sample.id.encode()).hexdigest()}
        groups.append((keys, [*(name for group in tied for name in group[1]), sample.id]))
    chosen: list[str] = []
    for _, names in sorted(groups, key=lambda group: min(group[0])):
        if len(chosen) + len(names) <= num_requested:
            chosen += names
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_heldout_agrees_with_reference(tmp_path: Path, seed: int) -> None:
    """Random samples with zero to three of thirty images agree with the straightforward implementation."""
    random = np.random.default_rng(seed)
    shown = [make_image(n) for n in range(30)]
    samples = [
        make_sample(str(n), *(shown[k] for k in random.choice(30, random.choice(4, p=[0.3, 0.5, 0.1, 0.1]))))
        for n in range(40)
    ]
    store = make_store(tmp_path / "s", samples)
    ids = store.ids()
    for num_requested in (1, 7, 25):
        expected = select_heldout_reference(samples, num_requested)
        if len(expected) == num_requested:
            assert sorted(ids[row] for row in select_heldout(store, num_requested)) == sorted(expected)
        else:
            with pytest.raises(DataError, match=f"only {len(expected)} of its 40 samples"):
                select_heldout(store, num_requested)


def test_heldout_does_not_depend_on_seed_or_count(stores: Path) -> None:
    """Every mixture holds out the same samples of a source, so that evaluations are comparable."""
    shares = [(0, SourceShare(None, 6)), (5, SourceShare(None, 6)), (5, SourceShare(3, 6))]
    ids = []
    for seed, share in shares:
        mixture = Mixture.open(config(seed, a=share), stores)
        ids.append([mixture.heldout_sample("a", j).id for j in mixture.heldout("a")])
    assert ids[0] == ids[1] == ids[2]


def counts(mixture: Mixture) -> dict[str, int]:
    """Return the number of training samples per source."""
    return {row["source"]: row["used"] for row in mixture.table()}


def test_shares(stores: Path) -> None:
    """A share is relative to the sources with counts, or limited by the smallest source if all have shares."""
    with_counts = config(a=SourceShare(28), b=SourceShare(share=0.2), t=SourceShare(share=0.1))
    assert counts(Mixture.open(with_counts, stores)) == {"a": 28, "b": 8, "t": 4}
    with_counts = config(a=SourceShare(holdout=4), t=SourceShare(share=0.1))
    assert counts(Mixture.open(with_counts, stores)) == {"a": 36, "t": 4}
    tenths = config(a=SourceShare(share=0.5), b=SourceShare(share=0.4), t=SourceShare(share=0.1))
    assert counts(Mixture.open(tenths, stores)) == {"a": 37, "b": 30, "t": 7}
    whole = config(a=SourceShare(share=1.0))
    assert counts(Mixture.open(whole, stores)) == {"a": 40}
    with pytest.raises(DataError, match=r"source t: 93 samples requested, 20 available.*Lower `sources.t.share`"):
        Mixture.open(config(a=SourceShare(), t=SourceShare(share=0.7)), stores)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "the shares of a, b add up to 0.9, but must add up to 1"),
        ({"a": 1, "b": None}, "the shares of a add up to 1, which leaves no samples for the other sources"),
        ({"a": 0.0, "b": None}, "share: 0.0 must be above 0"),
        ({"a": 1.5, "b": None}, "share: 1.5 must be above 0 and at most 1"),
    ],
)
def test_invalid_shares(shares: dict[str, float | None], message: str) -> None:
    """Invalid shares are reported before any store is opened."""
    with pytest.raises(DataError, match=message):
        MixtureConfig("m", 0, {name: SourceShare(share=share) for name, share in shares.items()})
    with pytest.raises(DataError, match="are both given"):
        SourceShare(3, share=0.5)


def test_too_large_counts_are_reported(stores: Path) -> None:
    """Too large counts and holdouts are reported with the requested and the available number."""
    with pytest.raises(DataError, match=r"source a: 35 samples requested, 34 available \(40 in the store, 6 held out"):
        Mixture.open(config(a=SourceShare(35, 6)), stores)
    with pytest.raises(DataError, match=r"source b: holdout 31, but only 30 of its 30"):
        Mixture.open(config(b=SourceShare(None, 31)), stores)
    with pytest.raises(DataError, match=r"source a: holdout 5, but only 4"):
        Mixture.open(config(a=SourceShare(None, 5)), stores)
    with pytest.raises(DataError, match="count: 0"):
        SourceShare(0)
    with pytest.raises(DataError, match="holdout: -1"):
        SourceShare(None, -1)
    with pytest.raises(DataError, match="`sources` is empty"):
        config()


def test_a_missing_store_names_the_command(stores: Path) -> None:
    """The message has the path and the command that prepares the store."""
    with pytest.raises(DataError, match=r"no complete store at .*gone.*prepare --source gone"):
        Mixture.open(config(gone=SourceShare()), stores)


def test_fingerprint(stores: Path, tmp_path: Path) -> None:
    """The fingerprint depends on the selected samples only, not on names, the order of sources or settings without
    effect."""
    base = config(a=SourceShare(7), b=SourceShare(None, 2))
    expected = Mixture.open(base, stores).fingerprint
    reordered = MixtureConfig("another name", 0, dict(reversed(base.sources.items())))
    assert Mixture.open(reordered, stores).fingerprint == expected
    same = config(5, b=SourceShare(28, 2)), config(b=SourceShare(None, 2))
    assert len({Mixture.open(each, stores).fingerprint for each in same}) == 1
    others = [
        config(1, a=SourceShare(7), b=SourceShare(None, 2)),
        config(a=SourceShare(8), b=SourceShare(None, 2)),
        config(a=SourceShare(7), b=SourceShare(None, 3)),
        config(a=SourceShare(7)),
    ]
    prints = {Mixture.open(other, stores).fingerprint for other in others}
    assert len(prints | {expected}) == 5
    for name in ("a", "b"):
        make_store(tmp_path / name, [make_sample(str(n), make_image(n)) for n in range(20)])
    assert Mixture.open(base, tmp_path).fingerprint != expected


def test_fingerprint_follows_what_is_in_the_stores(tmp_path: Path) -> None:
    """As many samples under the same ids, all of them used, and one picture is another: another fingerprint."""
    prints = set()
    for number in range(2):
        folder = tmp_path / str(number)
        make_store(folder / "a", [make_sample(str(n), make_image(n + number * (n == 4))) for n in range(5)])
        prints.add(Mixture.open(config(a=SourceShare()), folder).fingerprint)
    assert len(prints) == 2


def test_pickling_for_loader_workers(stores: Path) -> None:
    """A pickled mixture has row numbers and paths, no images, and reads the same samples."""
    mixture = Mixture.open(config(a=SourceShare(None, 2), b=SourceShare()), stores)
    mixture.sample(0)
    data = pickle.dumps(mixture)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert again.sample(50) == mixture.sample(50)
    assert again.fingerprint == mixture.fingerprint


def test_pydantic_reads_the_config() -> None:
    """Pydantic validates the plain dataclasses and reports errors with the path of the key."""
    adapter = TypeAdapter(MixtureConfig)
    values = {"name": "m", "seed": 1, "sources": {"a": {"count": None, "holdout": 5}}}
    assert adapter.validate_python(values) == MixtureConfig("m", 1, {"a": SourceShare(None, 5)})
    for share in ({"cuont": 3}, {"count": 0}):
        with pytest.raises(ValidationError, match=r"sources\.a"):
            adapter.validate_python(values | {"sources": {"a": share}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nsource: {}", "unknown key 'source'; known keys: name, seed, sources"),
        ("seed: -1\nsources: {a: {}}", "`seed` is -1"),
        ("seed: 0\nsources: [a]", "`sources` must be a mapping"),
        ("seed: 0\nsources: {a: 5}", "`sources.a` is 5; write {count: 5}"),
        (
            "seed: 0\nsources: {a: {holdut: 5}}",
            "`sources.a`: unknown key 'holdut'; known keys: count, holdout, share. Did you mean holdout?",
        ),
        ("seed: 0\nsources: {a: {count: 1.5}}", "`sources.a.count` is 1.5"),
        ("seed: 0\nsources: {a: {holdout: null}}", "`sources.a.holdout` is None"),
        ("seed: 0\nsources: {a: {count: 0}}", "sources.a.count: 0 is below 1"),
        ("seed: 0\nsources: {a: {share: half}}", "`sources.a.share` is 'half', but must be a number between 0 and 1"),
        ("seed: 0\nsources: {a: {share: 0.3}}", "the shares of a add up to 0.3"),
        ("seed: 0\nsources: {}", "`sources` is empty"),
        ("- a", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_invalid_yaml(tmp_path: Path, text: str, message: str) -> None:
    """Messages name the file, the key and the value."""
    write_file(tmp_path / "mixture" / "m.yaml", text)
    with pytest.raises(DataError) as caught:
        read_mixture(tmp_path, "m")
    assert message in str(caught.value)


def test_yaml_of_a_mixture(tmp_path: Path) -> None:
    """Missing values have defaults: all samples, none held out."""
    write_file(tmp_path / "mixture" / "m.yaml", "name: m\nseed: 3\nsources: {a: {count: 4, holdout: 2}, b: }")
    expected = MixtureConfig("m", 3, {"a": SourceShare(4, 2), "b": SourceShare()})
    assert read_mixture(tmp_path, "m") == expected
