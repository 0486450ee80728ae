"""Filters for personal data, unsafe terms and image metadata.

The patterns match strings that look like addresses or numbers. They detect neither names nor faces, which is why a
person must review the accepted requests, and they also match some harmless texts, which are few enough to lose.
"""

import io
import ipaddress
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from data_recipes.demo_requests.logs import DropReason
from data_recipes.schema.sample import DataError

_EMAIL = re.compile(r"[\w.+-]+\s?(?:@|\(at\)|\[at\])\s?[\w-]+(?:\.[\w-]+)+", re.IGNORECASE)
# Groups of digits, as in card and telephone numbers. A match must not be part of a word or decimal number.
_GROUPED_DIGITS = re.compile(r"(?<![\w.,])\+?\(?\d(?:[ ().-]{0,2}\d){6,18}(?![\w]|[.,]\d)")
_DECIMAL = re.compile(r"\d+\.\d+")
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_IPV6 = re.compile(r"(?<![\w:])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,7}(?![\w:])", re.IGNORECASE)
_ID_NUMBERS = (
    re.compile(r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"),  # social security
    re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),  # bank accounts
    re.compile(r"\b[A-Z]{1,3}\d{6,10}[A-Z]?\b"),  # passports and licences
    re.compile(r"(?<![\w.,])\d{8,}[A-Za-z]?(?!\w|[.,]\d)"),  # any other long number
)
_JPEG_QUALITY = 95


def find_personal_data(text: str) -> DropReason | None:
    """Return the first kind of personal data that a text seems to contain, or None."""
    text = unicodedata.normalize("NFKC", text)  # normalizes full-width digits and similar characters
    if _EMAIL.search(text):
        return DropReason.PRIVATE_EMAIL
    if any(_is_network_address(match) for pattern in (_IPV4, _IPV6) for match in pattern.findall(text)):
        return DropReason.PRIVATE_ADDRESS
    groups = [group for group in _GROUPED_DIGITS.findall(text) if not _DECIMAL.fullmatch(group)]
    if any(_is_card(group) for group in groups):
        return DropReason.PRIVATE_CARD
    if any(pattern.search(text) for pattern in _ID_NUMBERS):
        return DropReason.PRIVATE_NUMBER
    if any(_is_phone(group) for group in groups):
        return DropReason.PRIVATE_PHONE
    return None


def read_unsafe_terms(path: Path) -> re.Pattern[str]:
    """Read a file with one term per line (`#` starts a comment) and compile a pattern of whole words, ignoring case.

    Raises:
        DataError: the file does not exist or has no terms.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; --unsafe-terms must be a text file with one term per line.")
    return compile_terms(path.read_text(encoding="utf-8").splitlines())


def compile_terms(lines: Iterable[str]) -> re.Pattern[str]:
    """Compile the pattern of `read_unsafe_terms` from the lines of a file."""
    terms = sorted({line.split("#")[0].strip().casefold() for line in lines} - {""})
    if not terms:
        raise DataError("--unsafe-terms: the file has no terms; add some or remove the option.")
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, terms)) + r")(?!\w)")


def has_unsafe_term(text: str, terms: re.Pattern[str] | None) -> bool:
    """Return whether a text contains one of the terms."""
    return terms is not None and terms.search(unicodedata.normalize("NFKC", text).casefold()) is not None


def strip_metadata(data: bytes) -> bytes:
    """Re-encode an image as JPEG without metadata (location, time, owner, comments, preview).

    The EXIF rotation is applied, and transparent areas become white.
    """
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        pixels.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
    else:
        pixels.paste(image.convert("RGB"))
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _is_network_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_card(group: str) -> bool:
    """Return whether a group has 13 to 19 digits with a valid check digit (Luhn, ISO/IEC 7812-1)."""
    digits = [int(character) for character in group if character.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_phone(group: str) -> bool:
    """Return whether a group has 7 or more digits after a plus, or 9 to 15 digits with separators."""
    num_digits = sum(character.isdigit() for character in group)
    return num_digits >= 7 if group.startswith("+") else 9 <= num_digits <= 15 and not group.isdigit()
