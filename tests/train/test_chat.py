"""Tests of the conversation in the terminal: its answers are those of the stock model, and errors are one sentence."""

import io
import sys
from pathlib import Path

import pytest
import torch

from llava_next.config import ModelError
from tests.tiny import encoded_picture
from tests.train.evaluate.learned import SIZE_HW, Learned, learn
from train.chat import Chat, Conversation, main, read_image


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """An export that has learned three answers."""
    return learn(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """The images that it has learned, as files."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded_picture(number, SIZE_HW))
    return paths


def test_one_question(learned: Learned, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Prints only the learned answer, for the directory and for the run folder that contains it."""
    for place in (learned.export, learned.export.parent):
        for path, answer in zip(pictures, ("red", "blue", "a cat"), strict=True):
            assert main([str(place), str(path), "--ask", "What is it?"]) == 0
            assert capsys.readouterr().out.strip() == answer


def test_lines_are_a_conversation(
    learned: Learned, pictures: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty lines are ignored, another image starts a new conversation, and an error ends nothing."""
    lines = ["What is it?", "", f"/picture {pictures[1]}", "What is it?", "/picture none.png", "/new", "What is it?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main([str(learned.export), str(pictures[0])]) == 0
    output = capsys.readouterr()
    assert [line.strip() for line in output.out.splitlines()] == ["red", "blue", "blue"]
    assert output.err.startswith("error: none.png cannot be read as an image")


def test_a_second_turn_has_the_first_before_it(learned: Learned, pictures: list[Path]) -> None:
    """The image is in the first turn only; answers are appended to the conversation, also if they were stopped
    early."""
    chat = Chat(learned.export, torch.device("cpu"), max_new_tokens=8, temperature=0.0)
    conversation = Conversation(read_image(pictures[0]))
    assert "".join(chat.answer(conversation, "What is it?")).strip() == "red"
    second = chat.answer(conversation, "Really?")
    next(second)
    second.close()  # type: ignore[attr-defined]
    kinds = [[part["type"] for part in turn["content"]] for turn in conversation.turns]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2


def test_conversation_that_is_too_long_is_an_error(learned: Learned) -> None:
    """The error has both numbers and the fix."""
    chat = Chat(learned.export, torch.device("cpu"), max_new_tokens=8, temperature=0.0)
    with pytest.raises(ModelError, match=r"has \d+ tokens, but the model has \d+ positions; start .* /new"):
        list(chat.answer(Conversation(), "word " * 5000))


def test_invalid_arguments_are_one_sentence(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without a model, and a file that is not an image."""
    assert main([str(tmp_path), "--ask", "What?"]) == 2
    assert "contains no config.json" in capsys.readouterr().err
    no_picture = tmp_path / "picture.jpg"
    no_picture.write_text("none")
    assert main([str(learned.export), str(no_picture), "--ask", "What?"]) == 2
    assert "picture.jpg cannot be read as an image" in capsys.readouterr().err
