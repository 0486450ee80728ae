"""The drawing of the demo's raw data: true answers, the real sources' layouts, the same bytes for a seed."""

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llava_next.cache_root import cache_root

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "quickstart"))

import assets
import charts
import draw
import easy_vqa_shapes
import source_llava_instruct
import source_small_letters
import source_synthdog
from llava_json import LlavaJson
from vega_tables import Table

_YEARS = Table("Rain", "year", "rain", "mm", ("1931", "1932", "1933"), (10.0, 30.5, 20.0), in_time=True)
_KINDS = Table("Cars", "origin", "number of models", "", ("USA", "Japan"), (30.0, 10.0), shares=True)


def _styles() -> list[tuple[Table, charts.Style]]:
    return [
        (table, charts.Style(kind, (320, 480), "green"))
        for table in (_YEARS, _KINDS)
        for kind in ("bar", "hbar", "line", "pie")
        if kind in [*charts.kinds(table), "hbar"]
    ]


@pytest.mark.parametrize(("table", "style"), _styles())
def test_charts_are_the_same_bytes_and_have_their_size(table: Table, style: charts.Style) -> None:
    """A chart depends on its table and style only, has the asked size, and shows its colour."""
    first, second = charts.draw_chart(table, style), charts.draw_chart(table, style)
    assert first.tobytes() == second.tobytes()
    assert first.size == (480, 320)
    colours = {colour for _, colour in first.getcolors(maxcolors=1 << 20) or []}
    assert charts.PALETTE["green"] in colours


def test_every_value_changes_the_chart() -> None:
    """What is asked about is drawn: another value, label or title gives another picture."""
    style = charts.Style("bar", (320, 480), "blue")
    drawn = charts.draw_chart(_YEARS, style).tobytes()
    others = (
        Table("Rain", "year", "rain", "mm", ("1931", "1932", "1933"), (10.0, 30.5, 20.1), in_time=True),
        Table("Rain", "year", "rain", "mm", ("1931", "1932", "1934"), (10.0, 30.5, 20.0), in_time=True),
        Table("Snow", "year", "rain", "mm", ("1931", "1932", "1933"), (10.0, 30.5, 20.0), in_time=True),
    )
    assert all(charts.draw_chart(other, style).tobytes() != drawn for other in others)


def test_chart_answers_are_read_from_the_table() -> None:
    """Counts, extremes, values, differences and directions agree with the table."""
    style = charts.Style("line", (320, 480), "red")
    asked = {q.text: q.answer for seed in range(40) for q in charts.ask(_YEARS, style, random.Random(seed))}
    assert asked["How many points are there in the chart?"] == "3"
    assert asked["Which year has the highest rain?"] == "1932"
    assert asked["What is the lowest rain?"] == "10"
    assert asked["What is the rain in 1932?"] == "30.5"
    assert asked["What is the difference in rain between 1931 and 1932?"] == "20.5"
    assert asked["Did the rain rise or fall from 1932 to 1933?"] == "Fall"
    assert asked["Is the rain higher in 1931 than in 1933?"] == "No"
    assert asked["What colour are the points?"] == "red"


def test_a_tie_is_not_asked_about() -> None:
    """A question that has two right answers is left out."""
    tied = Table("Tied", "site", "yield", "t", ("a", "b", "c"), (5.0, 5.0, 1.0))
    style = charts.Style("bar", (320, 480), "red")
    asked = {q.text for seed in range(20) for q in charts.ask(tied, style, random.Random(seed))}
    assert "Which site has the highest yield?" not in asked
    assert "Which site has the lowest yield?" in asked
    assert "Is the yield higher for a than for b?" not in asked


@pytest.mark.parametrize(
    ("questions", "facts"),
    [
        ([("what color is the triangle?", "blue")], ("blue", "triangle")),
        ([("what is the red shape?", "circle")], ("red", "circle")),
        ([("is there a teal shape?", "yes"), ("is there not a circle?", "no")], ("teal", "circle")),
        ([("is there a teal shape?", "no"), ("what shape is present?", "circle")], None),
        (
            [("does the image not contain a red shape?", "yes"), ("what color is the circle?", "gray")],
            ("gray", "circle"),
        ),
    ],
)
def test_facts_follow_from_the_questions(questions: list[tuple[str, str]], facts: tuple[str, str] | None) -> None:
    """Colour and shape are what easy-VQA's own answers say; a denied one is never taken."""
    assert easy_vqa_shapes.colour_and_shape(questions) == facts


def _easy_vqa(folder: Path) -> Path:
    """A small folder in the package's layout: 40 pictures of known colour and shape."""
    for split in ("train", "test"):
        (folder / "data" / split / "images").mkdir(parents=True)
        asked = []
        for number in range(40):
            picture = Image.new("RGB", (64, 64), (240, 240, 250))
            ImageDraw.Draw(picture).rectangle((5, 5, 20 + number, 30), fill="blue")
            picture.save(folder / "data" / split / "images" / f"{number}.png")
            asked.append(["what color is the rectangle?", "blue", number])
        (folder / "data" / split / "questions.json").write_text(json.dumps(asked))
    return folder


def test_only_pictures_that_cannot_be_held_out_are_used(tmp_path: Path) -> None:
    """Collages show training pictures of the upper half of the hashes, never the test split."""
    usable = easy_vqa_shapes.read_shapes(_easy_vqa(tmp_path))
    assert 0 < len(usable) < 40
    assert all("train" in shape.path.parts for shape in usable)
    assert all(hashlib.sha256(shape.path.read_bytes()).hexdigest()[0] in "89abcdef" for shape in usable)


def test_collage_answers_agree_with_the_cells(tmp_path: Path) -> None:
    """Shape, place and number of a collage's cells are what the picture shows."""
    tiles = {}
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
        tiles[colour] = easy_vqa_shapes.Shape(tmp_path / f"{colour}.png", colour, "circle")
    row = [tiles["red"], tiles["blue"], tiles["red"]]
    picture = easy_vqa_shapes.collage(row, (1, 3), 96, random.Random(0))
    assert picture.width / picture.height == pytest.approx(3, rel=0.1)
    seen = [picture.getpixel((8 + 48 + column * 104, 56)) for column in range(3)]
    assert seen == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    asked = dict(turn for seed in range(60) for turn in easy_vqa_shapes.collage_turns(row, (1, 3), random.Random(seed)))
    assert asked["How many shapes are there?"] == "Three."
    assert asked["What colour is the left shape?"] == "Red."
    assert asked["Which shape is at the middle?"] == "A blue circle."
    assert asked["Where is the blue shape?"] == "At the middle."
    assert asked["How many triangles do you see?"] == "None."
    assert "Where is the red shape?" not in asked  # there are two
    assert "Which is further left, the red circle or the blue circle?" not in asked
    column = easy_vqa_shapes.describe_collage([tiles["red"], tiles["green"]], (2, 1))
    assert column == "A red circle and a green circle one above the other."


def test_sentences_are_whole_and_plain() -> None:
    """Paragraphs joined without a blank are parted; brackets, short and long sentences are left out."""
    text = (
        "Bees fly from one flower to another in summer.Honey is made by bees (and only by bees) in a hive. "
        "Too short here. Wax is what the bees make their combs of."
    )
    expected = ["Bees fly from one flower to another in summer.", "Wax is what the bees make their combs of."]
    assert source_synthdog.sentences(text) == expected


def test_lines_hold_all_words_within_the_width() -> None:
    """Wrapping keeps every word in order, and no line is wider than the page."""
    words = source_synthdog.sentences("Bees fly from one flower to another in the warm summer.")[0].split()
    font = charts.load_font(None, 20)
    lines = source_synthdog.wrap(words, font, 150)
    assert lines is not None
    assert " ".join(lines).split() == words
    assert max(font.getlength(line) for line in lines) <= 150
    assert source_synthdog.wrap(["incomprehensibilities"], font, 40) is None


def test_definitions_are_first_sentences() -> None:
    """An article counts when its first sentence says what its subject is."""
    text = "Albedo is the measure of the diffuse reflection of solar radiation. It varies.\nHe died.\n"
    expected = [("Albedo", "Albedo is the measure of the diffuse reflection of solar radiation.")]
    assert source_llava_instruct.definitions(text) == expected


def test_records_have_llavas_form(tmp_path: Path) -> None:
    """One placeholder in the first question of a record with a picture, none without it."""
    out = LlavaJson(tmp_path)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "source.png")
    for number in range(4):
        out.add(f"a/{number}.png", tmp_path / "source.png", [("What?", "Red."), ("Sure?", "Yes.")])
    out.add("text_1", None, [("Why?", "Because.")])
    out.save(tmp_path / "records.json")
    records = json.loads((tmp_path / "records.json").read_text())
    for record in records[:4]:
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt", "human", "gpt"]
        assert [turn["value"].count("<image>") for turn in record["conversations"]] == [1, 0, 0, 0]
        assert (tmp_path / record["image"]).read_bytes() == (tmp_path / "source.png").read_bytes()
    assert "image" not in records[4]
    assert records[4]["conversations"][0] == {"from": "human", "value": "Why?"}


def test_missing_assets_are_named_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without assets the program says which are missing and how to fetch them; exit code 2."""
    assert draw.main(["--cache", str(tmp_path), "--raw", str(tmp_path / "raw")]) == 2
    message = capsys.readouterr().err
    assert "assets.py" in message
    assert "easy_vqa" in message
    assert not (tmp_path / "raw").exists()


def _cache() -> Path:
    cache = cache_root()
    known = {asset.name: asset for asset in assets.ASSETS}
    missing = [n for n in assets.SETS["quickstart"] if not assets.is_complete(cache, known[n])]
    if missing:
        pytest.skip(f"{cache} lacks {', '.join(missing)}: run `python scripts/quickstart/assets.py` first")
    return cache


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_small_drawing_is_whole_and_repeatable(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another seed others; every picture that is named is there."""
    cache = _cache()
    names = ("llava_pretrain", "small_letters", "llava_instruct", "text_chats", "chartqa", "synthdog-en")
    for name in names:
        draw.draw(name, cache, tmp_path / "one", 0.02, 0)
        draw.draw(name, cache, tmp_path / "two", 0.02, 0)
    drawn = _hashes(tmp_path / "one")
    assert drawn == _hashes(tmp_path / "two")
    draw.draw("synthdog-en", cache, tmp_path / "three", 0.02, 1)
    assert _hashes(tmp_path / "three" / "synthdog-en") != _hashes(tmp_path / "one" / "synthdog-en")
    assert draw.draw("chartqa", cache, tmp_path / "one", 0.02, 0).endswith("is up to date")
    captions = json.loads((tmp_path / "one/llava_pretrain/blip_laion_cc_sbu_558k.json").read_text())
    assert all((tmp_path / "one/llava_pretrain/images" / record["image"]).exists() for record in captions)
    train = tmp_path / "one/chartqa/ChartQA Dataset/train"
    questions = json.loads((train / "train_human.json").read_text())
    assert {"imgname", "query", "label"} == set(questions[0])
    assert all((train / "png" / record["imgname"]).exists() for record in questions)
    line = json.loads((tmp_path / "one/synthdog-en/train/metadata.jsonl").read_text().splitlines()[0])
    words = json.loads(line["ground_truth"])["gt_parse"]["text_sequence"].split()
    assert 8 <= len(words) <= 25


@pytest.mark.parametrize("patch", [14, 16])
def test_pages_show_the_letter_at_half_a_patch(patch: int) -> None:
    """Ink is in every tile, and a letter is half as high as a patch; another letter gives another page."""
    fonts = source_small_letters.letter_fonts(_cache())
    assert len(fonts) == 4
    tile = source_small_letters.PATCHES_PER_SIDE * patch
    pages = [source_small_letters.draw_page(letter, 2, patch, fonts, random.Random(0)) for letter in ("X", "O")]
    assert pages[0].size == (2 * tile, 2 * tile)
    assert pages[0].tobytes() != pages[1].tobytes()
    is_ink = np.asarray(pages[0], dtype=int).sum(axis=2) < 400
    assert is_ink.reshape(2, tile, 2, tile).any(axis=(1, 3)).all()
    edges = np.flatnonzero(np.diff(is_ink.any(axis=1).astype(int)))  # of the rows of letters
    assert set(np.diff(edges)[(0 if is_ink[edges[0] + 1].any() else 1) :: 2]) == {patch // 2}
    assert source_small_letters.draw_page("X", 1, patch, fonts, random.Random(0)).size == (tile, tile)


def test_letters_and_their_questions_agree(tmp_path: Path) -> None:
    """Every letter is equally frequent, and pages have the size for the patch that is asked for."""
    folder = tmp_path / "small_letters"
    assert "78 records" in draw.draw("small_letters", _cache(), tmp_path, 0.03, 0, patch=16)
    records = json.loads((folder / "letters.json").read_text())
    answers = [record["conversations"][1]["value"] for record in records]
    assert sorted(answers) == sorted(source_small_letters.LETTERS * 13)
    with Image.open(folder / records[0]["image"]) as image:
        assert image.size == (128, 128)
    assert draw.draw("small_letters", _cache(), tmp_path, 0.03, 0, patch=16).endswith("is up to date")
    assert "78 records" in draw.draw("small_letters", _cache(), tmp_path, 0.03, 0)
    assert draw.main(["--raw", str(tmp_path), "--patch", "7"]) == 2


def test_pages_of_a_pair_differ_in_one_half(tmp_path: Path) -> None:
    """The answer is the letter that only the second page has; each answer and each half are about equally frequent."""
    assert "96 records" in draw.draw("letter_pairs", _cache(), tmp_path, 0.024, 0)
    folder = tmp_path / "letter_pairs"
    records = json.loads((folder / "pairs.json").read_text())
    answers = [record["conversations"][1]["value"] for record in records]
    assert sorted(answers) == sorted(source_small_letters.LETTERS * 16)
    changed_halves = []
    for record in records:
        first, second = (np.asarray(Image.open(folder / name)) for name in record["image"])
        assert first.shape == second.shape == (56, 56, 3)
        differs = (first != second).reshape(2, 28, -1).any(axis=(1, 2)).tolist()
        assert sorted(differs) == [False, True]
        changed_halves.append(differs.index(True))
    assert 30 < sum(changed_halves) < 66


def test_each_set_has_its_sources() -> None:
    """The pairs are drawn for their own experiment alone, and it needs no other source."""
    cache = _cache()
    names = {
        which: {source.name for source in draw.chosen_sources(cache, which)}
        for which in ("quickstart", "quickstart_sets")
    }
    assert names["quickstart_sets"] == {"letter_pairs"}
    assert "small_letters" in names["quickstart"]
    assert not names["quickstart"] & {"letter_pairs", *draw.CAPTIONED}
