"""Converts between `Template` and Jinja chat templates.

`chat_template` writes a `Template` as Jinja for exports. `template_from_tokenizer` reads one from a tokenizer's Jinja:
it renders conversations of marker texts, takes the text between the markers, and verifies the result on other
conversations. A chat template that a `Template` cannot represent is an error.
"""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import processors

from llava_next.config import IMAGE_PROCESSOR_FILES, ModelError, TemplateConfig
from llava_next.inputs.conversation import (
    CUSTOM,
    FROM_TOKENIZER,
    IMAGE_PLACEHOLDER,
    NO_SYSTEM_TURN,
    TEMPLATES,
    MessageLike,
    Template,
    get_template,
)

# Exactly one component adds the beginning-of-sequence token to a prompt. In the Hugging Face layout it is the chat
# template, and the exported tokenizer adds no token, so that `apply_chat_template(tokenize=True)`, the processor and
# vLLM read the prompt of training. In the authors' layout it is the tokenizer, as in their releases.


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str


_SYSTEM = _Turn("system", "SYSTEM-5Q7X")
_ROUNDS = (
    _Turn("user", "QUESTION-1-5Q7X"),
    _Turn("assistant", "ANSWER-1-5Q7X"),
    _Turn("user", "QUESTION-2-5Q7X"),
    _Turn("assistant", "ANSWER-2-5Q7X"),
)
_BOS = "BOS-5Q7X"
"""Replaces the beginning-of-sequence token while a chat template is read. SmolLM2's token also begins its turns."""

BOS_EXPRESSION = "{{ bos_token }}"
"""Prefix of a chat template that renders the beginning-of-sequence token."""

_TEXTS = (
    "What is in the picture?",
    "A red circle, and 2 squares.",
    "  spaces around it  ",
    "\nline breaks\n\naround it\n",
    "{text} {0} {{ braces }} {% if a %} # \\ \\n",
    "<b>bold</b> & 'single' \"double\"",
    "Ça coûte 3 €, 你好 🙂",
    "x",
)
"""Texts that a chat template might modify: white space, Jinja syntax, HTML, other scripts."""


def resolve_template(template: str | TemplateConfig, tokenizer: Any) -> Template:
    """The template of this name or with these texts, or the tokenizer's chat template if it is `tokenizer`.

    Raises:
        ModelError: as `get_template` and `template_from_tokenizer` do, or the Jinja of a template of the configuration
            renders another text, or is parsed as another template.
    """
    if template == FROM_TOKENIZER:
        return template_from_tokenizer(tokenizer)
    resolved = get_template(template)
    if resolved.name == CUSTOM:
        _check_custom(resolved, tokenizer)
    return resolved


def _check_custom(template: Template, tokenizer: Any) -> None:
    """Writes a template as Jinja and parses it again, as an export is read, with this tokenizer."""
    exported = copy(tokenizer)
    exported.chat_template = chat_template(template)
    try:
        parsed = template_from_tokenizer(exported)
        _verify(template, exported)
    except _UnsupportedError as error:
        raise ModelError(f"the custom template could not be read from its export: {error.reason}") from error
    for turns in _conversations(with_system=template.system_format is not None):
        if parsed.render(turns) != template.render(turns):
            raise ModelError(
                "the custom template could not be read from its export: what precedes every answer belongs to header, "
                "and what follows every end token to between"
            )


def should_add_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer should add special tokens to a rendered prompt.

    It should not if the prompt begins with the beginning-of-sequence token (transformers'
    `apply_chat_template(tokenize=True)`).
    """
    bos = tokenizer.bos_token
    return not (bos and text.startswith(bos))


def is_bos_added(tokenizer: Any) -> bool:
    """Whether the tokenizer adds the beginning-of-sequence token to a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x")["input_ids"][0] == bos


def set_post_processor(tokenizer: Any, *, add_bos: bool) -> None:
    """Replaces the post-processor of a fast tokenizer.

    The new one reports character offsets including white space, which a byte-level post-processor can trim.

    Args:
        tokenizer: is modified.
        add_bos: add the beginning-of-sequence token to each text; otherwise no special token is added.
    """
    bos = tokenizer.bos_token if add_bos else None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if bos else "$A",
        pair=f"{bos} $A $B" if bos else "$A $B",
        special_tokens=[(bos, tokenizer.bos_token_id)] if bos else [],
    )


def template_from_tokenizer(tokenizer: Any) -> Template:
    """Converts the tokenizer's chat template to a `Template` in which answers are supervised with their end token.

    A chat template that writes the system text into the first question, as Gemma's, has no place for a system turn.
    `bos` is set if the chat template renders the beginning-of-sequence token at the beginning, or if it renders none
    and the tokenizer, which belongs to a vision-language model, adds it. (The tokenizer of a language model renders
    conversations without adding tokens.)

    Raises:
        ModelError: there is no chat template, its answers do not end with a special token, or a `Template` cannot
            represent it (dates, a special first turn, modified texts). The message shows the first difference.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _UnsupportedError(tokenizer, "the tokenizer has no chat template")
    template = _parse(tokenizer, system=_system_pieces(tokenizer))
    try:
        _verify(template, tokenizer)
    except ModelError:
        if template.system_format is None:
            raise
        without_system = _without_system(tokenizer)
        if without_system is None:
            raise
        template = without_system
    if not template.bos and _has_image_processor(tokenizer) and is_bos_added(tokenizer):
        return replace(template, bos=True)
    return template


def _has_image_processor(tokenizer: Any) -> bool:
    """Whether the tokenizer's directory is that of a vision-language model."""
    folder = Path(tokenizer.name_or_path)
    return any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)


def _without_system(tokenizer: Any) -> Template | None:
    """The template of conversations without a system turn; None if a `Template` cannot represent these either."""
    template = _parse(tokenizer, system=None)
    try:
        _verify(template, tokenizer)
    except ModelError:
        return None
    return template


def _parse(tokenizer: Any, *, system: Sequence[str] | None) -> Template:
    """The text between markers, on the assumption that the chat template has the form of a `Template`.

    Args:
        tokenizer: with the chat template.
        system: the text around a system turn; None for a template without one.
    """
    question, prompt, one_round, two_rounds = (
        _pieces(tokenizer, _ROUNDS[:1]),
        _pieces(tokenizer, _ROUNDS[:1], prompt=True),
        _pieces(tokenizer, _ROUNDS[:2]),
        _pieces(tokenizer, _ROUNDS),
    )
    tail = one_round[2]
    end = _stop_token(tokenizer, tail)
    after_answer, _, between = tail.partition(end)
    before_question = two_rounds[2].removeprefix(tail)
    opening = one_round[0].removesuffix(before_question)
    bos_text = tokenizer.bos_token or ""
    bos = _BOS if opening.startswith(_BOS) else bos_text if opening == bos_text else ""
    opening = opening.removeprefix(bos)
    default_system = opening or None
    system_format = None
    if system is not None:
        before, after = system[0].removeprefix(bos), system[1].removesuffix(before_question)
        system_format = before + "{text}" + after
        default_system = opening.removeprefix(before).removesuffix(after) if opening else None
    padded = f"\t{_ROUNDS[0].text}\t"

    def restore_bos(text: str) -> str:
        return text.replace(_BOS, bos_text)

    return Template(
        name=FROM_TOKENIZER,
        system_format=None if system_format is None else restore_bos(system_format),
        default_system=None if default_system is None else restore_bos(default_system),
        question_format=restore_bos(before_question + "{text}" + question[1]),
        header=restore_bos(prompt[1].removeprefix(question[1])),
        answer_format=restore_bos(one_round[1].removeprefix(prompt[1]) + "{text}" + after_answer),
        end=end,
        between=restore_bos(between),
        bos=bool(bos),
        trims=padded not in _render(tokenizer, [_Turn("user", padded)]),
    )


def _verify(template: Template, tokenizer: Any) -> None:
    """Raises ModelError unless `template` and the chat template render the same text for conversations of one to four
    rounds."""
    for turns in _conversations(with_system=template.system_format is not None):
        expected = _render(tokenizer, turns, prompt=turns[-1].role == "user")
        actual = tokenizer.bos_token if template.bos else ""
        actual += "".join(segment.text for segment in template.render(turns))
        if actual == expected:
            continue
        index = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), None)
        index = min(len(actual), len(expected)) if index is None else index
        raise _UnsupportedError(
            tokenizer,
            f"it renders turns differently or modifies their texts: in a conversation of {len(turns)} turns, after "
            f"{expected[max(0, index - 30) : index]!r}, it renders {expected[index : index + 40]!r} instead of "
            f"{actual[index : index + 40]!r}",
        )


def _conversations(*, with_system: bool) -> Iterator[list[_Turn]]:
    """Conversations of one to four rounds with all of `_TEXTS`, with and without the last answer."""
    for start in range(len(_TEXTS)):
        texts = [_TEXTS[(start + step) % len(_TEXTS)] for step in range(9)]
        num_rounds = 1 + start % 4
        turns = [_Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts[1 : 1 + 2 * num_rounds])]
        for system in ([], [_Turn("system", texts[0])])[: 1 + with_system]:
            yield system + turns
            yield system + turns[:-1]


def _system_pieces(tokenizer: Any) -> list[str] | None:
    """The text around a system turn; None if the chat template raises for it or omits it."""
    turns = [_SYSTEM, *_ROUNDS[:2]]
    try:
        rendered = _render(tokenizer, turns)
    except ModelError:
        return None
    return _pieces(tokenizer, turns) if _SYSTEM.text in rendered else None


def _pieces(tokenizer: Any, turns: Sequence[MessageLike], *, prompt: bool = False) -> list[str]:
    """The rendered text before, between and after the turns' texts: [number of turns + 1]."""
    rest = _render(tokenizer, turns, prompt=prompt, **({"bos_token": _BOS} if tokenizer.bos_token else {}))
    pieces = []
    for turn in turns:
        before, text, rest = rest.partition(turn.text)
        if not text:
            raise _UnsupportedError(tokenizer, f"it does not render a text of the {turn.role} unchanged and in order")
        pieces.append(before)
    return [*pieces, rest]


def _render(tokenizer: Any, turns: Sequence[MessageLike], *, prompt: bool = False, **values: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    values |= {"word_separator": ""}  # an export's chat template then renders the text of training
    render = partial(tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=prompt, **values)
    try:
        # Without the clock, because a template that contains a date differs tomorrow.
        return str(render(strftime_now=None))
    except Exception as error:  # a chat template is a program and can raise any exception
        try:
            render()
        except Exception:
            reason = f"it cannot render a conversation of {len(turns)} turns: {error}"
        else:
            reason = "it renders today's date"
        raise _UnsupportedError(tokenizer, reason) from error


def _stop_token(tokenizer: Any, tail: str) -> str:
    """The first special token after an answer, at which generation stops."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    matches = sorted((tail.find(text), -len(text), text) for text in special | {tokenizer.eos_token} if text in tail)
    if not matches:
        raise _UnsupportedError(
            tokenizer,
            f"after an answer it renders {tail!r}, which contains no special token of the tokenizer, so generation "
            "would not stop",
        )
    return matches[0][2]


class _UnsupportedError(ModelError):
    """A `Template` cannot represent the tokenizer's chat template."""

    def __init__(self, tokenizer: Any, reason: str) -> None:
        super().__init__(
            f"template {FROM_TOKENIZER!r}: the chat template of {tokenizer.name_or_path} is not supported: {reason}; "
            f"choose a named template with stage.template=NAME ({', '.join(sorted(TEMPLATES))}), or write its text in "
            "YAML"
        )
        self.reason = reason


def word_separator(tokenizer: Any) -> str:
    """The text to insert between a special token and a following text so that the text has the same tokens as alone.

    Training tokenizes the text between images piece by piece, as the authors do. A sentencepiece tokenizer with
    `legacy: false` inserts its separator at the beginning of a text but not after a special token. In the rendered
    prompt, which contains special tokens, a space replaces this separator.

    Returns:
        An empty string or a space.
    """
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    with_space = tokenizer(f"{IMAGE_PLACEHOLDER} x", add_special_tokens=False)["input_ids"][-len(alone) :]
    without_space = tokenizer(f"{IMAGE_PLACEHOLDER}x", add_special_tokens=False)["input_ids"][-len(alone) :]
    return " " if with_space == alone != without_space else ""


def chat_template(template: Template, *, include_bos: bool = True, separator: str = "") -> str:
    """Writes the template as Jinja, for messages whose content is a string or a list of text and image items.

    The images of a turn come first, as in `move_image_to_front`.

    Args:
        template: the template.
        include_bos: render the beginning-of-sequence token if the template has it; otherwise the tokenizer must add it.
        separator: the tokenizer's `word_separator`. The Jinja variable `word_separator` overrides it; an empty one
            renders the text of training.
    """
    literal = partial(json.dumps, ensure_ascii=False)  # Jinja does not decode surrogate pairs
    text = "text_of(message.content)" + (" | trim" if template.trims else "")

    def turn(wrapping: str) -> str:
        before, _, after = wrapping.partition("{text}")
        return f"{literal(before)} + ({text}) + {literal(after)}"

    system = "''"
    default = template.default_system or ""
    if template.system_format is None:
        system = f"raise_exception({literal(NO_SYSTEM_TURN)})"
    elif not template.caption_only:
        system = turn(template.system_format)
        if template.default_system is not None:
            default = template.system_format.replace("{text}", template.default_system)
    question = turn(template.question_format)
    if template.caption_only:
        question = f"{literal(IMAGE_PLACEHOLDER)} * ({text}).count({literal(IMAGE_PLACEHOLDER)})"
    answer = turn(template.header + template.answer_format + template.end + template.between)
    body = "".join(
        [
            "{%- macro text_of(content) -%}{%- if content is string -%}{{ content }}{%- else -%}",
            "{%- for item in content if item.type == 'image' -%}{{ '<image>' }}{{ '\\n' }}{%- endfor -%}",
            "{%- for item in content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}{%- endif -%}",
            "{%- endmacro -%}",
            "{%- if messages and messages[0].role != 'system' -%}{{ ", literal(default), " }}{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- if message.role == 'system' -%}{{ ", system, " }}",
            "{%- elif message.role == 'user' -%}{{ ", question, " }}",
            "{%- else -%}{{ ", answer, " }}{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{ ", literal(template.header), " }}{%- endif -%}",
        ]
    )  # fmt: skip
    bos = template.bos and include_bos
    if separator:
        at_start = "" if bos else "not loop.first and "
        body = "".join(
            [
                "{%- set conversation -%}", body, "{%- endset -%}",
                "{%- for piece in conversation.split('<image>') -%}",
                "{%- if not loop.first -%}{{ '<image>' }}{%- endif -%}",
                "{%- if ", at_start, "piece and not piece.startswith(' ') -%}",
                "{{ word_separator | default(", literal(separator), ") }}{%- endif -%}",
                "{{ piece }}",
                "{%- endfor -%}",
            ]
        )  # fmt: skip
    return (BOS_EXPRESSION if bos else "") + body
