"""Tests of the program that makes training data from a demo's logs, and of its privacy."""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_recipes.demo_requests.__main__ import main
from data_recipes.schema.sample import Sample
from data_recipes.schema.source import read_source
from tests.data_recipes.demo_requests.demo_logs import ADDRESS, DAY, TIME, Demo, photo
from tests.data_recipes.raw_folders import write_file

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    """A demo without logs."""
    return Demo(tmp_path / "logs")


def collect(demo: Demo, out: Path, *more: str) -> Counter[str]:
    """Run the first step and return the number of dropped requests per reason."""
    line = ["collect", "--logs", str(demo.folder), "--out", str(out), "--model", "stronger-1", *more]
    assert main(line) == 0
    lines = (out / "left_out.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["reason"] for line in lines)


def requests(out: Path) -> list[dict[str, Any]]:
    """Read all requests of the batch files."""
    files = sorted((out / "requests").glob("requests_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def request_texts(out: Path) -> set[str]:
    """Return the texts of the requests."""
    return {request["body"]["messages"][0]["content"][1]["text"] for request in requests(out)}


def make_answer(request: dict[str, Any], text: Any = "A boat in fog.", **choice: Any) -> dict[str, Any]:
    """Build the answer of a batch service to a request."""
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice]}
    return {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def test_from_logs_to_a_source(demo: Demo, tmp_path: Path) -> None:
    """Both steps: logs to batch requests, and answers to LLaVA JSON that the shipped source reads."""
    demo.ask("What is in the fog?", photo(1))
    demo.ask("Is this safe to eat?", photo(2))
    demo.write()
    out = tmp_path / "raw" / "demo_requests"
    assert collect(demo, out) == {}
    lines = requests(out)
    assert {(line["method"], line["url"], line["body"]["model"]) for line in lines} == {
        ("POST", "/v1/chat/completions", "stronger-1")
    }
    entries = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [line["id"] for line in entries]
    for line, entry in zip(lines, entries, strict=True):
        url = line["body"]["messages"][0]["content"][0]["image_url"]["url"]
        head, _, data = url.partition(",")
        assert head == "data:image/jpeg;base64"
        assert base64.b64decode(data) == (out / entry["image"]).read_bytes()

    write_file(tmp_path / "answers.jsonl", "\n".join(json.dumps(make_answer(line)) for line in lines))
    assert main(["answer", "--out", str(out), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    samples = list(read_source(CONFIGS, "demo_requests").samples(tmp_path / "raw"))
    assert len(samples) == 2
    texts = {tuple(m.text for m in sample.messages) for sample in samples if isinstance(sample, Sample)}
    assert texts == {
        ("<image>\nWhat is in the fog?", "A boat in fog."),
        ("<image>\nIs this safe to eat?", "A boat in fog."),
    }


def test_output_has_no_address_or_time(demo: Demo, tmp_path: Path) -> None:
    """Addresses, times and image metadata are in no output file and no file name."""
    exif = Image.Exif()
    exif[0x0110] = "CAMERA-OF-SOMEBODY"
    exif[0x0132] = "2024:02:03 04:05:06"
    exif.get_ifd(0x8825)[1] = "N"
    demo.ask("What is in the fog?", photo(1, exif=exif, comment=b"taken by SOMEBODY"))
    demo.ask("Mail me: me@example.org", photo(2))
    demo.lines.append("{broken " + ADDRESS)
    demo.write()
    out = tmp_path / "out"
    assert collect(demo, out) == {"private_email": 1, "broken_record": 1}
    write_file(tmp_path / "answers.jsonl", json.dumps(make_answer(requests(out)[0])))
    assert main(["answer", "--out", str(out), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    traces = [ADDRESS, str(TIME), "17069500", DAY, "2024:02:03", "SOMEBODY", "me@example.org"]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        assert [trace for trace in traces if trace.encode() in path.read_bytes() or trace in str(path)] == []
    with Image.open(next((out / "images").iterdir())) as image:
        assert len(image.getexif()) == 0
        assert "comment" not in image.info


def test_invalid_requests_have_reasons(demo: Demo, tmp_path: Path) -> None:
    """Later turns, chats without image or question, votes and missing images have their own reasons."""
    demo.ask("What is in the fog?", photo(1))
    demo.line("upvote", ["What is in the fog?\n<image>", "It is a thing."])
    demo.line("chat", ["What is in the fog?\n<image>", "A boat.", "Why?", "So."], images=[demo.save_image(photo(1))])
    demo.ask("Write a poem.")
    demo.ask("", photo(2))
    demo.line("chat", ["Two?\n<image>", "Yes."], images=[demo.save_image(photo(1)), demo.save_image(photo(2))])
    demo.line("chat", ["Gone?\n<image>", "Yes."], images=["0" * 32])
    demo.line("chat", ["Where?\n<image>", "There."], images=["../../../etc/passwd"])
    demo.line("chat", ["Whose?\n<image>", "His."], images=[demo.save_image(b"no picture")])
    demo.line("chat", [])
    demo.lines += ["[1]", "{", json.dumps({"type": "chat"}), json.dumps({"type": "chat", "state": {"messages": 3}})]
    demo.write()
    assert collect(demo, tmp_path / "out") == {
        "later_turn": 1,
        "no_picture": 1,
        "no_text": 2,
        "several_pictures": 1,
        "picture_missing": 1,
        "picture_unusable": 1,
        "broken_record": 5,
    }
    assert request_texts(tmp_path / "out") == {"What is in the fog?"}


def test_other_state_layouts(demo: Demo, tmp_path: Path) -> None:
    """Examples before `offset` are skipped; a message may be [text, image, mode]."""
    name = demo.save_image(photo(1))
    examples = [["Human", "An example?"], ["Assistant", "Yes."]]
    turns = [["Human", ["What is in the fog?\n<image>", None, "Crop"]], ["Assistant", "A boat."]]
    state = {"system": "", "roles": ["Human", "Assistant"], "messages": examples + turns, "offset": 2, "sep": "###"}
    demo.lines.append(json.dumps({"type": "chat", "state": state, "images": [name], "ip": ADDRESS, "tstamp": TIME}))
    demo.write()
    assert collect(demo, tmp_path / "out") == {}
    assert request_texts(tmp_path / "out") == {"What is in the fog?"}


def test_flagged_and_unsafe(demo: Demo, tmp_path: Path) -> None:
    """A flag of any day drops its conversation, as do moderation and listed terms."""
    demo.ask("What is in the fog?", photo(1))
    demo.ask("What is in the fog?", photo(2), ip="198.51.100.4")
    demo.ask("Tell me.", photo(3), answer="YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN.")
    demo.ask("How is a FORBIDDEN  thing made?", photo(4))
    demo.ask("Is it unforbidden?", photo(5))
    demo.write()
    demo.line("flag", ["What is in the fog?\n<image>", "It is a thing."])
    demo.write("2024-02-05")
    terms = write_file(tmp_path / "terms.txt", "# unsafe\nforbidden\n\nanother one\n")
    assert collect(demo, tmp_path / "out", "--unsafe-terms", str(terms)) == {"flagged": 1, "unsafe": 2}
    assert request_texts(tmp_path / "out") == {"What is in the fog?", "Is it unforbidden?"}


def test_near_duplicates(demo: Demo, tmp_path: Path) -> None:
    """The same question about a rescaled or re-encoded image is a duplicate; another question or image is not."""
    demo.ask("What is in the fog?", photo(1))
    demo.ask("what is in the fog", photo(1))
    demo.ask("What is in the fog??", photo(1, height=192, width=256, quality=40))
    demo.ask("So what is in the fog?", photo(1, format="PNG"))
    demo.ask("How many boats can you count?", photo(1))
    demo.ask("What is in the fog?", photo(2))
    demo.write()
    assert collect(demo, tmp_path / "out") == {"near_duplicate": 3}
    assert len(requests(tmp_path / "out")) == 3


def test_batch_files_are_limited(demo: Demo, tmp_path: Path) -> None:
    """Files are limited in requests and bytes, and a smaller `--limit` selects a subset."""
    for number in range(7):
        demo.ask(f"What is number {number}, and why?", photo(number))
    demo.write()

    def sizes(name: str, *more: str) -> list[int]:
        collect(demo, tmp_path / name, "--max-requests", "3", *more)
        files = sorted((tmp_path / name / "requests").iterdir())
        return [len(path.read_text().splitlines()) for path in files]

    assert sizes("whole") == [3, 3, 1]
    assert sizes("paths", "--pictures", "path") == [3, 3, 1]
    first = requests(tmp_path / "paths")[0]["body"]["messages"][0]["content"][0]["image_url"]["url"]
    assert (tmp_path / "paths" / first).is_file()
    assert sizes("small", "--max-mib", "0") == [1] * 7
    assert sizes("part", "--limit", "2") == [2]
    assert request_texts(tmp_path / "part") < request_texts(tmp_path / "whole")


def test_unusable_answers_have_reasons(demo: Demo, tmp_path: Path) -> None:
    """Failed, refused, truncated, empty, private, unknown, repeated and missing answers have their own reasons."""
    for number in range(10):
        demo.ask(f"What is number {number}, and why?", photo(number))
    demo.write()
    out = tmp_path / "out"
    collect(demo, out)
    lines = requests(out)
    answers = [
        make_answer(lines[0], "Good."),
        make_answer(lines[0], "Twice."),
        {**make_answer(lines[1]), "error": {"code": "x"}},
        {"custom_id": lines[2]["custom_id"], "response": {"status_code": 500, "body": {}}},
        make_answer(lines[3], None, message={"refusal": "I cannot."}),
        make_answer(lines[4], "", finish_reason="content_filter"),
        make_answer(lines[5], "It goes on and", finish_reason="length"),
        make_answer(lines[6], "  "),
        make_answer(lines[7], "Write to jane@example.org."),
        make_answer({"custom_id": "demo_other"}),
        make_answer(lines[8], "Also good."),
    ]
    write_file(tmp_path / "answers.jsonl", "\n".join(map(json.dumps, answers)) + "\n{")
    assert main(["answer", "--out", str(out), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    dropped = [json.loads(line) for line in (out / "answers_left_out.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in dropped) == {
        "answer_repeated": 1,
        "answer_failed": 2,
        "answer_refused": 2,
        "answer_cut_off": 1,
        "answer_empty": 1,
        "private_email": 1,
        "unknown_id": 1,
        "broken_record": 1,
        "unanswered": 8,
    }
    records = json.loads((out / "demo_requests.json").read_text())
    assert [record["conversations"][1]["value"] for record in records] == ["Good.", "Also good."]


def test_removed_request_is_not_used(demo: Demo, tmp_path: Path) -> None:
    """The answer to a request that was removed from kept.jsonl is not used."""
    demo.ask("What is in the fog?", photo(1))
    demo.ask("Who is the man on the left?", photo(2))
    demo.write()
    out = tmp_path / "out"
    collect(demo, out)
    entries = (out / "kept.jsonl").read_text().splitlines()
    write_file(out / "kept.jsonl", next(line for line in entries if "fog" in line) + "\n")
    write_file(tmp_path / "answers.jsonl", "\n".join(json.dumps(make_answer(line)) for line in requests(out)))
    assert main(["answer", "--out", str(out), "--answers", str(tmp_path / "answers.jsonl")]) == 0
    assert len(json.loads((out / "demo_requests.json").read_text())) == 1


def test_ids_do_not_depend_on_order_of_logs(demo: Demo, tmp_path: Path) -> None:
    """The id of a request depends on its content only, so a subset by id is reproducible."""
    for number in range(6):
        demo.ask(f"What is number {number}, and why?", photo(number))
    lines = list(demo.lines)
    demo.write()
    collect(demo, tmp_path / "one", "--limit", "3")
    demo.lines = lines[::-1]
    demo.write()
    collect(demo, tmp_path / "two", "--limit", "3")
    assert requests(tmp_path / "one") == requests(tmp_path / "two")


def test_user_errors(demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """User errors exit with code 2 and a message that says how to fix them."""

    def sentence(*line: str) -> str:
        capsys.readouterr()
        assert main(list(line)) == 2
        return capsys.readouterr().err

    start = ("collect", "--out", str(tmp_path / "out"), "--model", "m", "--logs")
    assert "has no YYYY-MM-DD-conv.json" in sentence(*start, str(tmp_path))
    assert "collect" in sentence("answer", "--out", str(tmp_path), "--answers", "a.jsonl")
    demo.ask("What is in the fog?", photo(1))
    demo.write()
    collect(demo, tmp_path / "out")
    assert "already exists" in sentence(*start, str(demo.folder))
    assert "no such file" in sentence("answer", "--out", str(tmp_path / "out"), "--answers", "no.jsonl")
    other = ("collect", "--out", str(tmp_path / "b"), "--model", "m", "--logs", str(demo.folder))
    assert "--unsafe-terms must be a text file" in sentence(*other, "--unsafe-terms", str(tmp_path / "no.txt"))
    terms = write_file(tmp_path / "terms.txt", "# nothing\n")
    assert "the file has no terms" in sentence(*other, "--unsafe-terms", str(terms))
