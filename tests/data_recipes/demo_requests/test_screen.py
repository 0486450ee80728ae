"""Tests of the filters for personal data, image metadata and near-duplicates."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_recipes.demo_requests import screen
from data_recipes.demo_requests.duplicates import SeenRequests
from data_recipes.demo_requests.logs import DropReason
from tests.data_recipes.demo_requests.demo_logs import photo


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("write to jane.doe+x@mail.example.co.uk please", DropReason.PRIVATE_EMAIL),
        ("jane (at) example.org", DropReason.PRIVATE_EMAIL),
        ("call +49 170 1234567", DropReason.PRIVATE_PHONE),
        ("call (212) 555-0123 now", DropReason.PRIVATE_PHONE),
        ("0171-234 56 78", DropReason.PRIVATE_PHONE),
        ("+1 555 0123", DropReason.PRIVATE_PHONE),
        ("card 4111 1111 1111 1111", DropReason.PRIVATE_CARD),
        ("5500-0000-0000-0004", DropReason.PRIVATE_CARD),
        ("378282246310005", DropReason.PRIVATE_CARD),
        ("my server 192.168.7.20 is down", DropReason.PRIVATE_ADDRESS),
        ("fe80:0:0:0:1ff:fe23:4567:890a", DropReason.PRIVATE_ADDRESS),
        ("2001:db8::8a2e:370:7334", DropReason.PRIVATE_ADDRESS),
        ("SSN 078-05-1120", DropReason.PRIVATE_NUMBER),
        ("IBAN DE89 3704 0044 0532 0130 00", DropReason.PRIVATE_NUMBER),
        ("passport C01234567", DropReason.PRIVATE_NUMBER),
        ("id 11010519491231002X", DropReason.PRIVATE_NUMBER),
        ("account 1234567890", DropReason.PRIVATE_NUMBER),
        ("account １２３４５６７８９０", DropReason.PRIVATE_NUMBER),
    ],
)
def test_personal_data(text: str, reason: DropReason) -> None:
    """Each kind of personal data is detected in its common notations."""
    assert screen.find_personal_data(text) is reason


@pytest.mark.parametrize(
    "text",
    [
        "What is in the fog?",
        "Is it from 2019-2020 or from 1998?",
        "It was taken on 2024-02-03.",
        "Pi is 3.14159265358979.",
        "Describe the region [0.060,0.344,0.441,0.696].",
        "What does std::vector do at 12:30:45?",
        "How much is 1,234,567.89 in euros? And 12 000?",
        "Version 10.15 with @decorators",
        "Room 4711, 555-1234",
    ],
)
def test_other_numbers_are_kept(text: str) -> None:
    """Years, dates, decimals, boxes, times and sums are not personal data."""
    assert screen.find_personal_data(text) is None


def test_card_check_digit() -> None:
    """A number with an invalid check digit is not a card number."""
    assert screen.find_personal_data("4111 1111 1111 1112") is not DropReason.PRIVATE_CARD
    assert screen.find_personal_data("4111 1111 1111 1111") is DropReason.PRIVATE_CARD


def test_similar_hashes_are_found() -> None:
    """Up to three different bits leave at least one of four bands equal, so every similar image is found."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        pixels = rng.integers(60, 200, (8, 9), dtype=np.uint8)
        near = pixels.copy()
        for row in rng.choice(8, size=3, replace=False):
            near[row, 0] = 255 if near[row, 0] <= near[row, 1] else 0  # flips one bit
        seen = SeenRequests()
        assert seen.add_if_new("What is it?", _png(pixels))
        assert not seen.add_if_new("What is it?", _png(near))


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_metadata_is_removed() -> None:
    """EXIF rotation is applied and removed, and transparent areas become white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotation by 90 degrees
    turned = Image.open(io.BytesIO(screen.strip_metadata(photo(1, height=96, width=128, exif=exif))))
    assert (turned.format, turned.size) == ("JPEG", (96, 128))
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert Image.open(io.BytesIO(screen.strip_metadata(_png(clear)))).getpixel((0, 0)) == (255, 255, 255)
