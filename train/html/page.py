"""Pages that are one HTML file without a script, readable without a network. jinja2 renders them from `templates/`.

Every value is escaped, and characters that would be invisible, or would reorder the text around them, are made visible.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from PIL import Image

_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "␡"}
# Zero width, or a change of the writing direction: the text would not be read as it is.
_VISIBLE |= {
    code: f"⟨U+{code:04X}⟩" for code in (0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def escape_text(value: object) -> Markup:
    """Text for an element or a quoted attribute, with control characters made visible. Markup is returned unchanged."""
    return value if isinstance(value, Markup) else escape(str(value).translate(_VISIBLE))


def jpeg_url(image: Image.Image, side: int) -> Markup:
    """An image as the data URL of a JPEG whose longer side is at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return Markup("data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode())


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template into `path`, which is replaced as a whole, and prints where it is."""
    page = _ENVIRONMENT.get_template(template).render(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # a broken record may hold half a character
    partial.rename(path)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB); open it in a browser")


def is_number(value: object) -> bool:
    """Whether it is finite: null and true, as JSON has them, are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _format_number(value: object, form: str) -> str:
    return format(value, form) if is_number(value) else ""


_ENVIRONMENT = Environment(
    loader=PackageLoader("train.html"), autoescape=True, finalize=escape_text, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters["number"] = _format_number
