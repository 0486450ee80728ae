"""Tests of `python -m train.evaluate --server URL` against a real HTTP server on loopback."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_recipes.schema.sample import DataError, Message, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import StoredSample
from data_recipes.writing.writer import write_store
from llava_next.inputs.anyres import decode
from tests.tiny import encoded_picture, tiny_samples, tiny_store
from tests.train.evaluate.chat_api import ChatApi, decoded_images, running_api
from train.config.schema import ConfigError
from train.evaluate.__main__ import main
from train.evaluate.chat_server import KEY_VARIABLE, ChatServer, image_part, text_part
from train.evaluate.evaluation_ranks import EvaluationError
from train.evaluate.image_questions import Question
from train.evaluate.served_answers import make_parts

KEY = "key-of-this-test"
PICTURES = [encoded_picture(number, (40, 40)) for number in range(4)]
TRUTHS = ("red", "blue", "a cat", "no")


@pytest.fixture
def api() -> Iterator[ChatApi]:
    """A server of this test's own."""
    with running_api() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def _pixel(encoded: bytes) -> tuple[int, int, int]:
    return decode(encoded).getpixel((0, 0))  # type: ignore[return-value]


def _shapes(folder: Path) -> Path:
    messages = [(Message("user", "<image>\nWhat is it?"), Message("assistant", truth)) for truth in TRUTHS]
    samples = [Sample(str(n), messages[n], (PICTURES[n],), f"shapes:{n}") for n in range(4)]
    write_store(folder / "shapes", SourceInfo("shapes", "messages_jsonl", "shapes", metric="anls"), samples)
    return folder / "shapes"


def _evaluate(api: ChatApi, folder: Path, *arguments: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    out = folder / "served.json"
    code = main(["--server", api.url, "--out", str(out), *arguments])
    if not out.exists():
        return code, {}, []
    lines = out.with_suffix(".answers.jsonl").read_text().splitlines()
    return code, json.loads(out.read_text()), [json.loads(line) for line in lines]


def test_answers_of_a_server_have_the_metrics_of_an_evaluation(api: ChatApi, tmp_path: Path) -> None:
    """Each question is sent with its own image, greedily; the store's metric scores the answers, in their order."""
    given = ("red", "blue", "a cap", "perhaps")
    api.answers = {_pixel(picture): answer for picture, answer in zip(PICTURES, given, strict=True)}
    code, result, answers = _evaluate(api, tmp_path, "--store", str(_shapes(tmp_path)), "--max-new-tokens", "7")
    assert code == 0
    assert (result["server"], result["model"]) == (f"{api.url}/v1", "tiny")
    assert [(answer["answer"], answer["truth"]) for answer in answers] == list(zip(given, TRUTHS, strict=True))
    row = result["by_source"]["shapes"]
    assert (row["metric"], row["loss"], row["num_answers"]) == ("anls", None, 4)
    assert row["score"] == pytest.approx((1 + 1 + 0.8) / 4)
    bodies = [body for path, _, body in api.requests if path == "/v1/chat/completions"]
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in bodies} == {("tiny", 7, 0)}
    parts = [[part["type"] for part in body["messages"][0]["content"]] for body in bodies]
    assert parts == [["image_url", "text"]] * 4
    assert {body["messages"][0]["content"][1]["text"] for body in bodies} == {"What is it?"}


def test_a_run_names_the_held_out_samples(api: ChatApi, tmp_path: Path) -> None:
    """With the path of a run, its held-out samples are asked and the results are in its folder; no export is needed."""
    from tests.tiny import tiny_mixture, tiny_model
    from tests.train.cases import tiny_run
    from train.config.compose import to_yaml

    mixture, store_root = tiny_mixture(tmp_path / "data", 16, holdout=6)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = tiny_run(tiny_model(tmp_path / "models"), mixture, store_root, tmp_path / "outputs")
    (run_dir / "config.yaml").write_text(to_yaml(config))
    assert main([str(run_dir), "--server", api.url, "--per-picture", "1"]) == 0
    result = json.loads((run_dir / "server_evaluation.json").read_text())
    (row,) = result["by_source"].values()
    assert (row["num_samples"], row["num_answers"]) == (6, 6)


def test_a_cut_answer_is_counted(api: ChatApi, tmp_path: Path) -> None:
    """`finish_reason: length` is an answer that reached the maximum."""
    api.finish_reason = "length"
    _, result, _ = _evaluate(api, tmp_path, "--store", str(_shapes(tmp_path)))
    assert result["by_source"]["shapes"]["num_cut"] == 4


def test_sets_are_asked_with_every_image(api: ChatApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images come first, as chat templates place them. A question with an image inside its text is not asked."""
    two = (PICTURES[0], PICTURES[1])
    samples = [
        Sample("0", (Message("user", "<image>\n<image>\nSame?"), Message("assistant", "yes")), two, "sets:0"),
        Sample("1", (Message("user", "Is <image> like <image>?"), Message("assistant", "no")), two, "sets:1"),
    ]
    store = tiny_store(tmp_path, "sets", samples)
    code, result, (answer,) = _evaluate(api, tmp_path, "--store", str(store))
    assert (code, answer["id"], result["by_source"]["sets"]["num_unasked"]) == (0, "0", 1)
    assert "1 questions not asked: an image is inside the text" in capsys.readouterr().out
    sent = decoded_images(api.requests[-1][2])
    assert [np.asarray(image.convert("RGB")).tolist() for image in sent] == [
        np.asarray(decode(picture)).tolist() for picture in two
    ]
    assert api.requests[-1][2]["messages"][0]["content"][-1] == text_part("Same?")


@pytest.mark.parametrize("kind", ["rotated", "transparent", "grey", "gif", "plain"])
def test_a_server_gets_the_pixels_of_training(kind: str) -> None:
    """Whatever the file: orientation is applied and transparency is white; a plain file is sent unchanged."""
    image = decode(encoded_picture(5, (20, 30)))
    buffer = io.BytesIO()
    if kind == "rotated":
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(buffer, "JPEG", exif=exif)
    elif kind == "transparent":
        alpha = image.convert("RGBA")
        alpha.putalpha(100)
        alpha.save(buffer, "PNG")
    elif kind == "grey":
        image.convert("I;16").save(buffer, "PNG")
    else:
        image.save(buffer, "GIF" if kind == "gif" else "JPEG")
    part = image_part(buffer.getvalue())
    (sent,) = decoded_images({"messages": [{"content": [part]}]})
    assert sent.mode == "RGB"
    assert np.array_equal(np.asarray(sent), np.asarray(decode(buffer.getvalue())))
    assert (sent.format == "JPEG") == (kind == "plain")


@pytest.mark.parametrize("variable", [KEY_VARIABLE, "OPENAI_API_KEY"])
def test_the_key_is_sent_and_never_shown(
    api: ChatApi,
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is that of LLAVA_NEXT_SERVER_KEY; a key for another service, which the environment has too, is not sent."""
    api.key = KEY
    monkeypatch.setenv(variable, KEY)
    code, _, _ = _evaluate(api, tmp_path, "--store", str(_shapes(tmp_path)))
    printed = "".join(capsys.readouterr())
    assert code == (0 if variable == KEY_VARIABLE else 2)
    assert (KEY_VARIABLE in printed) == (code == 2)
    assert KEY not in printed
    assert KEY not in "".join(path.read_text() for path in tmp_path.glob("served*"))
    assert any(KEY in str(headers) for _, headers, _ in api.requests) == (code == 0)


def test_a_refused_key_is_not_quoted(api: ChatApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where the server repeats it."""
    api.key = "another"
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(ConfigError) as caught:
        ChatServer(api.url, None, key=KEY)
    assert f"refuses the key in {KEY_VARIABLE} (status 401: wrong key Bearer ***)" in str(caught.value)


BUSY = (429, {"Retry-After": "3"}, json.dumps({"error": {"message": "slow down"}}))


@pytest.mark.parametrize(
    ("responses", "words"),
    [
        ([BUSY] * 6, "6 times (status 429: slow down); lower --batch-size"),
        ([(500, {}, "Internal Server Error")] * 6, "with status 500: Internal Server Error"),
        ([(400, {}, json.dumps({"message": "too long"}))], "sample '0' of source shapes with status 400: too long"),
        ([(302, {"Location": "http://127.0.0.1:1/"}, "")], "redirects to another address"),
        ([(200, {}, "<html>hello</html>")], "is not JSON: <html>hello</html>"),
        ([(200, {}, "[]")], "has no text: []"),
        ([(200, {}, json.dumps({"choices": [{"message": {"content": None}}]}))], "has no text: {'choices'"),
    ],
)
def test_failures_are_one_sentence(api: ChatApi, responses: list[Any], words: str) -> None:
    """With what was asked, the status and the server's own words."""
    waits: list[float] = []
    api.responses = list(responses)
    server = ChatServer(api.url, None, wait=waits.append)
    with pytest.raises((ConfigError, EvaluationError)) as caught:
        server.ask([text_part("?")], 4, "the question of sample '0' of source shapes")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    expected = [3.0] * 5 if responses[0] is BUSY else [1.0, 2.0, 4.0, 8.0, 16.0]
    assert waits == (expected if len(responses) == 6 else [])


def test_a_busy_server_is_asked_again(api: ChatApi) -> None:
    """Two refusals, then the answer."""
    waits: list[float] = []
    api.responses = [BUSY, (503, {}, "")]
    reply = ChatServer(api.url, "tiny", wait=waits.append).ask([text_part("?")], 4, "a question")
    assert (reply.text, reply.is_cut, waits) == ("yes", False, [3.0, 2.0])


def test_a_server_that_is_too_slow(api: ChatApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program ends with the options to change."""
    api.delay_s = 3.0
    code, _, _ = _evaluate(
        api, tmp_path, "--store", str(_shapes(tmp_path)), "--server-timeout", "0.2", "--batch-size", "1"
    )
    assert code == 1
    assert "did not answer the question of sample '0' of source shapes within 0.2 s" in capsys.readouterr().err
    assert not (tmp_path / "served.json").exists()


def _errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_models_that_the_server_does_not_have(api: ChatApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown name is refused by the server; of several the user chooses."""
    store = str(_shapes(tmp_path))
    assert _evaluate(api, tmp_path, "--store", store, "--server-model", "huge")[0] == 2
    assert "status 404 for model 'huge': The model `huge` does not exist." in _errors(capsys)
    api.models = ["tiny", "large"]
    assert _evaluate(api, tmp_path, "--store", store)[0] == 2
    assert "lists several models: tiny, large; name the one to evaluate with --server-model" in _errors(capsys)
    assert _evaluate(api, tmp_path, "--store", store, "--server-model", "large")[0] == 0
    api.models = []
    assert _evaluate(api, tmp_path, "--store", store)[0] == 2
    assert "lists no model" in _errors(capsys)


def test_no_server_and_wrong_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection is a failure, exit code 1; an address that is none is a mistake, exit code 2."""
    store = str(tiny_store(tmp_path, "tiny", tiny_samples(2)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["--server", f"http://127.0.0.1:{port}", "--store", store]) == 1
    assert "the connection was refused at the list of models" in capsys.readouterr().err
    for url, words in (
        ("localhost:8000", "must be an address such as"),
        ("http://me:word@host/v1", "holds a password"),
    ):
        assert main(["--server", url, "--store", store]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "http://h"], "name a run, or prepared sources with --store"),
        (["--server", "http://h", "--store", "s", "--base-view"], "--base-view belongs to an evaluation of weights"),
        (["--server", "http://h", "--suite", "llava_next", "x"], "--server and --suite are two uses; give one"),
        (["x", "--server-model", "m"], "--server-model belongs to --server, not to an evaluation of weights"),
        ([], "name a run or a model directory"),
    ],
)
def test_options_of_another_use_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked or loaded."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_model_directory_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server has its own weights, so a path is that of a run."""
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path), "--server", "http://127.0.0.1:1"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_an_image_that_cannot_be_decoded() -> None:
    """The sample is named."""
    sample = StoredSample("7", "shapes", (), ((1, 1),), (b"GIF89a broken",), ("0",))
    with pytest.raises(DataError, match="an image of sample '7' of source shapes cannot be read"):
        make_parts(Question("shapes", 0, "What is it?", "red"), sample)
