"""Owns the proofs about mixtures: exact counts, stable subsets, nothing held out is trained on, one
fingerprint."""

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.mixture.selection import choose_heldout
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import DataError, Sample
from tests.data_recipes.raw_folders import conversation, make_store, picture, put


def config(seed: int = 0, **shares: SourceShare) -> MixtureConfig:
    """A mixture of the given shares."""
    return MixtureConfig("m", seed, shares)


def trained(mixture: Mixture) -> list[tuple[str, str]]:
    """(source, id) of every training sample."""
    texts = [mixture.text(i) for i in range(mixture.num_samples)]
    return [(text.source, text.id) for text in texts]


def trained_hashes(mixture: Mixture) -> set[str]:
    """Every picture of the training side."""
    return {h for i in range(mixture.num_samples) for h in mixture.sample(i).picture_hashes}


def heldout_hashes(mixture: Mixture) -> set[str]:
    """Every held-out picture of every source."""
    return {
        h
        for source in mixture.source_names
        for j in mixture.heldout(source)
        for h in mixture.heldout_sample(source, j).picture_hashes
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`: 40 samples, two on each of 20 pictures. `b`: 30 samples, ten of them on pictures of `a`. `t`: 20
    chats. `chain`: 12 samples of two pictures, tied together in threes."""
    root = tmp_path_factory.mktemp("stores")
    pictures = [picture(n) for n in range(40)]
    make_store(root / "a", [conversation(f"{n}_{k}", pictures[n]) for n in range(20) for k in range(2)])
    make_store(root / "b", [conversation(str(n), pictures[n + 10]) for n in range(30)])
    make_store(root / "t", [conversation(str(n)) for n in range(20)])
    chain: Iterable[Sample] = (
        conversation(f"{group}_{link}", picture(100 + 4 * group + link), picture(101 + 4 * group + link))
        for group in range(4)
        for link in range(3)
    )
    make_store(root / "chain", chain)
    return root


def test_all_of_everything(stores: Path) -> None:
    """Without counts every sample is used once, numbered source by source, sources by name."""
    mixture = Mixture.open(config(t=SourceShare(), a=SourceShare(), b=SourceShare()), stores)
    assert mixture.source_names == ("a", "b", "t")
    assert mixture.num_samples == 90
    assert mixture.source_ids.dtype == np.int16
    assert np.bincount(mixture.source_ids).tolist() == [40, 30, 20]
    found = trained(mixture)
    assert len(set(found)) == 90
    assert found[40] == ("b", "0")
    assert mixture.sample(40).source == "b"
    for index in (-1, 90):
        with pytest.raises(IndexError):
            mixture.text(index)


def test_counts_are_exact_and_nested(stores: Path) -> None:
    """A count takes exactly so many; the seed decides which; a smaller count is a part of a larger one."""
    small, large = (Mixture.open(config(a=SourceShare(n)), stores) for n in (7, 21))
    assert (small.num_samples, large.num_samples) == (7, 21)
    assert set(trained(small)) < set(trained(large))
    other = Mixture.open(config(1, a=SourceShare(7)), stores)
    assert set(trained(other)) != set(trained(small))
    assert trained(Mixture.open(config(a=SourceShare(7)), stores)) == trained(small)


@pytest.mark.parametrize("holdout", [2, 6, 20])
def test_no_heldout_picture_is_trained_on(stores: Path, holdout: int) -> None:
    """Neither in its own source nor in another: samples of `b` that show a held-out picture of `a` are
    excluded and counted."""
    chosen = config(a=SourceShare(holdout=holdout), b=SourceShare(holdout=2), t=SourceShare(holdout=3))
    mixture = Mixture.open(chosen, stores)
    assert [len(mixture.heldout(source)) for source in ("a", "b", "t")] == [holdout, 2, 3]
    assert heldout_hashes(mixture)
    assert not heldout_hashes(mixture) & trained_hashes(mixture)
    assert len(trained(mixture)) == 90 - (holdout + 2 + 3) - sum(mixture.beside_heldout.values())
    assert not any(mixture.excluded.values())
    held = {("t", mixture.heldout_text("t", j).id) for j in mixture.heldout("t")}
    assert not held & set(trained(mixture))


def test_exclusion_across_sources_is_counted(stores: Path) -> None:
    """With all of `a` held out, exactly the ten samples of `b` that share its pictures go; with `a` excluded as a
    benchmark they go too, and are counted as that."""
    mixture = Mixture.open(config(a=SourceShare(holdout=40), b=SourceShare()), stores)
    assert (mixture.beside_heldout, mixture.excluded) == ({"a": 0, "b": 10}, {"a": 0, "b": 0})
    assert mixture.num_samples == 20
    row = mixture.table()[1]
    assert (row["found"], row["beside_heldout"], row["used"], row["share"]) == (30, 10, 20, 1.0)
    mixture = Mixture.open(MixtureConfig("m", 0, {"b": SourceShare()}, exclude=("a",)), stores)
    assert (mixture.beside_heldout, mixture.excluded, mixture.num_samples) == ({"b": 0}, {"b": 10}, 20)


def test_samples_that_share_a_picture_stay_together(stores: Path) -> None:
    """Pairs of `a` go together; chains of three that are tied picture by picture do too, as wholes."""
    mixture = Mixture.open(config(a=SourceShare(holdout=6), chain=SourceShare(holdout=6)), stores)
    for source, size in (("a", 2), ("chain", 3)):
        groups = [mixture.heldout_sample(source, j).id.split("_")[0] for j in range(len(mixture.heldout(source)))]
        assert len(groups) == 6
        assert all(groups.count(group) == size for group in groups)
    assert not any(mixture.beside_heldout.values())


def held_out_by_hand(samples: Iterable[Sample], num_wanted: int) -> list[str]:
    """The rule in words: groups that pictures tie together, by their smallest hash, as long as they fit."""
    groups: list[tuple[set[str], list[str]]] = []
    for sample in samples:
        own = {hashlib.sha256(data).hexdigest() for data in sample.pictures if isinstance(data, bytes)}
        tied = [group for group in groups if group[0] & own]
        groups = [group for group in groups if group not in tied]
        keys = own.union(*(group[0] for group in tied)) or {hashlib.sha256(sample.id.encode()).hexdigest()}
        groups.append((keys, [*(name for group in tied for name in group[1]), sample.id]))
    chosen: list[str] = []
    for _, names in sorted(groups, key=lambda group: min(group[0])):
        if len(chosen) + len(names) <= num_wanted:
            chosen += names
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_what_is_held_out_is_what_the_rule_says(tmp_path: Path, seed: int) -> None:
    """Random samples of zero to three of thirty pictures, against the rule done by hand."""
    random = np.random.default_rng(seed)
    shown = [picture(n) for n in range(30)]
    samples = [
        conversation(str(n), *(shown[k] for k in random.choice(30, random.choice(4, p=[0.3, 0.5, 0.1, 0.1]))))
        for n in range(40)
    ]
    store = make_store(tmp_path / "s", samples)
    ids = store.ids()
    for num_wanted in (1, 7, 25):
        expected = held_out_by_hand(samples, num_wanted)
        if len(expected) == num_wanted:
            assert sorted(ids[row] for row in choose_heldout(store, num_wanted)) == sorted(expected)
        else:
            with pytest.raises(DataError, match=f"only {len(expected)} of its 40 samples"):
                choose_heldout(store, num_wanted)


def test_heldout_does_not_depend_on_seed_or_count(stores: Path) -> None:
    """Every mixture holds out the same samples of a source, or an evaluation could not be compared."""
    shares = [(0, SourceShare(None, 6)), (5, SourceShare(None, 6)), (5, SourceShare(3, 6))]
    ids = []
    for seed, share in shares:
        mixture = Mixture.open(config(seed, a=share), stores)
        ids.append([mixture.heldout_sample("a", j).id for j in mixture.heldout("a")])
    assert ids[0] == ids[1] == ids[2]


def counts(mixture: Mixture) -> dict[str, int]:
    """Training samples by source."""
    return {row["source"]: row["used"] for row in mixture.table()}


def test_shares(stores: Path) -> None:
    """A share is a part of the whole: measured by the sources with counts, or by the scarcest where all have one."""
    beside = config(a=SourceShare(28), b=SourceShare(share=0.2), t=SourceShare(share=0.1))
    assert counts(Mixture.open(beside, stores)) == {"a": 28, "b": 8, "t": 4}
    beside = config(a=SourceShare(holdout=4), t=SourceShare(share=0.1))
    assert counts(Mixture.open(beside, stores)) == {"a": 36, "t": 4}
    tenths = config(a=SourceShare(share=0.5), b=SourceShare(share=0.4), t=SourceShare(share=0.1))
    assert counts(Mixture.open(tenths, stores)) == {"a": 37, "b": 30, "t": 7}
    whole = config(a=SourceShare(share=1.0))
    assert counts(Mixture.open(whole, stores)) == {"a": 40}
    with pytest.raises(DataError, match=r"source t: 93 samples wanted, 20 found.*Lower `sources.t.share`"):
        Mixture.open(config(a=SourceShare(), t=SourceShare(share=0.7)), stores)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "the shares of a, b add up to 0.9, and must add up to 1"),
        ({"a": 1, "b": None}, "the shares of a add up to 1, which leaves nothing for the other sources"),
        ({"a": 0.0, "b": None}, "share: 0.0 must be above 0"),
        ({"a": 1.5, "b": None}, "share: 1.5 must be above 0 and at most 1"),
    ],
)
def test_impossible_shares(shares: dict[str, float | None], message: str) -> None:
    """Told before any store is opened, with the sum and the way out."""
    with pytest.raises(DataError, match=message):
        MixtureConfig("m", 0, {name: SourceShare(share=share) for name, share in shares.items()})
    with pytest.raises(DataError, match="a source has one of them"):
        SourceShare(3, share=0.5)


def test_impossible_numbers_are_refused_with_both(stores: Path) -> None:
    """More wanted than found, and a holdout that groups cannot make up."""
    with pytest.raises(DataError, match=r"source a: 35 samples wanted, 34 found \(40 in the store, 6 held out"):
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
    """The sentence has the source, the path and what makes it."""
    with pytest.raises(DataError, match=r"no complete store at .*gone.*prepare --source gone"):
        Mixture.open(config(gone=SourceShare()), stores)


def test_fingerprint(stores: Path, tmp_path: Path) -> None:
    """It follows from the samples chosen and held out, and from nothing else: not from a name, the order of sources,
    or a number that changes nothing."""
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
        make_store(tmp_path / name, [conversation(str(n), picture(n)) for n in range(20)])
    assert Mixture.open(base, tmp_path).fingerprint != expected


def test_pickling_for_loader_workers(stores: Path) -> None:
    """A worker gets row numbers and paths, no pictures, and reads the same."""
    mixture = Mixture.open(config(a=SourceShare(None, 2), b=SourceShare()), stores)
    mixture.sample(0)
    data = pickle.dumps(mixture)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert again.sample(50) == mixture.sample(50)
    assert again.fingerprint == mixture.fingerprint


def test_pydantic_reads_the_config() -> None:
    """A run validates the plain dataclasses with pydantic: unknown keys and bad numbers are told with their
    path."""
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
        ("seed: 0\nsources: [a]", "`sources` must map"),
        ("seed: 0\nsources: {a: 5}", "`sources.a` is 5; write {count: 5}"),
        (
            "seed: 0\nsources: {a: {holdut: 5}}",
            "`sources.a`: unknown key 'holdut'; known keys: count, holdout, share. Did you mean holdout?",
        ),
        ("seed: 0\nsources: {a: {count: 1.5}}", "`sources.a.count` is 1.5"),
        ("seed: 0\nsources: {a: {holdout: null}}", "`sources.a.holdout` is None"),
        ("seed: 0\nsources: {a: {count: 0}}", "sources.a.count: 0 is below 1"),
        ("seed: 0\nsources: {a: {share: half}}", "`sources.a.share` is 'half', and must be a number between 0 and 1"),
        ("seed: 0\nsources: {a: {share: 0.3}}", "the shares of a add up to 0.3"),
        ("seed: 0\nsources: {}", "`sources` is empty"),
        ("- a", "must hold keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_the_yaml(tmp_path: Path, text: str, message: str) -> None:
    """Each names the file, the key and the value."""
    put(tmp_path / "mixture" / "m.yaml", text)
    with pytest.raises(DataError) as caught:
        read_mixture(tmp_path, "m")
    assert message in str(caught.value)


def test_yaml_of_a_mixture(tmp_path: Path) -> None:
    """What is left out has its default: all samples, none held out."""
    put(tmp_path / "mixture" / "m.yaml", "name: m\nseed: 3\nsources: {a: {count: 4, holdout: 2}, b: }")
    expected = MixtureConfig("m", 3, {"a": SourceShare(4, 2), "b": SourceShare()})
    assert read_mixture(tmp_path, "m") == expected
