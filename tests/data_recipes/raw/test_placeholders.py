"""Tests of finding placeholders of other frameworks, and of texts that only look like them."""

import pytest

from data_recipes.raw.placeholders import find_placeholder


@pytest.mark.parametrize(
    "token",
    [
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|image|>",
        "<|image_1|>",
        "<|audio_bos|>",
        "<|AUDIO|>",
        "<|media_pad|>",
        "<IMG_CONTEXT>",
        "<ImageHere>",
        "<ref-object>",
        "<bbox>",
        "<cot-process>",
        "<start_of_image>",
        "<image_soft_token>",
        "<fake_token_around_image>",
        "<image_placeholder>",
        "<im_patch>",
        "<image>./</image>",
    ],
)
def test_tokens_of_other_frameworks(token: str) -> None:
    """Tokens that occur nowhere else are found in turns of every role."""
    assert find_placeholder("user", f"{token}\nWhat is it?") == token
    assert find_placeholder("assistant", f"At {token}, I think.") == token
    assert find_placeholder("system", token) == token


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("<video>What happens?", "<video>"),
        ("<image>What is shown, <video>and what here?", "<video>"),
        ("What happens?\n<audio>", "<audio>"),
        ("<VIDEO>\nWhy?", "<VIDEO>"),
        ("<Image>\nWhy?", "<Image>"),
        ("<image_0> and <image_1>: which is larger?", "<image_0>"),
        ("Look at <image 1>.", "<image 1>"),
        ("Picture 1: <img>a.jpg</img>\nWhat is it?", "<img>a.jpg</img>"),
        ("[IMG]What is it?", "[IMG]"),
        ("```\ncode\n```\n<video>Why?", "<video>"),
    ],
)
def test_tokens_of_questions(text: str, token: str) -> None:
    """Tokens that may be plain text are found in questions, not in answers."""
    assert find_placeholder("user", text) == token
    assert find_placeholder("assistant", text) is None


def test_names_to_replace() -> None:
    """LLaMA-Factory's dataset of the model's name is trained on only after its user has replaced the names."""
    assert find_placeholder("assistant", "I am {{name}}, developed by {{author}}.") == "{{name}}"
    assert find_placeholder("assistant", "Write `{{name}}` there.") is None
    assert find_placeholder("assistant", "In a Jinja template, {{name}} is replaced.") is None


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat is it?",
        "How do I use the <video> tag?",
        "What is the difference between <video> and <audio> in HTML5?",
        'My page:\n<video src="a.mp4" controls>\n</video>',
        "<video>\n<source src=a.mp4>\n</video>\nWhy does it not play?",
        "Explain `<video>` to me.",
        "Fix this:\n```html\n<video>\n```",
        "[IMG]http://example.org/a.jpg[/IMG]",
        "<bbox><xmin>1</xmin></bbox>",
        "<img src='a.jpg'> is not shown. Why?",
        "Find the <ref> elephant </ref> at <box>(200,450),(500,800)</box>.",
        "<|box_start|>(1,2)<|box_end|>",
        "if a < b and c > d: print('[VIDEO] is a list of 3')",
        "",
    ],
)
def test_texts_that_are_kept(text: str) -> None:
    """HTML, code, BBCode, and boxes that are written out are texts."""
    assert find_placeholder("user", text) is None
    assert find_placeholder("assistant", text) is None
