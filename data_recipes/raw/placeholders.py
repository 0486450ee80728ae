"""Finds placeholders of other training frameworks that nothing has filled, such as `<video>` or `<|image_pad|>`.

A model would learn them as words. Tokens that occur nowhere else are found in every turn. Those that are also HTML or
plain text (`<video>`, `[IMG]`) are found in questions and system prompts only, outside code, and not beside markup.
"""

import re

from data_recipes.schema.sample import IMAGE_PLACEHOLDER, Role

# Qwen, Phi, Gemma, Idefics, DeepSeek-VL, InternVL, InternLM-XComposer, LLaVA (with start and end tokens), ms-swift,
# Kimi and MiniCPM-V. Markers of boxes that surround text, such as `<ref>` or `<|box_start|>`, are not placeholders.
_TOKENS = re.compile(
    r"<\|(?:image|img|video|audio|vision|media)(?:_[a-z0-9_]+)?\|>"
    r"|<\|(?:IMAGE|VIDEO|AUDIO)\|>"
    r"|<(?:image_soft_token|start_of_image|end_of_image|fake_token_around_image|image_placeholder|video_placeholder)>"
    r"|<(?:IMG_CONTEXT|VIDEO_CONTEXT|ImageHere|VideoHere|im_patch|im_start|im_end|vid_patch|vid_start|vid_end)>"
    r"|<(?:ref-object|bbox|cot-process|start-image)>"
    r"|\[<(?:IMG|VID)_PLH>\]"
    r"|<image>\./</image>"
)
_NUMBERED = re.compile(r"<(?:image|video|audio)[ _-]?\d+>|<img>[^<>\n]+</img>")
_AMBIGUOUS = re.compile(r"<(?:video|audio|VIDEO|AUDIO|Video|Audio|Image|IMAGE)>|\[(?:IMG|IMG_BREAK|IMG_END)\]")
_NAMES = re.compile(r"\{\{(?:name|author)\}\}")  # of LLaMA-Factory's identity.json, which its user replaces
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_MARKUP = re.compile(
    r"</|\[/|\btags?\b|\belements?\b|html|xml|css|javascript|browser|\bweb|templat|jinja|mustache|handlebars",
    re.IGNORECASE,
)


def find_placeholder(role: Role, text: str) -> str | None:
    """Return the first placeholder of another framework in a turn, or None.

    Args:
        role: speaker of the turn.
        text: its text. `<image>`, the placeholder of this project, is not reported.
    """
    has_tags = text.count("<") > text.count(IMAGE_PLACEHOLDER) or "<image>./" in text
    if not has_tags and "[" not in text and "{{" not in text:
        return None
    found = next((match for match in _TOKENS.finditer(text) if not _is_markup(match, text)), None)
    if found is None:
        text = _CODE.sub(" ", text)
        found = _NAMES.search(text)
        found = found if found is None or _MARKUP.search(text) is None else None
    if found is None and role != "assistant":
        found = _NUMBERED.search(text)
        if found is None:
            found = next((match for match in _AMBIGUOUS.finditer(text) if _stands_for_medium(match, text)), None)
    return None if found is None else found[0]


def _is_markup(match: re.Match[str], text: str) -> bool:
    """Return whether the token is an opening tag whose closing tag is in the text too."""
    return f"</{match[0][1:-1]}>" in text


def _stands_for_medium(match: re.Match[str], text: str) -> bool:
    """Return whether an ambiguous token stands for a medium: at an edge of a line, or in a text without markup."""
    closing = match[0].replace("<", "</").replace("[", "[/").lower()
    if closing in text.lower():
        return False
    line = text[text.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0].strip()
    return line.startswith(match[0]) or line.endswith(match[0]) or _MARKUP.search(text) is None
