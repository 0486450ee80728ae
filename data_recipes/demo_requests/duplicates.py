"""Detects near-duplicate requests: similar questions about the same image, even if it was rescaled or re-encoded.

Images are compared by difference hash, texts by overlap of their trigrams. Bands of the hash serve as an index, so
that a request is compared with few others.
"""

import io
import re
import unicodedata

from PIL import Image

_NUM_BANDS = 4
_BAND_BITS = 16
_MAX_DIFFERENT_BITS = _NUM_BANDS - 1  # similar images then have at least one equal band
_MIN_TEXT_OVERLAP = 0.75
_SHINGLE_LENGTH = 3


class SeenRequests:
    """The requests accepted so far, indexed by the bands of their image hashes."""

    def __init__(self) -> None:
        self._by_band: dict[tuple[int, int], list[tuple[int, frozenset[str]]]] = {}

    def add_if_new(self, text: str, image: bytes) -> bool:
        """Add a request unless a similar one was added before; returns whether it was added.

        Args:
            text: the question.
            image: the encoded image.
        """
        new_hash = difference_hash(image)
        shingles = text_shingles(text)
        bands = [(band, new_hash >> (band * _BAND_BITS) & (1 << _BAND_BITS) - 1) for band in range(_NUM_BANDS)]
        for key in bands:
            for other_hash, other_shingles in self._by_band.get(key, ()):
                if (new_hash ^ other_hash).bit_count() <= _MAX_DIFFERENT_BITS and _is_similar(shingles, other_shingles):
                    return False
        for key in bands:
            self._by_band.setdefault(key, []).append((new_hash, shingles))
        return True


def difference_hash(image: bytes) -> int:
    """Compute the 64-bit difference hash (dHash) of an encoded image.

    The image is scaled to 8 rows of 9 grey pixels. Each bit tells whether a pixel is brighter than its right neighbour.
    """
    small = Image.open(io.BytesIO(image)).convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = small.tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (pixels[row * 9 + column] > pixels[row * 9 + column + 1])
    return bits


def text_shingles(text: str) -> frozenset[str]:
    """Return the character trigrams of a text, ignoring case and punctuation."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    normalized = f" {' '.join(words)} "
    num_shingles = max(1, len(normalized) - _SHINGLE_LENGTH + 1)
    return frozenset(normalized[start : start + _SHINGLE_LENGTH] for start in range(num_shingles))


def _is_similar(left: frozenset[str], right: frozenset[str]) -> bool:
    return len(left & right) >= _MIN_TEXT_OVERLAP * len(left | right)
