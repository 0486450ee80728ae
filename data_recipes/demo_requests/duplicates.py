"""Requests that were made before, nearly: the same question on the same picture, however it was scaled or saved.

Owns: when two pictures and two texts are nearly the same, and finding that out among thousands.
Leaves: what happens to the second one to the caller.
"""

import io
import re
import unicodedata

from PIL import Image

_NUM_BANDS = 4
_BAND_BITS = 16
_MAX_DIFFERENT_BITS = _NUM_BANDS - 1  # so that at least one band of two near pictures is equal
_MIN_TEXT_OVERLAP = 0.75
_LETTERS_AT_ONCE = 3


class SeenRequests:
    """The requests that were kept so far, found again by bands of their pictures' hashes."""

    def __init__(self) -> None:
        self._by_band: dict[tuple[int, int], list[tuple[int, frozenset[str]]]] = {}

    def is_new(self, text: str, picture: bytes) -> bool:
        """Whether no kept request is nearly this one; a new one is remembered."""
        found = picture_hash(picture)
        shingles = text_shingles(text)
        bands = [(band, found >> (band * _BAND_BITS) & (1 << _BAND_BITS) - 1) for band in range(_NUM_BANDS)]
        for key in bands:
            for other, other_shingles in self._by_band.get(key, ()):
                if (found ^ other).bit_count() <= _MAX_DIFFERENT_BITS and _near(shingles, other_shingles):
                    return False
        for key in bands:
            self._by_band.setdefault(key, []).append((found, shingles))
        return True


def picture_hash(picture: bytes) -> int:
    """64 bits: whether each of 8 x 8 spots is brighter than its right neighbour, on the picture scaled to 8 x 9."""
    small = Image.open(io.BytesIO(picture)).convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = small.tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (pixels[row * 9 + column] > pixels[row * 9 + column + 1])
    return bits


def text_shingles(text: str) -> frozenset[str]:
    """Every three letters in a row of the text's words, case and punctuation aside."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    plain = f" {' '.join(words)} "
    return frozenset(plain[at : at + _LETTERS_AT_ONCE] for at in range(max(1, len(plain) - _LETTERS_AT_ONCE + 1)))


def _near(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= _MIN_TEXT_OVERLAP * len(one | other)
