"""Tests of the readers of images with texts: imagefolder, image_text_parquet and webdataset."""

import csv
import gc
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies

from data_recipes.prepare import __main__ as prepare
from data_recipes.raw.questions import LETTER_ANSWER
from data_recipes.readers import image_text_parquet, imagefolder, webdataset
from data_recipes.schema.sample import DataError, Reason, Reject, Sample, check_sample
from data_recipes.store.reader import Store
from tests.data_recipes.prepare.program import arguments
from tests.data_recipes.raw_folders import cell, make_image, write_file, write_parquet


def turns(item: Sample | Reject) -> list[tuple[str, str]]:
    """Return the (role, text) pairs of a sample."""
    assert isinstance(item, Sample), item
    return [(message.role, message.text) for message in item.messages]


def reason(item: Sample | Reject) -> Reason:
    """Return the reason of a reject."""
    assert isinstance(item, Reject), item
    assert len(item.detail.splitlines()) == 1
    assert len(item.detail) < 400
    return item.reason


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    return write_file(path, "\n".join(map(json.dumps, rows)) + "\n")


def write_shard(path: Path, files: Mapping[str, bytes | str], mode: str = "w") -> Path:
    """Write a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# ------------------------------------------------------------------------------------------------ the forms of a row


def convert(row: dict[str, Any], **options: Any) -> Sample | Reject:
    """Convert one row with an image."""
    return imagefolder.convert_row(
        {"file_name": "1.jpg", **row}, Path("r"), "t, row 1", imagefolder.RowLayout(**options)
    )


def test_captions_answer_a_prompt() -> None:
    """A prompt is selected for each image by its id, and the same one again."""
    prompts = ["Describe it.", "What is it?", "Explain the image."]
    items = [convert({"text": "A cup.", "id": str(number)}, prompts=prompts) for number in range(40)]
    assert {turns(item)[0][1] for item in items} == {f"<image>\n{prompt}" for prompt in prompts}
    assert items == [convert({"text": "A cup.", "id": str(number)}, prompts=prompts) for number in range(40)]
    assert turns(items[0])[1] == ("assistant", "A cup.")
    assert turns(convert({"caption": "A cup."})) == [
        ("user", f"<image>\n{imagefolder.PROMPTS[0]}"),
        ("assistant", "A cup."),
    ]


def test_question_with_answers() -> None:
    """The most frequent answer, of equally frequent ones the first; a format instruction is appended."""
    assert turns(convert({"question": "How many?", "answer": "two"}, suffix="Be short.")) == [
        ("user", "<image>\nHow many?\nBe short."),
        ("assistant", "two"),
    ]
    for answers, expected in [
        (["a", "b"], "a"),
        (["a", "b", "b"], "b"),
        (["", "b"], "b"),
        (
            [{"answer": "net", "answer_id": 1}, {"answer": "sea", "answer_id": 2}, {"answer": "sea", "answer_id": 3}],
            "sea",
        ),
    ]:
        assert turns(convert({"question": "What?", "answers": answers}))[1] == ("assistant", expected)
    assert turns(convert({"query": "Which year?", "label": ["2016"]}))[1] == ("assistant", "2016")


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["sun", "sea"], "sea", "B"),
        (["sun", "sea"], "B", "B"),
        (["sun", "sea"], 0, "A"),
        (["sun", "sea"], "1", "B"),
        (["2", "1"], "2", "A"),  # no index
        (["A", "B"], "A", "A"),
    ],
)
def test_options_are_asked_for(options: list[str], answer: object, letter: str) -> None:
    """The options follow the question, and the answer is the letter of the right one."""
    listed = f"A. {options[0]}\nB. {options[1]}"
    assert turns(convert({"question": "What?", "choices": options, "answer": answer})) == [
        ("user", f"<image>\nWhat?\n{listed}\n{LETTER_ANSWER}"),
        ("assistant", letter),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, Reason.BROKEN_RECORD),
        ({"question": "What?"}, Reason.NO_ANSWER),
        ({"question": "What?", "answers": []}, Reason.NO_ANSWER),
        ({"question": 7, "answer": "x"}, Reason.NOT_A_STRING),
        ({"question": "What?", "answer": 7}, Reason.NOT_A_STRING),
        ({"question": "What?", "answer": "1", "options": ["1", "3"]}, Reason.BROKEN_RECORD),  # an index or a text?
        ({"question": "What?", "answer": "C", "options": ["x", "y"]}, Reason.BROKEN_RECORD),
        ({"question": "What?", "answer": 2, "options": ["x", "y"]}, Reason.BROKEN_RECORD),
        ({"question": "What?", "answer": True, "options": ["x", "y"]}, Reason.BROKEN_RECORD),
        ({"question": "What?", "answer": "x", "options": "['x', 'y']"}, Reason.BROKEN_RECORD),
        ({"texts": "a" * 1000}, Reason.BROKEN_RECORD),
        ({"texts": [{"user": "What?", "assistant": "It.", "video": "v.mp4"}]}, Reason.UNSUPPORTED_KEY),
        ({"text": "It.", "video": "v.mp4"}, Reason.UNSUPPORTED_KEY),
        ({"text": 7}, Reason.NOT_A_STRING),
        ({"text": "A cup.", "file_name": None}, Reason.IMAGE_MISSING),
        ({"text": "A cup.", "file_name": "../1.jpg"}, Reason.PATH_OUTSIDE_ROOT),
        ({"text": "A cup.", "image": "2.jpg"}, Reason.BROKEN_RECORD),  # beside file_name
    ],
)
def test_rows_that_are_rejected(row: dict[str, Any], expected: Reason) -> None:
    """A row that does not say what is asked and answered is a reject with one line."""
    assert reason(convert(row)) == expected


def test_incomplete_pairs() -> None:
    """A pair without an answer, or with another medium, is no sample."""
    for pair in ({"user": "What?"}, {"user": "What?", "assistant": "It.", "video": "v.mp4"}):
        item = convert({"texts": [pair]})
        assert isinstance(item, Reject) or check_sample(item) is not None


def test_pairs_and_conversations() -> None:
    """The Cauldron's pairs and conversations of both kinds of turns; images come before the first question."""
    expected = [("user", "<image>\nWhat?"), ("assistant", "It."), ("user", "Why?"), ("assistant", "So.")]
    pairs = [{"user": "What?", "assistant": "It.", "source": "x"}, {"user": "Why?", "assistant": "So."}]
    assert turns(convert({"texts": pairs})) == expected
    messages = [{"role": role, "content": text.removeprefix("<image>\n")} for role, text in expected]
    assert turns(convert({"messages": messages})) == expected
    assert turns(convert({"conversations": [{"from": role, "value": text} for role, text in expected]})) == expected
    assert turns(convert({"text": "not this", "talk": messages}, columns={"messages": "talk"})) == expected
    assert reason(convert({"text": "not this"}, columns={"messages": "talk"})) == Reason.BROKEN_RECORD


@pytest.mark.parametrize(
    "options",
    [
        {"columns": {"caption": "text"}},
        {"columns": ["text"]},
        {"columns": {"text": 3}},
        {"prompts": []},
        {"prompts": "x"},
    ],
)
def test_options_that_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """A user error that names the option."""
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "1.jpg", "text": "A cup."}])
    with pytest.raises(DataError, match=next(iter(options))):
        list(imagefolder.samples(tmp_path, **options))


# ------------------------------------------------------------------------------------------------ containers


def test_imagefolder_tables(tmp_path: Path) -> None:
    """JSON lines, CSV and parquet hold the same rows; names are relative to the table's folder."""
    rows = [{"file_name": f"{number}.jpg", "text": f"Cup {number}, red\nand round."} for number in range(3)]
    write_lines(tmp_path / "train/metadata.jsonl", rows)
    write_parquet(tmp_path / "train/metadata.parquet", rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(rows)
    write_file(tmp_path / "train/metadata.csv", "\ufeff" + text.getvalue())
    read = [list(imagefolder.samples(tmp_path, f"train/metadata.{kind}")) for kind in ("jsonl", "csv", "parquet")]
    for items in read:
        assert [turns(item)[1][1] for item in items] == [row["text"] for row in rows]
        assert [item.images for item in items if isinstance(item, Sample)] == [
            (tmp_path / "train" / f"{number}.jpg",) for number in range(3)
        ]
    (item, *_) = imagefolder.samples(tmp_path, "train/metadata.csv", image_root="elsewhere")
    assert isinstance(item, Sample)
    assert item.images == (tmp_path / "elsewhere" / "0.jpg",)


def test_several_images_of_a_row(tmp_path: Path) -> None:
    """`file_names` is a list of images."""
    write_lines(tmp_path / "metadata.jsonl", [{"file_names": ["a.jpg", "b.jpg"], "question": "Same?", "answer": "no"}])
    (item,) = imagefolder.samples(tmp_path)
    assert turns(item)[0] == ("user", "<image>\n<image>\nSame?")


def test_damaged_csv(tmp_path: Path) -> None:
    """A row with another number of cells is rejected alone; after broken quotes, the rest is one reject."""
    write_file(
        tmp_path / "a.csv",
        'file_name,text\n1.jpg,One.\n2.jpg\n3.jpg,Three.,x\n4.jpg,Four.\n5.jpg,"Fi"ve.\n6.jpg,Six.\n',
    )
    items = list(imagefolder.samples(tmp_path, "a.csv"))
    assert [turns(item)[1][1] if isinstance(item, Sample) else item.reason.value for item in items] == [
        "One.",
        "broken_record",
        "broken_record",
        "Four.",
        "broken_record",
    ]


def test_folder_of_classes_is_refused(tmp_path: Path) -> None:
    """Images without a table are a user error that says what a table looks like."""
    write_file(tmp_path / "cat" / "1.jpg", make_image(1))
    with pytest.raises(DataError, match=r'metadata.jsonl with lines \{"file_name": "1.jpg", "text": "A cup."\}'):
        list(imagefolder.samples(tmp_path))


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    """The Cauldron's and FineVision's columns, and image with question and answers; a damaged shard is a reject."""
    cauldron = [{"images": [cell(1), cell(2)], "texts": [{"user": "Same?", "assistant": "No.", "source": "s"}]}]
    write_parquet(tmp_path / "cauldron" / "train-00000-of-00001-ab12.parquet", cauldron)
    (item,) = image_text_parquet.samples(tmp_path, "cauldron/*.parquet")
    assert turns(item) == [("user", "<image>\n<image>\nSame?"), ("assistant", "No.")]
    assert isinstance(item, Sample)
    assert item.images == (cell(1)["bytes"], cell(2)["bytes"])
    rows: list[dict[str, Any]] = [
        {"image": cell(3), "question": "What?", "answers": ["x"], "questionId": "7"},
        {"image": None, "question": "Capital of France?", "answers": ["Paris"], "questionId": "8"},
    ]
    write_parquet(tmp_path / "vqa" / "a-00000.parquet", rows)
    write_file(tmp_path / "vqa" / "a-00001.parquet", (tmp_path / "vqa/a-00000.parquet").read_bytes()[:-100])
    items = list(image_text_parquet.samples(tmp_path, "vqa/*.parquet"))
    assert [turns(item)[0][1] for item in items[:2]] == ["<image>\nWhat?", "Capital of France?"]
    assert reason(items[2]) == Reason.FILE_UNREADABLE


def test_webdataset(tmp_path: Path) -> None:
    """JSON and captions beside images, several images in the order of their numbers, in plain and compressed shards."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    files: dict[str, bytes | str] = {
        "a/0001.jpg": make_image(1),
        "a/0001.json": json.dumps({"image": "0001.jpg", "conversations": talk}),
        "a/0002.png": make_image(2),
        "a/0002.txt": " A cup.\n",
        "a/0003.json": json.dumps({"question": "Same?", "answer": "no"}),
        **{f"a/0003.{number}.jpg": make_image(number) for number in (10, 9, 2)},
        "a/0004.jpg": make_image(4),
        "a/0004.json": json.dumps({"caption": "A red cup.", "url": "https://example.org/4.jpg", "status": "success"}),
        "a/0004.txt": "A red cup.",
    }
    write_shard(tmp_path / "x" / "00000.tar", files)
    items = list(webdataset.samples(tmp_path))
    assert [turns(item) for item in items] == [
        [("user", "<image>\nWhat?"), ("assistant", "It.")],
        [("user", f"<image>\n{imagefolder.PROMPTS[0]}"), ("assistant", "A cup.")],
        [("user", "<image>\n<image>\n<image>\nSame?"), ("assistant", "no")],
        [("user", f"<image>\n{imagefolder.PROMPTS[0]}"), ("assistant", "A red cup.")],
    ]
    assert [item.images for item in items if isinstance(item, Sample)] == [
        (make_image(1),),
        (make_image(2),),
        (make_image(2), make_image(9), make_image(10)),
        (make_image(4),),
    ]
    assert items[0].id == "00000.tar, a/0001"
    for mode in ("gz", "xz"):
        write_shard(tmp_path / f"00000.tar.{mode}", files, f"w:{mode}")
        packed = list(webdataset.samples(tmp_path, f"*.tar.{mode}"))
        assert [turns(item) for item in packed] == [turns(item) for item in items]


def test_webdataset_rejects(tmp_path: Path) -> None:
    """A group without image, text or a known kind of file is rejected alone; nothing of it becomes another sample."""
    image = make_image(1)
    question = json.dumps({"question": "What?", "answer": "x"})
    write_shard(
        tmp_path / "0.tar",
        {
            "no_image.json": question,
            "no_text.jpg": image,
            "clip.jpg": image,
            "clip.json": question,
            "clip.mp4": b"x",
            "list.jpg": image,
            "list.json": "[1]",
            "two.jpg": image,
            "two.json": json.dumps({"images": ["two.jpg", "three.jpg"], "question": "Same?", "answer": "x"}),
            "good.jpg": image,
            "good.json": question,
        },
    )
    items = list(webdataset.samples(tmp_path))
    assert [reason(item).value if isinstance(item, Reject) else item.id for item in items] == [
        "picture_missing",
        "broken_record",
        "broken_record",
        "broken_record",
        "picture_missing",
        "0.tar, good",
    ]


def cut_points(data: bytes) -> Sequence[int]:
    """Positions in a tar file: inside a file, at a header, inside a header, and in its second half."""
    return [len(data) // 2, data.index(b"2.jpg"), data.index(b"2.jpg") + 100, 700, 100, 0]


@pytest.mark.parametrize("number", range(6))
def test_damaged_shard(number: int, tmp_path: Path) -> None:
    """A shard that is cut off anywhere keeps what was read and is one reject; the other shards are read."""
    files: dict[str, bytes | str] = {}
    for name in ("1", "2", "3"):
        files |= {f"{name}.jpg": make_image(int(name), 40, 40), f"{name}.txt": f"Cup {name}."}
    data = write_shard(tmp_path / "0.tar", files).read_bytes()
    write_shard(tmp_path / "1.tar", {f"b{name}": content for name, content in files.items()})
    write_file(tmp_path / "0.tar", data[: cut_points(data)[number]])
    items = list(webdataset.samples(tmp_path))
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [reject.reason for reject in rejects] == [Reason.FILE_UNREADABLE]
    assert rejects[0].location == "0.tar"
    assert [item.id for item in items[-3:]] == ["1.tar, b1", "1.tar, b2", "1.tar, b3"]
    assert 0 <= len(items) - 4 < 3


def test_damaged_header_is_no_end(tmp_path: Path) -> None:
    """A header in the middle that is no header: what follows is lost, and this is said."""
    data = write_shard(
        tmp_path / "0.tar", {"1.txt": "A", "1.jpg": make_image(1), "2.jpg": b"", "2.txt": "B"}
    ).read_bytes()
    at = data.index(b"2.jpg")
    write_file(tmp_path / "0.tar", data[:at] + b"\xff" * 512 + data[at + 512 :])
    items = list(webdataset.samples(tmp_path))
    assert [reason(item) for item in items] == [Reason.FILE_UNREADABLE]


def test_memory_of_a_long_shard(tmp_path: Path) -> None:
    """Headers of files that were read are not kept."""
    write_shard(tmp_path / "0.tar", {f"{number}.{kind}": "" for number in range(50) for kind in ("jpg", "txt")})
    stream = webdataset.samples(tmp_path)
    for _ in range(40):
        next(stream)
    kinds = [type(each) for each in gc.get_objects()]  # isinstance would call the objects
    assert sum(issubclass(kind, tarfile.TarInfo) for kind in kinds) < 5


@pytest.mark.parametrize("reader", ["imagefolder", "image_text_parquet", "webdataset"])
def test_preparation(reader: str, tmp_path: Path) -> None:
    """Each reader gives the same store from a source of three lines."""
    names = [f"{number}.jpg" for number in range(3)]
    images = {name: make_image(number, kind="JPEG") for number, name in enumerate(names)}
    rows = [{"id": name, "file_name": name, "text": f"Cup {name}."} for name in names]
    root = tmp_path / "raw" / "cups"
    if reader == "imagefolder":
        write_lines(root / "metadata.jsonl", rows)
        for name, data in images.items():
            write_file(root / name, data)
    elif reader == "image_text_parquet":
        write_parquet(
            root / "train.parquet", [{**row, "file_name": None, "image": {"bytes": images[row["id"]]}} for row in rows]
        )
    else:
        write_shard(
            root / "0.tar",
            {
                k: v
                for row in rows
                for k, v in ((row["id"], images[row["id"]]), (f"{row['id'][:-4]}.json", json.dumps(row)))
            },
        )
    write_file(tmp_path / "configs/source/cups.yaml", yaml.safe_dump({"reader": reader, "root": "cups"}))
    assert prepare.main(arguments(tmp_path, "--source", "cups")) == 0
    store = Store.open(tmp_path / "stores/cups")
    assert store.ids() == names
    assert [store.sample(number).images for number in range(3)] == [(data,) for data in images.values()]
    assert [store.text(number).messages[1].text for number in range(3)] == [row["text"] for row in rows]


_KEYS = strategies.sampled_from(
    [
        *(name for names in imagefolder.COLUMNS.values() for name in names),
        "id",
        "user",
        "assistant",
        "from",
        "value",
        "role",
        "content",
    ]
)
_TURN: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "image"}, {"type": 3}],
    "from": None,
    "user": {},
    "assistant": [],
}
_VALUES = strategies.sampled_from(
    [
        *(
            None,
            True,
            -1,
            2,
            0.5,
            float("nan"),
            "",
            "x",
            "A",
            "1",
            "a\n<image>",
            "\ud83d",
            "x" * 5000,
            [],
            {},
            [[]],
            [None],
        ),
        *([1, "x"], ["x", "y"], [{}], [{"answer": 3}], {"bytes": None, "path": 3}, {"x" * 900: "a\nb"}),
        *([_TURN], [_TURN, "x"], [{"from": "human", "value": 7}], [{"user": 1, "assistant": None}], [{"user": "a\nb"}]),
    ]
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(row=strategies.dictionaries(_KEYS, _VALUES, max_size=5))
def test_any_value_in_any_place(row: dict[str, Any]) -> None:
    """A row of any JSON values is a sample or a reject with a reason of one line."""
    item = imagefolder.convert_row(row, Path("r"), "t, row 1", imagefolder.RowLayout())
    reject = check_sample(item) if isinstance(item, Sample) else item
    assert reject is None or reason(reject)
