"""The pages of `python -m train.inspect` show what the model sees, and texts of the data remain text."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from data_recipes.schema.sample import Message, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.writer import write_store
from llava_next.config import ANYRES, ImageMode, ViewsConfig
from llava_next.inputs.processor import IGNORE, Processor, SampleLayout
from llava_next.model.build import read_backbone
from tests.tiny import (
    SIZES_HW,
    TILE,
    TokenizerName,
    encoded_picture,
    tiny_mixture,
    tiny_model,
    tiny_samples,
    tiny_store,
)
from tests.train.cases import tiny_run
from tests.train.launch import Program
from train.config.compose import to_yaml
from train.config.schema import RunConfig
from train.html.views import canvas_of, side_for
from train.inspect.__main__ import main
from train.inspect.prompt import split_prompt, split_turns

MESSAGES = (
    Message("user", "<image><image>\nIs this é, 中 or 🙂?"),
    Message("assistant", "It is 🙂."),
    Message("user", "Sure?"),
    Message("assistant", "Yes."),
)


def _processor(
    folder: Path, kind: TokenizerName = "bytes", template: str = "chatml", mode: ImageMode = "anyres"
) -> Processor:
    backbone = read_backbone(tiny_model(folder, template=template, kind=kind))
    return backbone.processor(template=None, views=ViewsConfig(mode, mode), max_length=512)


# ------------------------------------------------------------------------------------------------ one sample


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_pieces_are_the_whole_prompt(tmp_path: Path, kind: TokenizerName, template: str) -> None:
    """Joined, they are the rendered text, with characters of several tokens; every token is in exactly one piece, and
    the supervised tokens are those of the loss."""
    processor = _processor(tmp_path, kind, template)
    layout = processor.layout(MESSAGES, SIZES_HW[1:3])
    pieces = split_prompt(layout, processor.tokenizer)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == layout.num_tokens
    assert [piece.stop - piece.start for piece in pieces if piece.image is not None] == [
        image.num_tokens for image in layout.images
    ]
    rendered = "".join(segment.text for segment in processor.template.render(MESSAGES)).replace("<image>", "")
    bos = processor.tokenizer.bos_token if processor.template.bos else ""
    assert _without_spaces("".join(piece.text for piece in pieces)) == _without_spaces(bos + rendered)
    assert sum(piece.stop - piece.start for piece in pieces if piece.is_supervised) == layout.num_supervised
    answers = ["".join(p.text for p in run).strip() for run, is_answer in split_turns(pieces) if is_answer]
    assert answers == [f"It is 🙂.{processor.template.end}", f"Yes.{processor.template.end}"]


def _without_spaces(text: str) -> str:
    return "".join(text.split(" "))  # a sentencepiece tokenizer puts one before every text


def test_bytes_that_are_no_character_are_shown(tmp_path: Path) -> None:
    """Ids of byte tokens that no text has are in pieces too."""
    processor = _processor(tmp_path, "metaspace")
    number = processor.tokenizer.convert_tokens_to_ids("<0xE4>")
    ids = np.array([number, number, 400, number, 401, number], dtype=np.int32)
    layout = SampleLayout(ids, np.full(6, IGNORE), (), processor.image_token_id)
    pieces = split_prompt(layout, processor.tokenizer)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == 6


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize("mode", get_args(ImageMode))
def test_edges_and_kept_part_match_the_pixels(tmp_path: Path, size_hw: tuple[int, int], mode: ImageMode) -> None:
    """The canvas of a white image is white inside the drawn edge and padding outside, and the kept box holds all of the
    image that tokens represent."""
    processor = _processor(tmp_path, mode=mode)
    white = _white_image(size_hw)
    messages = (Message("user", "<image>"), Message("assistant", "White."))
    example = processor.encode(messages, [size_hw], [white])
    (image,) = example.layout.images
    canvas = canvas_of(image, example.tiles, white)
    top, left, bottom, right = canvas.image
    outside = np.ones(canvas.pixels.shape[:2], dtype=bool)
    outside[top:bottom, left:right] = False
    assert (canvas.pixels[top + 1 : bottom - 1, left + 1 : right - 1] > 240).all()
    if mode == "anyres":
        assert image.grid is not None
        assert not canvas.pixels[outside].any()
        kept_h, kept_w = canvas.kept[2] - canvas.kept[0], canvas.kept[3] - canvas.kept[1]
        patch = TILE // image.patches_per_side
        assert kept_h * kept_w == patch**2 * (image.num_tokens - image.patches_per_side**2 - kept_h // patch)
        assert bottom - top - kept_h < 2 * patch  # at most a part of a patch is lost on either side
        assert right - left - kept_w < 2 * patch
    elif mode == "crop":
        top, left, bottom, right = canvas.kept
        assert np.array_equal(canvas.pixels[top:bottom, left:right], example.tiles[0])
    elif mode == "squash":
        assert np.array_equal(canvas.pixels, example.tiles[0])
        assert canvas.image == canvas.kept == (0, 0, TILE, TILE)
    else:
        assert np.array_equal(canvas.pixels, example.tiles[0])
        assert not outside.any() or (canvas.pixels[outside].mean() < 200)


def _white_image(size_hw: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size_hw[1], size_hw[0]), "white").save(stream, "PNG")
    return stream.getvalue()


def test_many_images_are_embedded_smaller() -> None:
    """Twenty times as many images are not twenty times the bytes, down to a least size."""
    sides = [side_for(number) for number in (0, 1, 16, 300, 100_000)]
    assert sides == sorted(sides, reverse=True)
    assert 300 * side_for(300) ** 2 < 2 * 16 * side_for(16) ** 2
    assert sides[-1] >= 100


# ------------------------------------------------------------------------------------------------ pages


class _Page(HTMLParser):
    """A parsed page: its tags, their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def samples(self) -> list[str]:
        """The ids of the samples, in order."""
        heads = self.html.partition('</h2>\n<p class="faint key"')[2].split("<h3>")[1:]
        return [head.partition("</h3>")[0].rpartition(" : ")[2] for head in heads]


@pytest.fixture
def program(tiny_parts: RunConfig, tmp_path: Path) -> Program:
    """The program, whose folder of YAML files is used."""
    return Program(tiny_parts, tmp_path)


@pytest.fixture
def look(program: Program, tmp_path: Path) -> Callable[..., _Page]:
    """Runs the program on a store with the tiny model; returns the page."""

    def run(store: Path, *arguments: str, max_length: int = 512) -> _Page:
        out = tmp_path / "page.html"
        overrides = ["model/language_model=tiny", "model/vision_tower=tiny", f"stage.max_length={max_length}"]
        config_dir = str(program.folder / "configs")
        assert main([str(store), *overrides, "--config-dir", config_dir, "--out", str(out), *arguments]) == 0
        return _Page(out)

    return run


def test_hostile_texts_stay_text(look: Callable[..., _Page], tmp_path: Path) -> None:
    """Question, answer, id, and what was left out never become a tag, an attribute or a request."""
    evil = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)></mark></style>\u202e\x00"
    image = encoded_picture(1, (40, 40))
    good = Sample(f"id{evil}", (Message("user", f"<image>{evil}"), Message("assistant", evil)), (image,), evil)
    empty = Sample(f"bad{evil}", (Message("user", evil), Message("assistant", " ")), (), f"place{evil}")
    long = Sample(f"long{evil}", (Message("user", evil * 20), Message("assistant", "x")), (), "long")
    store = tmp_path / "stores" / "evil"
    write_store(
        store, SourceInfo(name="evil", reader="llava_json", root=".", max_reject_share=1.0), [good, empty, long]
    )
    page = look(store, "stage.init_from=null", "--loss")
    assert {"script", "img", "iframe", "link", "object"} & page.tags == set()
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href") and value[:1] != "#" and not value.startswith("data:image/jpeg;base64,")
    ]
    assert page.text.count("alert(1)") >= 2 + 1 + 20  # question, answer, id and place, and the long one's question
    assert "⟨U+202E⟩" in page.html
    assert "\u202e" not in page.html
    assert "default-src 'none'" in page.html
    assert "empty_answer: 1" in page.text
    assert "too_long: 1" in page.text
    assert "rejected by this stage: too_long" in page.text


def test_samples_of_a_store_are_drawn_by_seed(look: Callable[..., _Page], tmp_path: Path) -> None:
    """The same seed gives the same page, another seed other samples; named samples are in the order of their names."""
    store = tiny_store(tmp_path / "stores", "tiny_pictures", tiny_samples(30))
    first, again = look(store, "--num", "5"), look(store, "--num", "5")
    assert first.html == again.html
    assert len(first.samples) == 5
    assert look(store, "--num", "5", "--seed", "1").samples != first.samples
    named = ["000017", "tiny_pictures:000003"]
    assert look(store, "--ids", *named).samples == ["000017", "000003"]


def test_counts_are_those_of_the_processor(look: Callable[..., _Page], tiny_parts: RunConfig, tmp_path: Path) -> None:
    """The counts of a sample are the processor's, and each of its two images has its drawing and its tiles."""
    sample = tiny_samples(5)[4]
    page = look(tiny_store(tmp_path / "stores", "one", [sample]))
    backbone = read_backbone(tiny_parts.model)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    sizes = [SIZES_HW[(4 + number) % len(SIZES_HW)] for number in range(2)]
    layout = processor.layout(sample.messages, sizes)
    assert f"{layout.num_tokens} tokens · {sum(i.num_tokens for i in layout.images)} of images" in page.text
    assert f"{layout.num_supervised} supervised · {layout.num_tiles} tiles" in page.text
    assert [value for name, value in page.attributes if name == "href" and value[0] == "#"] == [
        f"#s0p{index}" for index, image in enumerate(layout.images) for _ in range(image.num_tiles - 1)
    ]


# ------------------------------------------------------------------------------------------------ mistakes


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with the mistake and its fix."""
    mixture, store_root = tiny_mixture(tmp_path / "data", 8)
    config = tiny_run(tiny_model(tmp_path / "models"), mixture, store_root, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(replace(config, data=replace(config.data, length_workers=1))))
    store = store_root / "tiny_pictures"
    for arguments, message in (
        ([tmp_path / "none"], "is neither a prepared source"),
        ([store_root], "inside it there are tiny_chats, tiny_pictures"),
        ([store, "--step", "1"], "--step 1: .* is a prepared source, and steps are a run's"),
        ([store], "name another as for training"),
        ([store, "--like", run, "--ids", "00001"], "--ids 00001: no sample of tiny_pictures .* for example 000001"),
        ([store, "--like", run, "seed=1"], "seed=1: .* its config.yaml decides"),
        ([store, "modle=x"], "modle"),
        ([run, "seed=1"], "seed=1: .* is a run, and its config.yaml decides"),
        ([run, "--step", "9"], "--step 9: the steps of .* are 0 to 0"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error


def test_data_that_differs_from_the_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stores that were prepared again may have other samples at a step."""
    mixture, store_root = tiny_mixture(tmp_path / "data", 8)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(tiny_run(tiny_model(tmp_path / "m"), mixture, store_root, tmp_path)))
    (run / "data.json").write_text(json.dumps({"data_fingerprint": "0" * 64}))
    assert main([str(run)]) == 2
    assert "its steps would have other samples" in capsys.readouterr().err
