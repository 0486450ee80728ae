"""Templates and Jinja chat templates, in both directions.

`chat_template` writes a `Template` as Jinja, for exports. `template_of` reads one from the Jinja that a tokenizer
carries: it prints conversations of marked texts, cuts the wording out between them, and then holds the result to the
chat template on other conversations, character by character. What a `Template` cannot say is refused, never guessed.
The named templates and their wording are `conversation.py`'s.

The beginning-of-sequence token of a prompt has exactly one source. In the Hugging Face layout it is the chat template:
an exported tokenizer adds no token, so that `apply_chat_template(tokenize=True)`, the rendered text given to the
processor, and vLLM all read the prompt of the training. In the authors' layout it is the tokenizer, as in their
releases. Directories of others may do either; `adds_special_tokens` and `template_of` find out.

The text before, between and after images is tokenized piece by piece in training, as the authors do. A sentencepiece
tokenizer with `legacy: false` marks the beginning of a word at the start of a text, but not behind a special token; in
the rendered prompt, which has the token and the images in it, a space stands for that mark (`word_separator`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import processors

from llava_next.config import ModelError
from llava_next.inputs.conversation import (
    FROM_TOKENIZER,
    IMAGE_PLACEHOLDER,
    NO_SYSTEM_TURN,
    TEMPLATES,
    MessageLike,
    Template,
    template_named,
)


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
"""Stands for the beginning-of-sequence token while the wording is cut: SmolLM2's is also what opens its turns."""

PRINTED_BOS = "{{ bos_token }}"
"""What `chat_template` begins with where it prints the beginning-of-sequence token."""

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
"""What a chat template could treat in its own way: white space, its own signs, HTML's, other scripts."""


def template_for(name: str, tokenizer: Any) -> Template:
    """The named template, or the tokenizer's own for `tokenizer`. Errors are those of `template_named` and
    `template_of`."""
    return template_of(tokenizer) if name == FROM_TOKENIZER else template_named(name)


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer has to add special tokens to a rendered prompt: not where it begins with the
    beginning-of-sequence token, as in transformers' own `apply_chat_template(tokenize=True)`."""
    bos = tokenizer.bos_token
    return not (bos and text.startswith(bos))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the beginning-of-sequence token before a text that has none."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x")["input_ids"][0] == bos


def set_post_processor(tokenizer: Any, *, adds_bos: bool) -> None:
    """Lets a fast tokenizer add its beginning-of-sequence token to each text, or no special token at all; and lets it
    report each token's characters as they are, where a byte-level post-processor may leave out white space."""
    bos = tokenizer.bos_token if adds_bos else None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if bos else "$A",
        pair=f"{bos} $A $B" if bos else "$A $B",
        special_tokens=[(bos, tokenizer.bos_token_id)] if bos else [],
    )


def template_of(tokenizer: Any) -> Template:
    """The tokenizer's chat template as a `Template`: the same strings, answers supervised with their end token.

    The beginning-of-sequence token is left to the processor where the chat template prints it once, in front; and
    where it prints none but the tokenizer, which belongs to a whole vision-language model, adds it. (The tokenizer of a
    language model alone renders its conversations without adding tokens.)

    Raises:
        ModelError: there is no chat template, its answers end with no stop token, or it is none that a `Template`
            can say (dates, a first turn unlike the others, rewritten texts); shows the first place that differs.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _refusal(tokenizer, "the tokenizer has no chat template")
    template = _cut(tokenizer)
    _verify(template, tokenizer)
    if not template.bos and _has_processor(tokenizer) and adds_bos(tokenizer):
        return replace(template, bos=True)
    return template


def _has_processor(tokenizer: Any) -> bool:
    folder = Path(tokenizer.name_or_path)
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def _cut(tokenizer: Any) -> Template:
    """The wording between marked texts, as if the chat template had the form of a `Template`; `_verify` judges it."""
    asked, prompted, one, two = (
        _pieces(tokenizer, _ROUNDS[:1]),
        _pieces(tokenizer, _ROUNDS[:1], prompt=True),
        _pieces(tokenizer, _ROUNDS[:2]),
        _pieces(tokenizer, _ROUNDS),
    )
    tail = one[2]
    end = _stop_token(tokenizer, tail)
    answer_after, _, between = tail.partition(end)
    question_before = two[2].removeprefix(tail)
    front = one[0].removesuffix(question_before)
    bos_text = tokenizer.bos_token or ""
    bos = _BOS if front.startswith(_BOS) else bos_text if front == bos_text else ""
    front = front.removeprefix(bos)
    default_system = front or None
    system_format = None
    system = _system_pieces(tokenizer)
    if system is not None:
        before, after = system[0].removeprefix(bos), system[1].removesuffix(question_before)
        system_format = before + "{text}" + after
        default_system = front.removeprefix(before).removesuffix(after) if front else None
    padded = f"\t{_ROUNDS[0].text}\t"

    def real(text: str) -> str:
        return text.replace(_BOS, bos_text)

    return Template(
        name=FROM_TOKENIZER,
        system_format=None if system_format is None else real(system_format),
        default_system=None if default_system is None else real(default_system),
        question_format=real(question_before + "{text}" + asked[1]),
        header=real(prompted[1].removeprefix(asked[1])),
        answer_format=real(one[1].removeprefix(prompted[1]) + "{text}" + answer_after),
        end=end,
        between=real(between),
        bos=bool(bos),
        trims=padded not in _print(tokenizer, [_Turn("user", padded)]),
    )


def _verify(template: Template, tokenizer: Any) -> None:
    """Raises ModelError unless both print the same for a set of conversations of one to four rounds."""
    for turns in _conversations(with_system=template.system_format is not None):
        theirs = _print(tokenizer, turns, prompt=turns[-1].role == "user")
        ours = tokenizer.bos_token if template.bos else ""
        ours += "".join(segment.text for segment in template.render(turns))
        if ours == theirs:
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        place = min(len(ours), len(theirs)) if place is None else place
        raise _refusal(
            tokenizer,
            f"it does not treat all turns alike, or rewrites their texts: in a conversation of {len(turns)} turns, "
            f"behind {theirs[max(0, place - 30) : place]!r}, it prints {theirs[place : place + 40]!r} where the "
            f"wording of its other turns gives {ours[place : place + 40]!r}",
        )


def _conversations(*, with_system: bool) -> Iterator[list[_Turn]]:
    """Conversations of one to four rounds, whole and up to the last question, through all of `_TEXTS`."""
    for start in range(len(_TEXTS)):
        texts = [_TEXTS[(start + step) % len(_TEXTS)] for step in range(9)]
        num_rounds = 1 + start % 4
        turns = [_Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts[1 : 1 + 2 * num_rounds])]
        for system in ([], [_Turn("system", texts[0])])[: 1 + with_system]:
            yield system + turns
            yield system + turns[:-1]


def _system_pieces(tokenizer: Any) -> list[str] | None:
    """Wording around a system turn; None where the chat template refuses one or leaves its text out."""
    turns = [_SYSTEM, *_ROUNDS[:2]]
    try:
        printed = _print(tokenizer, turns)
    except ModelError:
        return None
    return _pieces(tokenizer, turns) if _SYSTEM.text in printed else None


def _pieces(tokenizer: Any, turns: Sequence[MessageLike], *, prompt: bool = False) -> list[str]:
    """What stands before, between and behind the turns' texts: one more than there are turns."""
    rest = _print(tokenizer, turns, prompt=prompt, **({"bos_token": _BOS} if tokenizer.bos_token else {}))
    pieces = []
    for turn in turns:
        before, found, rest = rest.partition(turn.text)
        if not found:
            raise _refusal(tokenizer, f"it does not print a text of the {turn.role} as it is given, in its turn")
        pieces.append(before)
    return [*pieces, rest]


def _print(tokenizer: Any, turns: Sequence[MessageLike], *, prompt: bool = False, **values: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    values |= {"word_separator": ""}  # of an export's chat template: the text of the training is asked for
    render = partial(tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=prompt, **values)
    try:
        # The clock is taken away: what a date is printed in today is no template tomorrow.
        return str(render(strftime_now=None))
    except Exception as error:  # a chat template is a program, and may raise whatever a program can
        try:
            render()
        except Exception:
            why = f"it cannot print a conversation of {len(turns)} turns: {error}"
        else:
            why = "it prints today's date"
        raise _refusal(tokenizer, why) from error


def _stop_token(tokenizer: Any, tail: str) -> str:
    """The first special token behind an answer: where generation stops."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    places = sorted((tail.find(text), -len(text), text) for text in special | {tokenizer.eos_token} if text in tail)
    if not places:
        raise _refusal(
            tokenizer,
            f"behind an answer it prints {tail!r}, which holds no special token of the tokenizer: a model trained on "
            "it would never stop",
        )
    return places[0][2]


def _refusal(tokenizer: Any, why: str) -> ModelError:
    return ModelError(
        f"template {FROM_TOKENIZER!r} asks for the chat template of {tokenizer.name_or_path}, which cannot be used: "
        f"{why}; choose a named template with stage.template=NAME ({', '.join(sorted(TEMPLATES))})"
    )


def word_separator(tokenizer: Any) -> str:
    """What a text needs before it, behind a special token, to be tokenized as it is alone: nothing, or a space."""
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    behind = tokenizer(f"{IMAGE_PLACEHOLDER} x", add_special_tokens=False)["input_ids"][-len(alone) :]
    directly = tokenizer(f"{IMAGE_PLACEHOLDER}x", add_special_tokens=False)["input_ids"][-len(alone) :]
    return " " if behind == alone != directly else ""


def chat_template(template: Template, *, prints_bos: bool = True, separator: str = "") -> str:
    """The template as Jinja, over messages whose content is a string or a list of text and image items.

    Images of a turn come first, as `place_image` puts them.

    Args:
        prints_bos: print the beginning-of-sequence token of a template that opens with it; otherwise the tokenizer
            has to add it.
        separator: the tokenizer's `word_separator`. The variable of that name replaces it where a caller of the chat
            template gives one: with an empty one it prints the text of the training.
    """
    literal = partial(json.dumps, ensure_ascii=False)  # Jinja does not join the two halves of an escaped emoji
    text = "text_of(message.content)" + (" | trim" if template.trims else "")

    def turn(wording: str) -> str:
        before, _, after = wording.partition("{text}")
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
    bos = template.bos and prints_bos
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
    return (PRINTED_BOS if bos else "") + body
