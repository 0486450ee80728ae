"""Tests of the conversation in the terminal: its answers are those of the stock model, and errors are one sentence."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_recipes.schema.sample import Message
from llava_next.config import ANYRES, ModelError, ViewsConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from tests.tiny import encoded_picture, tiny_model
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
    conversation = Conversation([read_image(pictures[0])])
    assert "".join(chat.answer(conversation, "What is it?")).strip() == "red"
    second = chat.answer(conversation, "Really?")
    next(second)
    second.close()  # type: ignore[attr-defined]
    kinds = [[part["type"] for part in turn["content"]] for turn in conversation.turns]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2


ONEVISION = ViewsConfig("anyres_max_2", "pad", closing_newline=True)


@pytest.mark.parametrize("views", [ANYRES, ViewsConfig("squash", "squash"), ONEVISION], ids=str)
def test_several_images_belong_to_the_first_question(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, views: ViewsConfig
) -> None:
    """The prompt is that of training, for every class of an export. `/images` begins a conversation about others."""
    backbone = read_backbone(tiny_model(tmp_path / "parts", "siglip"))
    processor = backbone.processor(template=None, views=views, max_length=4096)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, tmp_path / "export")
    prompts: list[list[int]] = []
    make_inputs = Chat._make_inputs

    def noted(self: Chat, *args: Any) -> Any:
        inputs = make_inputs(self, *args)
        prompts.append(inputs["input_ids"][0].tolist())
        return inputs

    monkeypatch.setattr(Chat, "_make_inputs", noted)
    names = " ".join(f"'{path}'" for path in pictures)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"What is it?\n/images {names}\nWhat is it?\n/images '\n"))
    command = [str(tmp_path / "export"), *map(str, pictures[:2]), "--max-new-tokens", "2"]
    assert main(command) == 0
    for prompt, num_images in zip(prompts, (2, 3), strict=True):
        question = Message("user", "<image>\n" * num_images + "What is it?")
        ids, _ = processor.prompt([question], [SIZE_HW] * num_images)
        assert prompt == ids.tolist()


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
