"""Conversion between chat templates and `Template`: equal strings, or an error that shows the first difference."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_recipes.schema.sample import Message
from llava_next.config import AUTHORS_GRIDS, ModelError, ProcessorConfig, TemplateConfig, ViewsConfig
from llava_next.inputs.chat_template import chat_template, resolve_template, template_from_tokenizer
from llava_next.inputs.conversation import TEMPLATES, Template
from llava_next.inputs.processor import IGNORE, Processor, RejectReason, SampleRejected
from llava_next.model.build import read_tokenizer
from tests.jinja_shapes import (
    CHATML,
    GEMMA,
    LITERAL_BOS,
    LLAMA_2,
    LLAMA_3,
    LLAMA_3_1,
    MISTRAL,
    QWEN,
    ROUNDS_WITH_BOS,
    VICUNA,
    ZEPHYR,
)
from tests.oracles.inputs import Conversation, conversations
from tests.tiny import PATCHES_PER_SIDE, TILE, tiny_tokenizer

FIXED_OPENING = (
    "{{ 'Fixed words.</s>' }}{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
)

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatml": (CHATML, {"default_system": None, "bos": False, "between": "\n", "trims": False}),
    "qwen": (QWEN, {"default_system": "You are a helpful assistant.", "end": "<|im_end|>", "bos": False}),
    "llama_3": (
        LLAMA_3,
        {"default_system": None, "bos": True, "end": "<|eot_id|>", "between": "", "trims": True,
         "system_format": "<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>"},
    ),
    "llama_3_1": (LLAMA_3_1, {"default_system": "", "bos": True, "trims": True}),
    "mistral": (
        MISTRAL,
        {"system_format": None, "question_format": "[INST] {text} [/INST]", "header": "", "answer_format": " {text}",
         "end": "</s>", "between": "", "bos": True},
    ),
    "zephyr": (ZEPHYR, {"header": "<|assistant|>\n", "end": "</s>", "between": "\n", "bos": False}),
    "vicuna": (
        VICUNA,
        {"system_format": "{text} ", "default_system": "A curious user talks to a polite assistant.", "bos": True,
         "question_format": "USER: {text} ", "header": "ASSISTANT:", "answer_format": " {text}", "trims": True},
    ),
    "rounds_with_bos": (
        ROUNDS_WITH_BOS,
        {"question_format": "<s>[INST] {text} [/INST]", "answer_format": " {text} ", "bos": False,
         "system_format": None},
    ),
    "llama_2": (
        LLAMA_2,
        {"system_format": None, "question_format": "<s>[INST] {text} [/INST]", "answer_format": " {text} ",
         "bos": False},
    ),
    "gemma": (
        GEMMA,
        {"system_format": None, "question_format": "<|im_start|>user\n{text}<|im_end|>\n", "end": "<|im_end|>",
         "header": "<|im_start|>model\n", "between": "\n", "bos": True, "trims": True},
    ),
    "literal_bos": (LITERAL_BOS, {"bos": True, "default_system": None}),
    "fixed_opening": (
        FIXED_OPENING + CHATML, {"system_format": None, "default_system": "Fixed words.</s>", "bos": False}
    ),
}  # fmt: skip


def _tokenizer(folder: Path, jinja: str | None, bos: str | None = "<s>") -> Any:
    tokenizer = read_tokenizer(str(tiny_tokenizer(folder / "tokenizer", bos=bos)))
    tokenizer.chat_template = jinja
    return tokenizer


def _processor(tokenizer: Any, template: str | TemplateConfig = "tokenizer") -> Processor:
    config = ProcessorConfig(
        template, ViewsConfig("crop", "crop"), AUTHORS_GRIDS, TILE, PATCHES_PER_SIDE, max_length=100_000
    )
    return Processor(tokenizer, config)


def _messages(record: Conversation) -> list[Message]:
    """The turns of a record without image placeholders, whose position does not depend on the chat template."""
    roles = {"human": "user", "gpt": "assistant"}
    return [Message(roles[turn.speaker], turn.value.replace("<image>", "")) for turn in record.turns]  # type: ignore[arg-type]


def _printed(tokenizer: Any, messages: Sequence[Message]) -> str:
    chat = [{"role": message.role, "content": message.text} for message in messages]
    ends_asked = messages[-1].role == "user"
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ends_asked))


def _rendered(template: Template, tokenizer: Any, messages: Sequence[Message]) -> str:
    opening = tokenizer.bos_token if template.bos else ""
    return opening + "".join(segment.text for segment in template.render(messages))


@pytest.mark.parametrize("name", SHAPES)
def test_known_chat_templates_are_parsed(tmp_path: Path, name: str) -> None:
    """The template renders 320 conversations of all kinds as the chat template does, with and without the last answer
    and a system turn, and its fields are the expected ones."""
    jinja, parts = SHAPES[name]
    tokenizer = _tokenizer(tmp_path, jinja)
    template = template_from_tokenizer(tokenizer)
    fields = asdict(template)
    assert {key: fields[key] for key in parts} == parts
    opening = [] if template.system_format is None else [Message("system", " Answer {text}\n in one word. ")]
    for record in conversations():
        messages = _messages(record)
        for turns in (messages, messages[:-1], opening + messages):
            assert _rendered(template, tokenizer, turns) == _printed(tokenizer, turns), record


@pytest.mark.parametrize("name", SHAPES)
def test_ids_equal_the_tokenizers(tmp_path: Path, name: str) -> None:
    """The ids of a conversation equal those of `apply_chat_template`; the beginning-of-sequence token occurs once."""
    tokenizer = _tokenizer(tmp_path, SHAPES[name][0])
    processor = _processor(tokenizer)
    for record in conversations()[::8]:
        messages = _messages(record)
        chat = [{"role": message.role, "content": message.text} for message in messages]
        expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert processor.layout(messages, []).ids.tolist() == expected, record


@pytest.mark.parametrize("name", SHAPES)
def test_answer_and_end_token_are_supervised(tmp_path: Path, name: str) -> None:
    """Supervised runs decode to the answers with their end tokens."""
    processor = _processor(_tokenizer(tmp_path, SHAPES[name][0]))
    template = processor.template
    messages = [Message("user", "Q1"), Message("assistant", "A red circle."), Message("user", "Q2?")]
    messages.append(Message("assistant", "No.\nTwo"))
    layout = processor.layout(messages, [])
    supervised = np.flatnonzero(layout.labels != IGNORE)
    runs = np.split(supervised, np.flatnonzero(np.diff(supervised) > 1) + 1)
    expected = [template.answer_format.replace("{text}", text) + template.end for text in ("A red circle.", "No.\nTwo")]
    assert [processor.tokenizer.decode(layout.ids[run]) for run in runs] == expected


def _with(change: str, jinja: str = CHATML) -> str:
    """Replaces a substring of the Jinja; `change` is "before → after"."""
    before, after = change.split(" → ")
    assert before in jinja
    return jinja.replace(before, after)


REFUSED: dict[str, tuple[str | None, str]] = {
    "none": (None, "has no chat template"),
    "date": ("{{ strftime_now('%d %B %Y') }}" + CHATML, "renders today's date"),
    "broken": ("{% for message in messages %}", "cannot render a conversation of 1 turns: .*"),
    "no_stop": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        r"after an answer it renders '\\n', which contains no special token",
    ),
    "text_left_out": (
        "{% for message in messages if message['role'] != 'user' %}{{ message['content'] + eos_token }}{% endfor %}",
        "does not render a text of the user unchanged",
    ),
    "rewritten": (_with("message['content'] → message['content'] | upper"), "renders 'RED.*instead of 'red"),
    # It trims answers but not questions.
    "half_trimmed": (
        "{% for message in messages %}{% set text = message['content'] %}{% if message['role'] == 'assistant' %}"
        "{% set text = text | trim %}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        r"renders 'spaces around it<\|im_end\|>.*instead of '  spaces around it",
    ),
    # The first question has a prefix.
    "first_turn": (_with("message['content'] → ('First: ' if loop.first else '') + message['content']"), "First: "),
    # Only the last answer has an end token.
    "end_once": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}",
        "it renders 'user: ",
    ),
    # The generation prompt is not part of a given answer (thinking).
    "other_generation_prompt": (
        _with("{{ '<|im_start|>assistant\n' }} → {{ '<|im_start|>assistant\n<think>\n' }}"), "<think>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_chat_templates_are_errors(tmp_path: Path, name: str) -> None:
    """The message shows the first difference and the fix in one sentence."""
    jinja, why = REFUSED[name]
    with pytest.raises(ModelError, match=why) as caught:
        _processor(_tokenizer(tmp_path, jinja))
    assert "choose a named template with stage.template=NAME (chatml, " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bos", ["<s>", "<|im_start|>"])
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_named_template_round_trip(tmp_path: Path, name: str, bos: str) -> None:
    """Every named template is equal after writing and parsing it, also if the beginning-of-sequence token begins its
    turns (SmolLM2)."""
    template = TEMPLATES[name]
    again = template_from_tokenizer(_tokenizer(tmp_path, chat_template(template), bos))
    assert replace(again, name=name, released_specials=template.released_specials) == template


@pytest.mark.parametrize("name", SHAPES)
def test_parsed_template_round_trip(tmp_path: Path, name: str) -> None:
    """A template parsed from a tokenizer is equal after writing it as Jinja and parsing it again."""
    tokenizer = _tokenizer(tmp_path, SHAPES[name][0])
    template = template_from_tokenizer(tokenizer)
    tokenizer.chat_template = chat_template(template)
    assert template_from_tokenizer(tokenizer) == template


CUSTOM_TEMPLATES = {
    "lines": TemplateConfig(
        question_format="Q: {text}\n", header="A:", end="</s>", answer_format=" {text}", between="\n", bos=True
    ),
    "system": TemplateConfig(
        system_format="<|im_start|>{text}<|im_end|>",
        default_system="Be kind.",
        question_format="<|user|>{text}",
        header="<|assistant|>\n<think></think>",
        end="<|im_end|>",
    ),
    "fixed_opening": TemplateConfig(
        default_system="Fixed.\n",
        question_format="{text} =>",
        header="",
        answer_format=" {text}",
        end="<|eot_id|>",
        trims=True,
    ),
}


@pytest.mark.parametrize("name", CUSTOM_TEMPLATES)
def test_custom_templates_have_the_properties_of_named_ones(tmp_path: Path, name: str) -> None:
    """A template of the configuration is equal after writing it as Jinja and parsing it, its ids are those of
    `apply_chat_template`, and supervised runs are answers with their end tokens."""
    custom = CUSTOM_TEMPLATES[name]
    tokenizer = _tokenizer(tmp_path, None)
    processor = _processor(tokenizer, custom)
    tokenizer.chat_template = chat_template(processor.template)
    assert replace(template_from_tokenizer(tokenizer), name="custom") == processor.template
    for record in conversations()[::8]:
        messages = _messages(record)
        chat = [{"role": message.role, "content": message.text} for message in messages]
        expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        layout = processor.layout(messages, [])
        assert layout.ids.tolist() == expected, record
    layout = processor.layout([Message("user", "Q"), Message("assistant", "A red circle.")], [])
    supervised = tokenizer.decode(layout.labels[layout.labels != IGNORE])
    assert supervised == custom.answer_format.replace("{text}", "A red circle.") + custom.end


LINES = CUSTOM_TEMPLATES["lines"]


@pytest.mark.parametrize(
    ("custom", "why"),
    [
        (replace(LINES, question_format="Q:"), r"question_format must contain \{text\} once"),
        (replace(LINES, answer_format="{text}{text}"), r"answer_format must contain \{text\} once"),
        (replace(LINES, system_format=""), r"system_format must contain \{text\} once"),
        (replace(LINES, header="<image>"), "header must not contain <image>"),
        (replace(LINES, end=""), "end must be the text of a token"),
        (replace(LINES, end=" STOP"), "contains no special token"),
        # Generation would stop at the first of two end tokens.
        (replace(LINES, answer_format="{text}<|im_end|>,"), "what follows every end token to between"),
    ],
    ids=["no_question", "two_answers", "empty_system", "image", "no_end", "end_of_several_tokens", "two_ends"],
)
def test_custom_templates_that_break_a_rule_are_errors(tmp_path: Path, custom: TemplateConfig, why: str) -> None:
    """The message names the key and the rule in one sentence."""
    with pytest.raises(ModelError, match=why) as caught:
        _processor(_tokenizer(tmp_path, None), custom)
    assert "\n" not in str(caught.value)


def test_captions_as_jinja(tmp_path: Path) -> None:
    """plain renders images and captions, without questions and system texts."""
    tokenizer = _tokenizer(tmp_path, chat_template(TEMPLATES["plain"]))
    content = [{"type": "text", "text": "Describe it."}, {"type": "image"}]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": content}]
    chat.append({"role": "assistant", "content": "A {cat} 🙂."})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s><image>A {cat} 🙂.\n"


def test_system_turn_is_not_supported(tmp_path: Path) -> None:
    """Samples are rejected with a reason, and the exported Jinja raises an error."""
    tokenizer = _tokenizer(tmp_path, MISTRAL)
    messages = [Message("system", "Be brief."), Message("user", "Q?"), Message("assistant", "A.")]
    with pytest.raises(SampleRejected, match="no place for a system turn") as caught:
        _processor(tokenizer).layout(messages, [])
    assert caught.value.reason is RejectReason.SYSTEM_TURN
    template = template_from_tokenizer(tokenizer)
    with pytest.raises(ModelError, match="no place for a system turn"):
        template.render(messages)
    tokenizer.chat_template = chat_template(template)
    with pytest.raises(Exception, match="no place for a system turn"):
        _printed(tokenizer, messages)


def test_fingerprint_depends_on_the_rendered_text(tmp_path: Path) -> None:
    """Jinja that renders the same text has the same fingerprint; another text has another."""
    base = _processor(_tokenizer(tmp_path, CHATML))
    respelled = CHATML.replace("{% for", "{# ChatML #}{% for").replace("message['role']", "message.role")
    assert _processor(_tokenizer(tmp_path, respelled)).fingerprint == base.fingerprint
    assert _processor(_tokenizer(tmp_path, QWEN)).fingerprint != base.fingerprint


def test_several_chat_templates(tmp_path: Path) -> None:
    """The default one of several is used; without a default it is an error."""
    tokenizer = _tokenizer(tmp_path, None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN}
    assert template_from_tokenizer(tokenizer).default_system is None
    tokenizer.chat_template = {"tool_use": QWEN}
    with pytest.raises(ModelError, match="cannot render"):
        template_from_tokenizer(tokenizer)


def test_template_names(tmp_path: Path) -> None:
    """`tokenizer` is not a named template; named templates need no tokenizer; the message for an unknown name lists
    both."""
    assert "tokenizer" not in TEMPLATES
    assert resolve_template("chatml", None) is TEMPLATES["chatml"]
    with pytest.raises(ModelError, match=r"'chatmel'.*chatml.*, tokenizer for the tokenizer's"):
        resolve_template("chatmel", None)


def test_smollm2(smollm2_tokenizer: Path) -> None:
    """The chat template of the real tokenizer is ChatML with a default system text; its first token is not a second
    beginning-of-sequence token."""
    template = template_from_tokenizer(read_tokenizer(str(smollm2_tokenizer)))
    assert template == replace(
        TEMPLATES["chatml"],
        name="tokenizer",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        released_specials=(),
    )
