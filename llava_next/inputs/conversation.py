"""Prompt templates, which render messages as supervised and unsupervised text segments.

The strings of most named templates are those of LLaVA's `conversation.py`; tests compare them with the authors' output.
`chat_template.py` reads a template from a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from llava_next.config import ModelError, TemplateConfig

IMAGE_PLACEHOLDER = "<image>"
FROM_TOKENIZER = "tokenizer"
"""The name that selects the tokenizer's chat template instead of a named template."""
CUSTOM = "custom"
"""`Template.name` of a template whose text is in the configuration."""
NO_SYSTEM_TURN = "this template has no place for a system turn"
"""Error message, which exported chat templates contain."""


class MessageLike(Protocol):
    """A turn of a conversation. `role` is system, user or assistant; user text contains the image placeholders."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt.

    Attributes:
        text: of the segment.
        supervised: whether its tokens are training targets.
        ends_round: whether it ends an answer, after which a long sample can be truncated.
    """

    text: str
    supervised: bool = False
    ends_round: bool = False


@dataclass(frozen=True)
class Template:
    """The text around messages. A round is question, header, answer, end.

    Attributes:
        name: of the template.
        system_format: contains `{text}`; None if a sample cannot have a system turn.
        default_system: the system text of samples without a system turn; None means none. If `system_format` is None,
            every sample begins with this text.
        question_format: contains `{text}`.
        header: text between a question and its answer.
        answer_format: contains `{text}`.
        end: text of the end token, supervised with the answer.
        between: text after the end token, not supervised.
        bos: whether a sample begins with the tokenizer's beginning-of-sequence token. A caption-only template omits it
            if the tokenizer has none.
        caption_only: questions are reduced to their image placeholders, and system turns are omitted.
        trims: whether leading and trailing white space of every text is removed.
        released_specials: tokens that the released checkpoints of this template were supervised on everywhere (see
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
        """Renders a conversation as segments; empty ones are omitted.

        Args:
            messages: an optional system turn, followed by alternating user and assistant turns.
            whole_answers: also supervise the header before an answer and the text after its end token.

        Raises:
            ModelError: the turns do not alternate, or the template does not support their system turn.
        """
        opening, messages = self._opening(messages)
        segments = [Segment(opening)]
        for index, message in enumerate(messages):
            if message.role != ("user", "assistant")[index % 2]:
                raise ModelError(
                    f"messages must alternate between user and assistant, turn {index} is {message.role!r}"
                )
            if message.role == "user":
                segments.append(Segment(self._question(self._trimmed(message.text))))
                segments.append(Segment(self.header, supervised=whole_answers))
            else:
                answer = self.answer_format.replace("{text}", self._trimmed(message.text)) + self.end
                segments.append(Segment(answer, supervised=True, ends_round=True))
                segments.append(Segment(self.between, supervised=whole_answers))
        return [segment for segment in segments if segment.text]

    def _opening(self, messages: Sequence[MessageLike]) -> tuple[str, Sequence[MessageLike]]:
        """The text before the first question, and the messages without the system turn."""
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
        return self.question_format.replace("{text}", move_image_to_front(text))


def move_image_to_front(text: str) -> str:
    """Moves the placeholder of a turn's only image to the first line (LLaVA's `preprocess_multimodal`).

    Turns with several images are interleaved text and images and are returned unchanged, as in LLaVA-NeXT.
    """
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _chatml(name: str, default_system: str | None, thought: str = "") -> Template:
    """Standard ChatML, with a newline after every end token.

    Args:
        name: of the template.
        default_system: as in `Template`.
        thought: precedes every answer, not supervised.
    """
    return Template(
        name=name,
        system_format="<|im_start|>system\n{text}<|im_end|>\n",
        default_system=default_system,
        question_format="<|im_start|>user\n{text}<|im_end|>\n",
        header=f"<|im_start|>assistant\n{thought}",
        answer_format="{text}",
        end="<|im_end|>",
        between="\n",
        bos=False,
        released_specials=("\n", "<|im_start|>", "<|im_end|>"),
    )


def _llama_3(
    name: str,
    *,
    default_system: str,
    system_opening: str = "",
    trims: bool = False,
    released_specials: tuple[str, ...] = (),
) -> Template:
    """Llama 3's headers. `system_opening` precedes the text of every system turn; the rest is as in `Template`."""
    return Template(
        name=name,
        system_format=f"<|start_header_id|>system<|end_header_id|>\n\n{system_opening}{{text}}<|eot_id|>",
        default_system=default_system,
        question_format="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_format="{text}",
        end="<|eot_id|>",
        between="",
        bos=True,
        trims=trims,
        released_specials=released_specials,
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
    _llama_3(
        "llava_llama_3",
        default_system=(
            "You are a helpful language and vision assistant. You are able to understand the visual content that "
            "the user provides, and assist the user with a variety of tasks using natural language."
        ),
        # preprocess_llama3 also looks up two line breaks, in a spelling that is not in its vocabulary.
        released_specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _chatml("qwen_1_5", "You are a helpful assistant."),
    # No released model has it, so none was supervised on special tokens.
    replace(
        _chatml("qwen_2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        released_specials=(),
    ),
    # SmolLM2-Instruct uses ChatML; this template has no default system turn.
    _chatml("chatml", None),
    # Qwen3 without thinking: its own template renders this empty thought for enable_thinking=false, but only before the
    # last answer of a conversation. Here it precedes every answer, as in the prompt of a first question.
    _chatml("qwen3", None, "<think>\n\n</think>\n\n"),
    # Llama 3.1 and 3.2. The date is that of Meta's template where no clock is given (3.2 renders today's otherwise).
    _llama_3(
        "llama_3_2",
        default_system="",
        system_opening="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
        trims=True,
    ),
    # Gemma 1 to 3. Their own template writes a system text into the first question.
    Template(
        name="gemma",
        system_format=None,
        default_system=None,
        question_format="<start_of_turn>user\n{text}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        answer_format="{text}",
        end="<end_of_turn>",
        between="\n",
        bos=True,
        trims=True,
    ),
    # Phi-4-mini, without the end-of-text token that its own template renders after the last turn of a conversation.
    Template(
        name="phi_4",
        system_format="<|system|>{text}<|end|>",
        default_system=None,
        question_format="<|user|>{text}<|end|>",
        header="<|assistant|>",
        answer_format="{text}",
        end="<|end|>",
        between="",
        bos=False,
    ),
)

TEMPLATES: dict[str, Template] = {template.name: template for template in _TEMPLATES}


def check_template(template: str | TemplateConfig) -> None:
    """Checks a template of a configuration without its tokenizer.

    Raises:
        ModelError: the name is neither a named template nor `tokenizer`, or a text breaks a rule of `TemplateConfig`.
    """
    if isinstance(template, TemplateConfig):
        _check_texts(template)
    elif template != FROM_TOKENIZER and template not in TEMPLATES:
        raise ModelError(
            f"unknown template {template!r}; choose {', '.join(sorted(TEMPLATES))}, {FROM_TOKENIZER} for the "
            "tokenizer's chat template, or write its text in YAML (question_format, header, end)"
        )


def _check_texts(template: TemplateConfig) -> None:
    texts = {key: value for key, value in asdict(template).items() if isinstance(value, str)}
    for key, text in texts.items():
        if key.endswith("_format") and text.count("{text}") != 1:
            raise ModelError(f"{key} must contain {{text}} once, in the place of the message, got {text!r}")
        if IMAGE_PLACEHOLDER in text:
            raise ModelError(f"{key} must not contain {IMAGE_PLACEHOLDER}, which is part of a question, got {text!r}")
    if not template.end:
        raise ModelError(
            "end must be the text of a token of the tokenizer, because generation stops at it; it is empty"
        )


def get_template(template: str | TemplateConfig) -> Template:
    """The template of this name or with these texts.

    Raises:
        ModelError: as `check_template`, or the name is `tokenizer`.
    """
    check_template(template)
    if isinstance(template, TemplateConfig):
        return Template(name=CUSTOM, **asdict(template))
    if template == FROM_TOKENIZER:
        raise ModelError(f"template {FROM_TOKENIZER} has no text of its own; it is read from a tokenizer")
    return TEMPLATES[template]
