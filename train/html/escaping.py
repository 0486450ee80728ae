"""Text of the data, which nobody has vouched for, made harmless and visible inside HTML."""

from html import escape

_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "␡"}
# What turns the direction of writing, or has no width, would hide how a text really reads.
_VISIBLE |= {
    code: f"⟨U+{code:04X}⟩" for code in (0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def shown(text: object) -> str:
    """Escaped for an element or a quoted attribute; control characters as signs that can be seen."""
    return escape(str(text).translate(_VISIBLE))
