"""Prompt templates: messages → text segments, each marked as supervised or not.

Owns the wording of every named template and the place of the image placeholder. It knows no tokenizer and no picture:
`processor.py` turns segments into ids and labels, `chat_template.py` reads a template from a tokenizer.

The strings are those of LLaVA's `conversation.py`; the tests hold them to the authors' own output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llava_next.config import ModelError

IMAGE_PLACEHOLDER = "<image>"
FROM_TOKENIZER = "tokenizer"
"""Stands where a template's name does, and means the tokenizer's own chat template."""
NO_SYSTEM_TURN = "this template has no place for a system turn"


class MessageLike(Protocol):
    """A turn: `role` is system, user or assistant; placeholders stand in user text."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt. `ends_round` marks the end of an answer: the place where a long sample may be cut."""

    text: str
    supervised: bool = False
    ends_round: bool = False


@dataclass(frozen=True)
class Template:
    """The wording around messages. A round is question, header, answer, end.

    `system_format`, `question_format` and `answer_format` contain `{text}`; `end` is the end token's text,
    supervised with the answer; `between` follows it, unsupervised. Where `system_format` is None, a sample's system
    turn has no place and `default_system` opens every sample as it stands. `trims` cuts white space around every text.
    `bos` tells whether the tokenizer's beginning-of-sequence id opens the sample (a caption goes without where the
    tokenizer has none). `released_specials` are the tokens
    that the released checkpoints of this template were supervised on wherever they stand (an option, see
    `ProcessorConfig.unmask_special_tokens`).
    """

    name: str
    system_format: str | None
    default_system: str | None
    question_format: str
    header: str
    answer_format: str
    end: str
    between: str
    bos: bool
    caption_only: bool = False
    trims: bool = False
    released_specials: tuple[str, ...] = ()

    def render(self, messages: Sequence[MessageLike], *, whole_answers: bool = False) -> list[Segment]:
        """Segments of a conversation whose roles alternate and which ends with an answer (a checked sample).

        Args:
            messages: the turns; a system turn may come first.
            whole_answers: supervise the answer's header and what follows its end token too.

        Raises:
            ModelError: the messages do not alternate user, assistant, or there is no place for their system turn.
        """
        opening, messages = self._opening(messages)
        segments = [Segment(opening)]
        for index, message in enumerate(messages):
            if message.role != ("user", "assistant")[index % 2]:
                raise ModelError(f"messages must alternate user and assistant, turn {index} is {message.role!r}")
            if message.role == "user":
                segments.append(Segment(self._question(self._trimmed(message.text))))
                segments.append(Segment(self.header, supervised=whole_answers))
            else:
                answer = self.answer_format.replace("{text}", self._trimmed(message.text)) + self.end
                segments.append(Segment(answer, supervised=True, ends_round=True))
                segments.append(Segment(self.between, supervised=whole_answers))
        return [segment for segment in segments if segment.text]

    def _opening(self, messages: Sequence[MessageLike]) -> tuple[str, Sequence[MessageLike]]:
        """What stands before the first question, and the messages from there on."""
        system = self.default_system
        if messages and messages[0].role == "system":
            if self.system_format is None:
                raise ModelError(f"template {self.name}: {NO_SYSTEM_TURN}")
            system, messages = self._trimmed(messages[0].text), messages[1:]
        if system is None or self.caption_only:
            return "", messages
        return system if self.system_format is None else self.system_format.replace("{text}", system), messages

    def _trimmed(self, text: str) -> str:
        return text.strip() if self.trims else text

    def _question(self, text: str) -> str:
        num_images = text.count(IMAGE_PLACEHOLDER)
        if self.caption_only:
            return IMAGE_PLACEHOLDER * num_images
        return self.question_format.replace("{text}", place_image(text))


def place_image(text: str) -> str:
    """A turn's single picture comes first, on a line of its own (LLaVA's `preprocess_multimodal`).

    Turns with several pictures are interleaved on purpose and stay as they are, as in LLaVA-NeXT.
    """
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _chatml(name: str, default_system: str | None) -> Template:
    """Standard ChatML: a newline follows every end token."""
    return Template(
        name=name,
        system_format="<|im_start|>system\n{text}<|im_end|>\n",
        default_system=default_system,
        question_format="<|im_start|>user\n{text}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        answer_format="{text}",
        end="<|im_end|>",
        between="\n",
        bos=False,
        released_specials=("\n", "<|im_start|>", "<|im_end|>"),
    )


_TEMPLATES = (
    Template(
        name="plain",
        system_format="",
        default_system=None,
        question_format="",
        header="",
        answer_format="{text}\n",
        end="",
        between="",
        bos=True,
        caption_only=True,
    ),
    Template(
        name="vicuna_v1",
        system_format="{text} ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        question_format="USER: {text} ",
        header="ASSISTANT:",
        answer_format=" {text}",
        end="</s>",
        between="",
        bos=True,
    ),
    Template(
        name="mistral_instruct",
        system_format="{text}",
        default_system=None,
        question_format="[INST] {text} ",
        header="[/INST]",
        answer_format=" {text} ",
        end="</s>",
        between="",
        bos=True,
    ),
    Template(
        name="chatml_direct",
        system_format="<|im_start|>system\n{text}<|im_end|>",
        default_system="Answer the questions.",
        question_format="<|im_start|>user\n{text}<|im_end|>",
        header="<|im_start|>assistant\n",
        answer_format="{text}",
        end="<|im_end|>",
        between="",
        bos=False,
    ),
    Template(
        name="llava_llama_3",
        system_format="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
        default_system=(
            "You are a helpful language and vision assistant. You are able to understand the visual content that "
            "the user provides, and assist the user with a variety of tasks using natural language."
        ),
        question_format="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_format="{text}",
        end="<|eot_id|>",
        between="",
        bos=True,
        # preprocess_llama3 also looks two line breaks up, under a spelling that its vocabulary does not have.
        released_specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _chatml("qwen_1_5", "You are a helpful assistant."),
    # SmolLM2-Instruct speaks ChatML; without a system turn, as short as its format allows.
    _chatml("chatml", None),
)

TEMPLATES: dict[str, Template] = {template.name: template for template in _TEMPLATES}


def check_template_name(name: str) -> None:
    """Refuses what is neither a named template nor `tokenizer`.

    Raises:
        ModelError: with the names that exist.
    """
    if name != FROM_TOKENIZER and name not in TEMPLATES:
        raise ModelError(
            f"no template is called {name!r}; there are {', '.join(sorted(TEMPLATES))}, and {FROM_TOKENIZER} for the "
            "tokenizer's own chat template"
        )


def template_named(name: str) -> Template:
    """The named template; `chat_template.py` reads the tokenizer's own.

    Raises:
        ModelError: with the names that exist.
    """
    check_template_name(name)
    return TEMPLATES[name]
