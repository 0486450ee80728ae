"""What must not go on: personal data in a text, and what somebody objected to.

Owns: the patterns, the operator's list of unsafe terms, pixels without what a camera wrote beside them.
Leaves: reading logs and answers to `logs.py` and `request_files.py`.

Patterns find what looks like an address or a number. They find no names and no faces, and they drop harmless texts too:
the first is why a person must look through what is kept, the second costs little.
"""

import io
import ipaddress
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from data_recipes.demo_requests.logs import Drop
from data_recipes.schema.sample import DataError

_EMAIL = re.compile(r"[\w.+-]+\s?(?:@|\(at\)|\[at\])\s?[\w-]+(?:\.[\w-]+)+", re.IGNORECASE)
# Digits in groups, as cards and telephones are written. The ends must not go on as a word or a decimal.
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


def private(text: str) -> Drop | None:
    """The first kind of personal data that the text seems to hold; None where it seems to hold none."""
    text = unicodedata.normalize("NFKC", text)  # full-width digits and the like
    if _EMAIL.search(text):
        return Drop.PRIVATE_EMAIL
    if any(_is_network_address(match) for pattern in (_IPV4, _IPV6) for match in pattern.findall(text)):
        return Drop.PRIVATE_ADDRESS
    groups = [group for group in _GROUPED_DIGITS.findall(text) if not _DECIMAL.fullmatch(group)]
    if any(_is_card(group) for group in groups):
        return Drop.PRIVATE_CARD
    if any(pattern.search(text) for pattern in _ID_NUMBERS):
        return Drop.PRIVATE_NUMBER
    if any(_is_phone(group) for group in groups):
        return Drop.PRIVATE_PHONE
    return None


def read_terms(path: Path) -> re.Pattern[str]:
    """A pattern of the terms in a file, one a line, as whole words in whatever case; `#` begins a comment.

    Raises:
        DataError: there is no such file, or no term in it.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; --unsafe-terms names a text file with one term a line.")
    return terms_pattern(path.read_text(encoding="utf-8").splitlines())


def terms_pattern(lines: Iterable[str]) -> re.Pattern[str]:
    """The pattern of `read_terms`, from the file's lines."""
    terms = sorted({line.split("#")[0].strip().casefold() for line in lines} - {""})
    if not terms:
        raise DataError("--unsafe-terms: the file has no term; leave the option out to look for none.")
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, terms)) + r")(?!\w)")


def has_term(text: str, terms: re.Pattern[str] | None) -> bool:
    """Whether the text has one of the terms."""
    return terms is not None and terms.search(unicodedata.normalize("NFKC", text).casefold()) is not None


def only_pixels(picture: bytes) -> bytes:
    """The picture as JPEG, turned upright, without place, time, owner, comments or preview that its file may hold."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture)))
    plain = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        plain.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
    else:
        plain.paste(image.convert("RGB"))
    stream = io.BytesIO()
    plain.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _is_network_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_card(group: str) -> bool:
    """13 to 19 digits whose weighted sum (Luhn, ISO/IEC 7812-1) ends in zero."""
    digits = [int(character) for character in group if character.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_phone(group: str) -> bool:
    """9 to 15 digits, or 7 after a plus; a run of digits without any mark is a number, not a telephone."""
    num_digits = sum(character.isdigit() for character in group)
    return num_digits >= 7 if group.startswith("+") else 9 <= num_digits <= 15 and not group.isdigit()
