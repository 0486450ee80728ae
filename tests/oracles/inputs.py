"""The inputs of the authors' code and of ours: conversations, image sizes and images, made from a seed.

Imported by the programs in authors/ and by the tests, so that both have the same inputs. Standard library only, and
only functions with the same values in every version of Python. A fixture contains `GENERATOR` and a digest of its
inputs: after a change here the tests ask for new fixtures.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

GENERATOR = 1
"""Raise it when the inputs change."""

NUM_CONVERSATIONS = 320
NUM_SIZES = 20_500
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    """One turn as LLaVA's JSON has it: `speaker` is human or gpt."""

    speaker: str
    value: str


@dataclass(frozen=True)
class Conversation:
    """A record; `kind` names its special property."""

    kind: str
    turns: tuple[Turn, ...]

    @property
    def has_image(self) -> bool:
        return any(PLACEHOLDER in turn.value for turn in self.turns)


class _Dice:
    """Choices by `random.random` alone, whose sequence Python guarantees."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, first: int, last: int) -> int:
        return first + int(self._random() * (last - first + 1))

    def pick(self, values: tuple[str, ...]) -> str:
        return values[self.number(0, len(values) - 1)]


_TEXT = (
    "the a picture shows one red bicycle leaning against an old brick wall near two people who are waiting for their "
    "bus while it rains and several umbrellas can be seen behind glass doors of some shop selling fresh bread, cheese "
    "or wine; its sign reads OPEN until nine. What colour is that? How many windows? Please describe in detail "
    "everything on this chart: revenue grew faster than costs, didn't it? I'm not sure; they've said so."
)
_WORDS = tuple(_TEXT.split())

_ODD: dict[str, tuple[str, ...]] = {
    "unicode": (
        "你好，世界！这张图片里有什么？", "写真の中には猫が二匹います。", "ما هذا؟ قطة صغيرة",
        "Ça coûte 3 €, n’est-ce pas ?", "naïve café (NFC)", "nai\u0308ve cafe\u0301 (NFD)",
        "🙂\U0001f469\u200d\U0001f467 family", "Ω≈ç√∫˜µ≤≥÷",
        "ﬁne ﬂow ½ ①②③", "Привет, как дела?", "한국어 텍스트입니다", "no\u00a0break \u200bzero \u3000wide",
        "𝒜𝓁𝒾𝒸ℯ 𐍈 \U0001f9ff", "१२३ ٤٥٦ ７８９",
    ),
    "newlines": (
        "one\ntwo", "one\n\ntwo\n\n\nthree", "- a\n- b\n\t- c", "ends with one\n", "ends with two\n\n",
        "a\r\nb\r\n", "\nbegins", "tab\tand\t\ttabs", "space before \n line \n end",
    ),
    "spaces": (
        " one before", "one after ", "  two before", "two after  ", "   three   around   ", "in  the   middle    of it",
        "\tbegins with a tab", " .", "a , b ; c .", " 1", "( x )",
    ),
    "digits": (
        "2024", "1,234,567.89", "3.14159265358979", "007", "50%", "$12.50", "10:45", "1 2 3", "-5", "1e-3", "0x1F",
        "12345678901",
    ),
    "short": ("A", "No", "7", ".", "?", "é", "猫", "🙂", "a b", "(c)", "'", "--", "Ok!", "B."),
    "markup": (
        "```python\nfor i in range(10):\n    print(i)\n```", '{"name": "x", "values": [1, 2.5, null]}',
        "<b>bold</b> & <i>it</i>", "https://example.org/a?b=c&d=%20#e", r"\frac{a}{b} \leq x_{1}^{2}",
        "| a | b |\n|---|---|\n| 1 | 2 |", "**Note:** see `code`.", "C:\\temp\\new",
        '<div class="x">\n  <p>y</p>\n</div>', "A. cat\nB. dog\nC. bird",
    ),
    "special": (
        "[INST] again [/INST] done", "USER: hello", "say ASSISTANT: hi", "an end </s> inside", "<s> begins",
        "the token <unk> here", "<|im_end|> and <|im_start|>", "<|eot_id|> or <|begin_of_text|>", "{text} {0} {{}}",
        "### Human: x", "<0x0A> byte", "a ▁ mark", "<|im_start|>user\nfake", "<<SYS>>\nx\n<</SYS>>", "</s>",
        "[/INST] ", "<pad>", "system\nuser\nassistant",
    ),
}  # fmt: skip

_INSTRUCTIONS = ("Describe this.", "What is it?\nAnswer in one word.", "Summarize the visual content of the image.")


def _sentence(dice: _Dice, longest: int = 24) -> str:
    words = [dice.pick(_WORDS) for _ in range(dice.number(1, longest))]
    return " ".join(words) + dice.pick((".", "?", "", "!"))


def _odd(kind: str) -> Callable[[_Dice], str]:
    def text(dice: _Dice) -> str:
        parts = [dice.pick(_ODD[kind])]
        if dice.number(0, 2) == 0:
            parts.insert(dice.number(0, 1), _sentence(dice, 6))
        return dice.pick((" ", "\n", "")).join(parts) if len(parts) > 1 else parts[0]

    return text


def _rounds(dice: _Dice, most: int, question: Callable[[_Dice], str], answer: Callable[[_Dice], str]) -> list[Turn]:
    turns: list[Turn] = []
    for _ in range(dice.number(1, most)):
        turns += [Turn("human", question(dice)), Turn("gpt", answer(dice))]
    return turns


def _placed(turns: list[Turn], turn: int, form: str) -> list[Turn]:
    """The turn's value put into a form such as "<image>\\n{}"."""
    turns[turn] = Turn(turns[turn].speaker, form.replace("{}", turns[turn].value))
    return turns


_FORMS = {
    "image_first": "<image>\n{}",
    "image_last": "{}\n<image>",
    "image_inside": "Look at <image> and say: {}",
    "image_tight": "<image>{}",
}
_KINDS = (
    *_FORMS, "text", "text_rounds", "rounds", "rounds", "later", "several_images", "long",
    "unicode", "newlines", "spaces", "digits", "short", "markup", "special", "spaces", "special",
)  # fmt: skip


def conversations() -> list[Conversation]:
    """The conversations with which every template is compared."""
    made = []
    for index in range(NUM_CONVERSATIONS):
        dice, kind = _Dice(index), _KINDS[index % len(_KINDS)]
        if kind in _ODD:
            turns = _rounds(dice, 3, _odd(kind), _odd(kind))
            if dice.number(0, 3):
                turns = _placed(turns, 0, dice.pick(("<image>\n{}", "<image>\n{}", "{}\n<image>")))
        elif kind == "long":
            turns = _placed(_rounds(dice, 2, _sentence, lambda d: _sentence(d, 200)), 0, "<image>\n{}")
        else:
            turns = _rounds(dice, 1 if kind in ("text", *_FORMS) else 5, _sentence, _sentence)
            if kind == "later":
                turns = _placed(turns, 2 * dice.number(0, len(turns) // 2 - 1), "<image>\n{}")
            elif kind == "several_images":
                turns = _placed(turns, 0, dice.pick(("<image>\n<image>\n{}", "Is <image> like <image>? {}")))
            elif kind == "rounds":
                turns = _placed(turns, 0, "<image>\n{}")
            else:
                turns = _placed(turns, 0, _FORMS.get(kind, "{}"))
        made.append(Conversation(kind, tuple(turns)))
    return made


def captions() -> list[Conversation]:
    """Stage 1's records: an instruction that is dropped, and the conversations' first answers as captions."""
    made = []
    for index, source in enumerate(conversations()):
        question = _FORMS["image_first"].replace("{}", _INSTRUCTIONS[index % len(_INSTRUCTIONS)])
        made.append(Conversation(source.kind, (Turn("human", question), Turn("gpt", source.turns[1].value))))
    return made


def odd_records() -> list[Conversation]:
    """Records that preparation repairs or rejects, each with one round that is in order."""
    question, answer = Turn("human", "What is shown?"), Turn("gpt", "A red bicycle.")
    made = {
        "first turn is an answer": (Turn("gpt", "Hello."), question, answer),
        "last turn is a question": (question, answer, Turn("human", "And behind it?")),
        "empty answer": (question, answer, Turn("human", "And behind it?"), Turn("gpt", "")),
        "white space for an answer": (question, answer, Turn("human", "And behind it?"), Turn("gpt", "  ")),
        "no answer": (question,),
        "two questions": (Turn("human", "Look."), question, answer),
        "two answers": (question, answer, Turn("gpt", "And a wall.")),
        "unknown speaker": (question, answer, Turn("human", "And?"), Turn("narrator", "A wall.")),
    }
    return [Conversation(kind, turns) for kind, turns in made.items()]


UNREADABLE_RECORDS = (("text", None), ("missing image", "a.png"), ("more text", None), ("last image missing", "b.png"))
"""Names of records, and of image files that do not exist."""


# Where the authors' int() of a float product is one below the whole number (recipe: 16 of 549,552 sizes), where a
# float decides the grid, and images as thin as possible. (height, width)
_BOUNDARY = (
    (55, 88), (205, 656), (352, 110), (352, 748), (5000, 1), (1, 5000), (10, 2000), (1037, 345), (1226, 2451),
    (1141, 570), (2433, 1217), (1200, 2398), (1, 1), (336, 336), (672, 672), (336, 1008), (1008, 336), (899, 1024),
    (1024, 899), (375, 500),
)  # fmt: skip


def sizes_hw() -> list[tuple[int, int]]:
    """(height, width) of pictures: boundary cases, then small, large, thin and round-numbered ones by turns."""
    dice = _Dice(7)
    sizes = list(_BOUNDARY)
    factors = tuple(map(str, (8, 11, 14, 21, 28, 42, 56, 112)))
    while len(sizes) < NUM_SIZES:
        turn = len(sizes) % 5
        if turn == 0:
            size = (dice.number(1, 340), dice.number(1, 340))
        elif turn == 1:
            size = (dice.number(300, 4000), dice.number(300, 4000))
        elif turn == 2:
            size = (dice.number(1, 60), dice.number(200, 6000))
        elif turn == 3:
            factor = int(dice.pick(factors))
            size = (dice.number(1, 60) * factor, dice.number(1, 60) * factor)
        else:
            size = (dice.number(30, 1100), dice.number(30, 1100))
        sizes.append(size[::-1] if turn == 2 and dice.number(0, 1) else size)
    return sizes


IMAGES_HW = (
    (300, 200), (200, 300), (333, 500), (640, 427), (427, 641), (899, 1024), (301, 1000), (1000, 299), (17, 23), (1, 1),
    (1, 97), (97, 1), (336, 336), (673, 671), (55, 88), (100, 640), (640, 100),
)  # fmt: skip
"""(height, width) of the pictures whose tiles are compared; with the authors' grids they choose each of them."""


SQUASHED_HW = (*IMAGES_HW, (480, 640), (640, 480), (2, 150), (3, 150), (150, 3), (900, 12), (384, 384))
"""(height, width) of the images whose single view for a SigLIP tower is compared."""


def image_bytes(index: int, size_hw: tuple[int, int] | None = None) -> bytes:
    """RGB noise of a size, by default `PICTURES_HW[index]`, row by row: every pixel of a tile shows a wrong filter or
    offset."""
    height, width = size_hw or IMAGES_HW[index]
    return hashlib.shake_256(f"picture {index}".encode()).digest(height * width * 3)


def inputs_sha256(values: Iterable[object]) -> str:
    """The digest of a fixture's inputs."""
    digest = hashlib.sha256()
    for value in values:
        plain = [value.kind, [[t.speaker, t.value] for t in value.turns]] if isinstance(value, Conversation) else value
        digest.update(json.dumps(plain).encode() + b"\n")
    return digest.hexdigest()
