"""Tests of the shipped sources and mixtures: readers, descriptions, downloads and published counts."""

import json
import math
import re
import shutil
from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.mixture.mixture import Mixture, read_mixture
from data_recipes.prepare.__main__ import main
from data_recipes.raw import archives
from data_recipes.raw.components import TABLES
from data_recipes.schema.sample import ArchiveMember, DataError, Reject, Sample, check_sample
from data_recipes.schema.source import SourceInfo, describe_source, read_source
from tests.data_recipes.archive_files import files_of, pack
from tests.data_recipes.merged_records import MERGED, record_name
from tests.data_recipes.raw_folders import write_file, write_messages, write_source

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SOURCES = sorted(path.stem for path in (CONFIGS / "source").glob("*.yaml"))
MIXTURES = sorted(path.stem for path in (CONFIGS / "mixture").glob("*.yaml"))
# Rejects that the hand-opened folders contain on purpose: a failed download of LAION-GPT-V.
REJECTED = {"laion_gpt4v": ["picture_missing"]}
# The quick tests prepare one mixture, which uses the readers of all published layouts.
PREPARED_MIXTURES = [
    name if name == "llava_next_760k" else pytest.param(name, marks=pytest.mark.full) for name in MIXTURES
]


@lru_cache
def shipped(name: str) -> SourceInfo:
    """Read a shipped source, cached because PyYAML is slow."""
    return read_source(CONFIGS, name)


@pytest.mark.parametrize("name", SOURCES)
def test_every_shipped_source_reads_its_layout(name: str, tmp_path: Path) -> None:
    """Reader and options of the YAML fit the published layout and give valid samples with existing images."""
    source = shipped(name)
    write_source(source, tmp_path)
    items = list(source.samples(tmp_path))
    samples = [item for item in items if isinstance(item, Sample)]
    assert [item.reason for item in items if isinstance(item, Reject)] == REJECTED.get(name, [])
    assert samples
    for sample in samples:
        assert check_sample(sample) is None
        assert all(isinstance(image, bytes) or (isinstance(image, Path) and image.is_file()) for image in sample.images)
    table = source.options.get("components")
    if table:
        expected = [record_name(each) for part, each in MERGED[table] if part == source.options["component"]]
        assert [sample.id for sample in samples] == expected


@pytest.mark.parametrize("name", SOURCES)
def test_every_shipped_source_is_described(name: str, tmp_path: Path) -> None:
    """The message about a missing raw folder has publisher, download instructions, size, licence and path."""
    source = shipped(name)
    assert source.publisher
    assert source.fetch
    assert source.licence
    with pytest.raises(DataError) as caught:
        source.raw_folder(tmp_path)
    message_text = str(caught.value)
    known = [source.publisher, source.fetch, source.licence, source.size, str(tmp_path / source.root)]
    assert [part for part in known if part not in message_text] == []
    if source.expected_count:
        assert f"{source.expected_count:,} samples" in message_text


@lru_cache
def downloads(name: str) -> list[dict[str, Any]]:
    """The entries of `download` in a shipped source's YAML."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / "source" / f"{name}.yaml").read_text())
    return list(values.get("download", []))


def downloaded(entry: dict[str, Any]) -> list[str]:
    """The files of a `download` entry below the source's root; those of the hub are patterns."""
    to = entry.get("to", ".")
    files = [to] if "url" in entry else [f"{to}/{name}" for name in entry.get("files", ["*"])]
    return [file.removeprefix("./") for file in files]


def test_downloads_have_one_origin_each() -> None:
    """Sources of one raw folder get the same file from the same place, and no path leaves the folder."""
    origins: dict[tuple[str, str], dict[str, Any]] = {}
    for name in SOURCES:
        source = shipped(name)
        for entry in downloads(name):
            assert len({"hub", "url", "page"} & set(entry)) == 1, name
            for file in downloaded(entry):
                assert not {"", ".."} & set(file.split("/")), name
                origin = {key: entry.get(key) for key in ("hub", "folder", "revision", "url", "bytes", "page", "why")}
                assert origins.setdefault((source.root, file), origin) == origin, (name, file)


def test_what_a_reader_opens_is_downloaded() -> None:
    """The records of the JSON and parquet readers are where a download puts them, or in an archive that it brings."""
    without = {"demo_requests", "captioned_pictures", "captioned_pictures_instruct", "text_chats"}
    without |= {
        "easy_vqa",
        "easy_vqa_test",
        "quickstart_captions",
        "quickstart_instruct",
        "quickstart_letters",
        "quickstart_pairs",
    }
    assert {name for name in SOURCES if not downloads(name)} == without
    for name in set(SOURCES) - without:
        source = shipped(name)
        files = [file for entry in downloads(name) for file in downloaded(entry)]
        patterns: Any = source.options.get("annotations") or source.options.get("shards")
        if source.reader in ("llava_json", "llava_parquet"):
            for opened in [patterns] if isinstance(patterns, str) else patterns:
                assert any(fnmatchcase(opened, file) for file in files), (name, opened)
        if source.reader == "synthdog_parquet":
            assert f"data/{source.options['split']}-*.parquet" in files


def test_the_data_page_says_which_sources_were_read() -> None:
    """Every source is in one row of the table, and the table names no other."""
    page = (CONFIGS.parent / "docs" / "data.md").read_text()
    (table,) = re.findall(r"^\| sources \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.splitlines()]
    found = {name: [pattern for row in rows for pattern in row if fnmatchcase(name, pattern)] for name in SOURCES}
    assert [name for name, patterns in found.items() if not patterns] == []
    assert {pattern for row in rows for pattern in row} == {pattern for each in found.values() for pattern in each}


def test_every_published_set_can_be_cited() -> None:
    """Every published dataset has a citation, and equal BibTeX keys have equal entries."""
    entries: dict[str, dict[str, str]] = {}
    for name in SOURCES:
        citation = shipped(name).citation
        if not citation:
            assert name in {"captioned_pictures", "captioned_pictures_instruct", "text_chats"} or "quickstart" in name
            continue
        assert {"author", "title", "year"} < set(citation), name
        assert citation["type"] in {"article", "inproceedings", "misc"}, name
        assert entries.setdefault(citation["key"], citation) == citation, name


def test_every_component_has_a_source() -> None:
    """Every component has a source, since its records would otherwise be missing without notice."""
    parts = Counter(
        (source.options["components"], source.options["component"])
        for source in (shipped(name) for name in SOURCES)
        if "components" in source.options
    )
    assert parts == Counter({(table, rule.component) for table, rules in TABLES.items() for rule in rules})


def counts(mixture: str) -> dict[str, int | None]:
    """Return {source: count of the mixture, or else the published count}."""
    shares = read_mixture(CONFIGS, mixture).sources
    return {name: share.count or shipped(name).expected_count for name, share in shares.items()}


def total(mixture: str, *parts: str) -> int:
    """Sum the counts of the sources whose names end with one of `parts`, or of all sources."""
    chosen = {name: count for name, count in counts(mixture).items() if not parts or name.endswith(parts)}
    assert len(chosen) >= len(parts)
    return sum(count for count in chosen.values() if count is not None)


def test_the_published_counts_add_up() -> None:
    """Totals of the mixtures and of the release's folders agree with the published numbers."""
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
    """The components have the same counts."""

    def parts(mixture: str) -> dict[str, int]:
        """Return counts by dataset, without the name of the file that it is read from."""
        counts_by_dataset: dict[str, int] = {}
        for name, count in counts(mixture).items():
            part = name.removeprefix("mix665k_").removeprefix("next_779k_").removesuffix("_parquet")
            part = "sharegpt4v" if part.startswith("sharegpt4v") else part
            counts_by_dataset[part] = counts_by_dataset.get(part, 0) + (count or 0)
        return counts_by_dataset

    without_captions = {part: count for part, count in parts("llava_next_779k").items() if part != "coco_captions"}
    assert parts("llava_next_760k") == without_captions
    assert "textcaps" not in without_captions


# The subsets of LLaVA-NeXT's scripts/train/single_image.yaml that are used in part: {source: (percent, [subset of the
# hub's dataset, number in the name of the file])}.
USED_IN_PART = {
    "onevision_si_magpie": (
        50,
        [
            ("magpie_pro(qwen2_72b_st)", 299_992),
            ("magpie_pro(l3_80b_st)", 300_000),
            ("magpie_pro(l3_80b_mt)", 299_998),
        ],
    ),
    "onevision_si_10pct": (10, [("hme100k", 74_502), ("tallyqa(cauldron,llava_format)", 98_680)]),
    "onevision_si_5pct": (
        5,
        [
            ("scienceqa(nona_context)", 19_218),
            ("FigureQA(MathV360K)", 17_597),
            ("IconQA(MathV360K)", 22_599),
            ("PMC-VQA(MathV360K)", 35_958),
            ("raven(cauldron)", 42_000),
            ("iconqa(cauldron,llava_format)", 27_307),
            ("tqa(cauldron,llava_format)", 27_307),
        ],
    ),
    "onevision_si_1pct": (
        1,
        [
            ("k12_printing", 256_646),
            ("clevr(cauldron,llava_format)", 70_000),
            ("dvqa(cauldron,llava_format)", 200_000),
            ("figureqa(cauldron,llava_format)", 100_000),
        ],
    ),
}


def test_counts_of_the_single_image_stage() -> None:
    """Files that the authors use in part have that share of their samples, and no subset is in two sources."""
    chosen = counts("onevision_single_image")
    for name, (percent, subsets) in USED_IN_PART.items():
        assert chosen[name] == sum(math.ceil(percent * number / 100) for _, number in subsets)
        assert shipped(name).options["shards"] == [f"{subset}/train-*.parquet" for subset, _ in subsets]
    assert chosen["onevision_mid_evol_instruct"] == math.ceil(30 * 143_000 / 100)
    whole = shipped("onevision_si_all").options["shards"]
    assert len(whole) == 64
    everything = [*whole, *(f"{subset}/train-*.parquet" for _, part in USED_IN_PART.values() for subset, _ in part)]
    assert len(set(everything)) == len(everything) == 80
    assert total("onevision_single_image", *(f"next_779k_{part}" for part in NEXT_PARTS)) == 738_590


NEXT_PARTS = [name.removeprefix("next_779k_") for name in SOURCES if name.startswith("next_779k_")]
NEXT_PARTS.remove("parquet")


def test_clips_of_m4_instruct_are_rejected(tmp_path: Path) -> None:
    """A record of m4_instruct_video.json is rejected with the name of its key; lists of views keep their order."""
    clip = {"id": "h1", "video": "hound/1", "conversations": [{"from": "human", "value": "<image>\nWhy?"}]}
    write_file(tmp_path / "m4_instruct" / "m4_instruct_annotations.json", json.dumps([clip]))
    (item,) = shipped("m4_multi_image").samples(tmp_path)
    assert isinstance(item, Reject)
    assert item.reason == "unsupported_key"
    assert "`video`" in item.detail
    write_source(shipped("m4_nuscenes"), tmp_path / "drawn")
    (views,) = shipped("m4_nuscenes").samples(tmp_path / "drawn")
    assert isinstance(views, Sample)
    cameras = ["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT"]
    assert [image.parent.name for image in views.images if isinstance(image, Path)] == cameras


@pytest.mark.parametrize(
    ("name", "archive", "top"),
    [("m4_nuscenes", "nuscenes.zip", "nuscenes/"), ("m4_nuscenes", "nuscenes.zip", ""), ("m4_frames", "other.zip", "")],
)
def test_lists_of_views_in_the_archives_of_the_release(name: str, archive: str, top: str, tmp_path: Path) -> None:
    """Views are found in an archive with or without the folder of its name, and frames in one with another name."""
    folder = write_source(shipped(name), tmp_path)
    samples = [item for item in shipped(name).samples(tmp_path) if isinstance(item, Sample)]
    unpacked = folder / "nuscenes" if name == "m4_nuscenes" else folder
    packed = {f"{top}{path}": data for path, data in files_of(unpacked).items() if not path.endswith(".json")}
    for part in ("nuscenes", "nextqa", "star"):
        shutil.rmtree(folder / part)
    pack(folder / archive, packed)
    with archives.archives_cached_in(tmp_path / "cache"):
        found = [item for item in shipped(name).samples(tmp_path) if isinstance(item, Sample)]
    assert [sample.messages for sample in found] == [sample.messages for sample in samples]
    for sample, before in zip(found, samples, strict=True):
        members = [image for image in sample.images if isinstance(image, ArchiveMember)]
        assert [member.path for member in members] == list(before.images)


def test_assumptions_are_marked() -> None:
    """Assumptions are marked as such."""
    assert "OUR READING" in (CONFIGS / "mixture" / "interleave.yaml").read_text()
    assert "OUR READING" in (CONFIGS / "mixture" / "llava_next_760k.yaml").read_text()
    assert "INVENTED" in (CONFIGS / "source" / "laion_gpt4v.yaml").read_text()


@pytest.mark.parametrize("name", PREPARED_MIXTURES)
def test_a_shipped_mixture_from_its_raw_folders(name: str, tmp_path: Path) -> None:
    """Every source of a mixture is prepared from a small raw folder."""
    mixture = yaml.safe_load((CONFIGS / "mixture" / f"{name}.yaml").read_text())
    mixture["sources"] = {source: {} for source in mixture["sources"]}
    write_file(tmp_path / "configs" / "mixture" / f"{name}.yaml", yaml.safe_dump(mixture))
    for source in [*mixture["sources"], *mixture.get("exclude", [])]:
        write_source(shipped(source), tmp_path / "raw")
    (tmp_path / "configs" / "source").symlink_to(CONFIGS / "source")
    folders = ["--raw", str(tmp_path / "raw"), "--stores", str(tmp_path / "stores")]
    line = ["--mixture", name, "--configs", str(tmp_path / "configs"), "--workers", "1", "--partial", *folders]
    assert main(line) == 0
    opened = Mixture.open(read_mixture(tmp_path / "configs", name), tmp_path / "stores")
    assert min(row["found"] for row in opened.table()) > 0


@pytest.mark.parametrize(
    ("lines", "container"),
    [
        ("reader: messages_jsonl\nroot: mine\noptions: {annotations: own.jsonl}\n", "own.jsonl"),
        ("reader: messages_parquet\nroot: mine\n", "own.parquet"),
    ],
)
def test_user_data_needs_three_lines(lines: str, container: str, tmp_path: Path) -> None:
    """User data in messages format needs a YAML file of three lines."""
    write_file(tmp_path / "source" / "mine.yaml", lines)
    write_messages(tmp_path / "raw" / "mine", container)
    source = read_source(tmp_path, "mine")
    with_image, chat = source.samples(tmp_path / "raw")
    assert isinstance(with_image, Sample)
    assert isinstance(chat, Sample)
    assert with_image.images == (tmp_path / "raw/mine/photos/17.jpg",)
    assert [message.text for message in with_image.messages] == ["<image>\nWhat is it?", "A cup."]
    assert chat.images == ()


@pytest.mark.parametrize(
    ("citation", "message"),
    [("{key: a, type: misc}", "`citation` has no `title`"), ("someone, 2024", "must be dict")],
)
def test_invalid_citation(citation: str, message: str, tmp_path: Path) -> None:
    """Incomplete citations are reported when the YAML is read."""
    write_file(tmp_path / "source" / "mine.yaml", f"reader: llava_json\nroot: mine\ncitation: {citation}\n")
    with pytest.raises(DataError, match=message):
        read_source(tmp_path, "mine")


def test_citation_values_are_strings(tmp_path: Path) -> None:
    """Numbers in a citation become strings."""
    write_file(
        tmp_path / "source" / "m.yaml", "reader: r\nroot: m\ncitation: {key: a, type: misc, title: T, year: 2024}"
    )
    assert read_source(tmp_path, "m").citation["year"] == "2024"
    assert SourceInfo("m", "r", "m").citation == {}


def test_metrics(tmp_path: Path) -> None:
    """Shipped sources have their published metric, which is in the manifest; unknown metrics are reported."""
    kinds = {"docvqa": "anls", "chartqa": "relaxed_accuracy", "ai2d": "options", "synthdog_en": "edit_similarity"}
    assert {name: shipped(name).metric for name in kinds} == kinds
    assert describe_source(shipped("docvqa"))["metric"] == "anls"
    assert "download" not in describe_source(shipped("docvqa"))  # manifests of stores prepared before stay as they are
    write_file(tmp_path / "source" / "mine.yaml", "reader: llava_json\nroot: mine\nmetric: anl\n")
    with pytest.raises(DataError, match=r"`metric` is 'anl'; known: exact_match, .*, none\. Did you mean anls\?"):
        read_source(tmp_path, "mine")
