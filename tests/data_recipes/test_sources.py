"""Owns the proofs about what ships in configs/source and configs/mixture: each source reads a hand-made folder of its
published layout and says what a user must know, and the counts add up to the published numbers."""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.prepare.__main__ import main
from data_recipes.raw.components import TABLES
from data_recipes.schema.sample import DataError, Reject, Sample, check
from data_recipes.schema.source import SourceInfo, describe, read_source
from tests.data_recipes.merged_records import MERGED
from tests.data_recipes.raw_folders import put, write_messages, write_source

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SOURCES = sorted(path.stem for path in (CONFIGS / "source").glob("*.yaml"))
MIXTURES = sorted(path.stem for path in (CONFIGS / "mixture").glob("*.yaml"))
# What the hand-made folders lack on purpose: a link of LAION-GPT-V that died.
REJECTED = {"laion_gpt4v": ["picture_missing"]}
# One mixture runs through the program in the quick tests: it has every reader of a publisher's layout.
THROUGH = [name if name == "llava_next_760k" else pytest.param(name, marks=pytest.mark.full) for name in MIXTURES]


@lru_cache
def shipped(name: str) -> SourceInfo:
    """A source of configs/source, parsed once: PyYAML takes its time."""
    return read_source(CONFIGS, name)


@pytest.mark.parametrize("name", SOURCES)
def test_every_shipped_source_reads_its_layout(name: str, tmp_path: Path) -> None:
    """Reader and options of the YAML fit the published layout: samples that pass the rules, pictures that are there."""
    source = shipped(name)
    write_source(source, tmp_path)
    items = list(source.samples(tmp_path))
    samples = [item for item in items if isinstance(item, Sample)]
    assert [item.reason for item in items if isinstance(item, Reject)] == REJECTED.get(name, [])
    assert samples
    for sample in samples:
        assert check(sample) is None
        assert all(isinstance(picture, bytes) or picture.is_file() for picture in sample.pictures)
    table = source.options.get("components")
    if table:
        expected = [str(each["id"]) for part, each in MERGED[table] if part == source.options["component"]]
        assert [sample.id for sample in samples] == expected


@pytest.mark.parametrize("name", SOURCES)
def test_every_shipped_source_says_what_a_user_must_know(name: str, tmp_path: Path) -> None:
    """A missing raw folder is answered with publisher, place, size, licence and where to put it."""
    source = shipped(name)
    assert source.publisher
    assert source.fetch
    assert source.licence
    with pytest.raises(DataError) as caught:
        source.raw_folder(tmp_path)
    sentence = str(caught.value)
    known = [source.publisher, source.fetch, source.licence, source.size, str(tmp_path / source.root)]
    assert [part for part in known if part not in sentence] == []
    if source.expected_count:
        assert f"{source.expected_count:,} samples" in sentence


def test_every_published_set_can_be_cited() -> None:
    """A BibTeX key means one entry everywhere; only what the quickstart draws has none."""
    entries: dict[str, dict[str, str]] = {}
    for name in SOURCES:
        citation = shipped(name).citation
        if not citation:
            assert name in {"captioned_pictures", "captioned_pictures_instruct", "text_chats"} or "quickstart" in name
            continue
        assert {"author", "title", "year"} < set(citation), name
        assert citation["type"] in {"article", "inproceedings", "misc"}, name
        assert entries.setdefault(citation["key"], citation) == citation, name


def test_every_part_of_a_merged_file_has_a_source() -> None:
    """A part without a YAML would vanish: rules leave it out of every other part, and nobody would count it."""
    parts = Counter(
        (source.options["components"], source.options["component"])
        for source in (shipped(name) for name in SOURCES)
        if "components" in source.options
    )
    assert parts == Counter({(table, rule.component) for table, rules in TABLES.items() for rule in rules})


def counts(mixture: str) -> dict[str, int | None]:
    """{source: how many samples the YAMLs say: the mixture's count, or else all that were published}."""
    shares = read_mixture(CONFIGS, mixture).sources
    return {name: share.count or shipped(name).expected_count for name, share in shares.items()}


def total(mixture: str, *parts: str) -> int:
    """The sum over the sources whose names end like one of `parts`; over all without any."""
    chosen = {name: count for name, count in counts(mixture).items() if not parts or name.endswith(parts)}
    assert len(chosen) >= len(parts)
    return sum(count for count in chosen.values() if count is not None)


def test_the_published_counts_add_up() -> None:
    """recipe.md 4.1, 4.2 and 4.4: totals, and every row of the release's folders."""
    assert total("lcs_558k") == 558_128
    assert total("llava_1_5_665k") == 665_298
    assert total("llava_next_779k") == 779_278
    assert total("llava_next_760k") == 779_278 - 20_000 == 759_278
    assert total("llava_next_779k_parquet") == 779_278 + 11

    on_coco = ("llava_instruct", "vqav2", "okvqa", "aokvqa", "refcoco")
    assert total("llava_1_5_665k", *on_coco) == 364_100
    assert total("llava_next_779k", *on_coco, "coco_captions") + 7_119 == 391_219
    rows = {"_vg": 86_417, "ocr_vqa": 80_000, "gqa": 72_140, "sharegpt_text": 40_688, "synthdog_en": 40_093}
    rows |= {"dvqa": 20_000, "chartqa": 18_317, "docvqa": 10_194, "laion_gpt4v": 8_048, "ai2d": 3_247}
    rows |= {"sharegpt4v": 7_119 + 6_989 + 1_926, "coco_captions": 20_000}
    assert {part: total("llava_next_779k", part) for part in rows} == rows
    assert total("llava_next_760k", "sharegpt4v_coco", "lcs", "knowledge", "laion_gpt4v") == 24_082
    assert total("llava_next_760k", "dvqa", "chartqa", "ai2d") == 41_564


def test_the_760k_is_the_779k_without_captions_and_textcaps() -> None:
    """Part by part: the same sets in the same numbers."""

    def parts(mixture: str) -> dict[str, int]:
        """Counts by set, without the name of the file that a set is read from."""
        found: dict[str, int] = {}
        for name, count in counts(mixture).items():
            part = name.removeprefix("mix665k_").removeprefix("next_779k_").removesuffix("_parquet")
            part = "sharegpt4v" if part.startswith("sharegpt4v") else part
            found[part] = found.get(part, 0) + (count or 0)
        return found

    without_captions = {part: count for part, count in parts("llava_next_779k").items() if part != "coco_captions"}
    assert parts("llava_next_760k") == without_captions
    assert "textcaps" not in without_captions


def test_the_760k_is_called_a_reading_and_the_invented_prompts_invented() -> None:
    """Nobody should take them for published facts."""
    assert "OUR READING" in (CONFIGS / "mixture" / "llava_next_760k.yaml").read_text()
    assert "INVENTED" in (CONFIGS / "source" / "laion_gpt4v.yaml").read_text()


@pytest.mark.parametrize("name", THROUGH)
def test_a_shipped_mixture_from_its_raw_folders(name: str, tmp_path: Path) -> None:
    """Every source of it, through the program: counts aside, which the hand-made folders cannot fill."""
    mixture = yaml.safe_load((CONFIGS / "mixture" / f"{name}.yaml").read_text())
    mixture["sources"] = {source: {} for source in mixture["sources"]}
    put(tmp_path / "configs" / "mixture" / f"{name}.yaml", yaml.safe_dump(mixture))
    for source in [*mixture["sources"], *mixture.get("exclude", [])]:
        write_source(shipped(source), tmp_path / "raw")
    (tmp_path / "configs" / "source").symlink_to(CONFIGS / "source")
    folders = ["--raw", str(tmp_path / "raw"), "--stores", str(tmp_path / "stores")]
    line = ["--mixture", name, "--configs", str(tmp_path / "configs"), "--workers", "1", *folders]
    assert main(line) == 0
    made = Mixture.open(read_mixture(tmp_path / "configs", name), tmp_path / "stores")
    assert min(row["found"] for row in made.table()) > 0


@pytest.mark.parametrize(
    ("lines", "container"),
    [
        ("reader: messages_jsonl\nroot: mine\noptions: {annotations: own.jsonl}\n", "own.jsonl"),
        ("reader: messages_parquet\nroot: mine\n", "own.parquet"),
    ],
)
def test_ones_own_data_wants_three_lines(lines: str, container: str, tmp_path: Path) -> None:
    """Messages and images, as JSON lines or parquet, with no Python; LLaVA JSON is like the shipped ones."""
    put(tmp_path / "source" / "mine.yaml", lines)
    write_messages(tmp_path / "raw" / "mine", container)
    source = read_source(tmp_path, "mine")
    pictured, chat = source.samples(tmp_path / "raw")
    assert isinstance(pictured, Sample)
    assert isinstance(chat, Sample)
    assert pictured.pictures == (tmp_path / "raw/mine/photos/17.jpg",)
    assert [message.text for message in pictured.messages] == ["<image>\nWhat is it?", "A cup."]
    assert chat.pictures == ()


@pytest.mark.parametrize(
    ("citation", "message"),
    [("{key: a, type: misc}", "`citation` has no `title`"), ("someone, 2024", "must be dict")],
)
def test_mistakes_in_a_citation(citation: str, message: str, tmp_path: Path) -> None:
    """What a bibliography could not use is told when the YAML is read."""
    put(tmp_path / "source" / "mine.yaml", f"reader: llava_json\nroot: mine\ncitation: {citation}\n")
    with pytest.raises(DataError, match=message):
        read_source(tmp_path, "mine")


def test_a_citation_is_strings(tmp_path: Path) -> None:
    """YAML reads a year as a number; a bibliography writes words."""
    put(tmp_path / "source" / "m.yaml", "reader: r\nroot: m\ncitation: {key: a, type: misc, title: T, year: 2024}")
    assert read_source(tmp_path, "m").citation["year"] == "2024"
    assert SourceInfo("m", "r", "m").citation == {}


def test_a_source_names_how_its_answers_are_judged(tmp_path: Path) -> None:
    """The published metric of each kind ships; an unknown one is refused with the known ones, and goes into a store's
    manifest otherwise."""
    kinds = {"docvqa": "anls", "chartqa": "relaxed_accuracy", "ai2d": "options", "synthdog_en": "edit_similarity"}
    assert {name: shipped(name).metric for name in kinds} == kinds
    assert describe(shipped("docvqa"))["metric"] == "anls"
    put(tmp_path / "source" / "mine.yaml", "reader: llava_json\nroot: mine\nmetric: anl\n")
    with pytest.raises(DataError, match=r"`metric` is 'anl'; known: exact_match, .*, none\. Did you mean anls\?"):
        read_source(tmp_path, "mine")
