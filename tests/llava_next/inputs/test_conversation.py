"""The text of every template: exact strings, supervised segments, and the position of the image."""

import pytest

from data_recipes.schema.sample import Message
from llava_next.config import ModelError
from llava_next.inputs.conversation import TEMPLATES, get_template, move_image_to_front

TWO_ROUNDS = (
    Message("user", "<image>\nQ1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
)

LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# Output of the authors' conversation classes, without the beginning-of-sequence token (recipe 3.2).
WHOLE = {
    "plain": "<image>A1\nA2\n",
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 "
        "ASSISTANT: A2</s>"
    ),
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
        "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
    ),
    "llava_llama_3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    # Published by the language models' authors, not LLaVA's.
    "qwen_2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "gemma": (
        "<start_of_turn>user\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "phi_4": "<|user|><image>\nQ1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>A2<|end|>",
    "chatml": (
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "qwen3": (
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>\n"
    ),
    "llama_3_2": (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
        "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
}

SUPERVISED = {
    "plain": ["A1\n", "A2\n"],
    "vicuna_v1": [" A1</s>", " A2</s>"],
    "mistral_instruct": [" A1 </s>", " A2 </s>"],
    "chatml_direct": ["A1<|im_end|>", "A2<|im_end|>"],
    "llava_llama_3": ["A1<|eot_id|>", "A2<|eot_id|>"],
    "qwen_1_5": ["A1<|im_end|>", "A2<|im_end|>"],
    "chatml": ["A1<|im_end|>", "A2<|im_end|>"],
    "qwen3": ["A1<|im_end|>", "A2<|im_end|>"],
    "llama_3_2": ["A1<|eot_id|>", "A2<|eot_id|>"],
    "qwen_2_5": ["A1<|im_end|>", "A2<|im_end|>"],
    "gemma": ["A1<end_of_turn>", "A2<end_of_turn>"],
    "phi_4": ["A1<|end|>", "A2<|end|>"],
}

OPENS_WITH_BOS = {"plain", "vicuna_v1", "mistral_instruct", "llava_llama_3", "llama_3_2", "gemma"}


def test_every_template_has_a_published_string() -> None:
    """Every template has an expected string, and `bos` agrees with the authors' tokenizers."""
    assert set(WHOLE) == set(SUPERVISED) == set(TEMPLATES)
    assert {name for name, template in TEMPLATES.items() if template.bos} == OPENS_WITH_BOS


@pytest.mark.parametrize("name", TEMPLATES)
def test_two_rounds_with_an_image(name: str) -> None:
    """The text is the authors' prompt, and only answers with their end tokens are supervised."""
    segments = get_template(name).render(TWO_ROUNDS)
    assert "".join(segment.text for segment in segments) == WHOLE[name]
    assert [segment.text for segment in segments if segment.supervised] == SUPERVISED[name]
    assert [segment.ends_round for segment in segments] == [segment.supervised for segment in segments]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_system_message_replaces_the_default(name: str) -> None:
    """The sample's system text occurs once, at the beginning, and braces in it are literal."""
    template = get_template(name)
    if template.system_format is None:
        with pytest.raises(ModelError, match="no place for a system turn"):
            template.render([Message("system", "Be {brief}."), *TWO_ROUNDS])
        return
    text = "".join(s.text for s in template.render([Message("system", "Be {brief}."), *TWO_ROUNDS]))
    assert text.count("Be {brief}.") == 1
    assert text.index("Be {brief}.") < text.index("Q1")
    if template.default_system:
        assert template.default_system not in text


def test_caption_has_no_system_text() -> None:
    """plain drops the system message and the text of the question, but not its images."""
    messages = [Message("system", "S"), Message("user", "Describe <image> it."), Message("assistant", "A {cat}.")]
    assert "".join(s.text for s in get_template("plain").render(messages)) == "<image>A {cat}.\n"


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("What is <image> here?", "<image>\nWhat is  here?"),
        ("<image>", "<image>"),
        ("No picture. ", "No picture. "),
        ("Is <image> like <image>?", "Is <image> like <image>?"),
    ],
)
def test_single_image_comes_first(text: str, placed: str) -> None:
    """A single placeholder moves to the first line; several are unchanged."""
    assert move_image_to_front(text) == placed


def test_format_fields_in_texts_are_literal() -> None:
    """`{text}` in a question or an answer is not replaced."""
    messages = [Message("user", "{text} {0}"), Message("assistant", "{text}")]
    rendered = "".join(s.text for s in get_template("vicuna_v1").render(messages))
    assert rendered.endswith("USER: {text} {0} ASSISTANT: {text}</s>")


def test_turns_must_alternate() -> None:
    """Two consecutive questions, or an answer first, are errors with the turn's index."""
    for messages in ([Message("user", "a"), Message("user", "b")], [Message("assistant", "a")]):
        with pytest.raises(ModelError, match=r"turn \d is"):
            get_template("chatml").render(messages)


def test_unknown_template_is_an_error() -> None:
    """The message lists the known templates."""
    with pytest.raises(ModelError, match=r"'vicuna'.*chatml.*vicuna_v1"):
        get_template("vicuna")
