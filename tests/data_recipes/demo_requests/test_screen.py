"""Owns the proofs about what may not go on from a demo's logs: personal data, what a camera wrote, repetitions."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_recipes.demo_requests import screen
from data_recipes.demo_requests.duplicates import SeenRequests
from data_recipes.demo_requests.logs import Drop
from tests.data_recipes.demo_requests.demo_logs import photo


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("write to jane.doe+x@mail.example.co.uk please", Drop.PRIVATE_EMAIL),
        ("jane (at) example.org", Drop.PRIVATE_EMAIL),
        ("call +49 170 1234567", Drop.PRIVATE_PHONE),
        ("call (212) 555-0123 now", Drop.PRIVATE_PHONE),
        ("0171-234 56 78", Drop.PRIVATE_PHONE),
        ("+1 555 0123", Drop.PRIVATE_PHONE),
        ("card 4111 1111 1111 1111", Drop.PRIVATE_CARD),
        ("5500-0000-0000-0004", Drop.PRIVATE_CARD),
        ("378282246310005", Drop.PRIVATE_CARD),
        ("my server 192.168.7.20 is down", Drop.PRIVATE_ADDRESS),
        ("fe80:0:0:0:1ff:fe23:4567:890a", Drop.PRIVATE_ADDRESS),
        ("2001:db8::8a2e:370:7334", Drop.PRIVATE_ADDRESS),
        ("SSN 078-05-1120", Drop.PRIVATE_NUMBER),
        ("IBAN DE89 3704 0044 0532 0130 00", Drop.PRIVATE_NUMBER),
        ("passport C01234567", Drop.PRIVATE_NUMBER),
        ("id 11010519491231002X", Drop.PRIVATE_NUMBER),
        ("account 1234567890", Drop.PRIVATE_NUMBER),
        ("account １２３４５６７８９０", Drop.PRIVATE_NUMBER),
    ],
)
def test_personal_data(text: str, reason: Drop) -> None:
    """Each kind that is looked for, in the forms that people write."""
    assert screen.private(text) is reason


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
def test_numbers_that_are_nobodys(text: str) -> None:
    """Years, dates, decimals, boxes, times and sums are kept."""
    assert screen.private(text) is None


def test_a_card_is_known_by_its_check_digit() -> None:
    """One digit more or less and it is a number like others."""
    assert screen.private("4111 1111 1111 1112") is not Drop.PRIVATE_CARD
    assert screen.private("4111 1111 1111 1111") is Drop.PRIVATE_CARD


def test_near_pictures_are_found_whichever_bits_differ() -> None:
    """Up to three of 64 bits: at least one of four bands is equal then, so none is missed."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        pixels = rng.integers(60, 200, (8, 9), dtype=np.uint8)
        near = pixels.copy()
        for row in rng.choice(8, size=3, replace=False):
            near[row, 0] = 255 if near[row, 0] <= near[row, 1] else 0  # turns one bit
        seen = SeenRequests()
        assert seen.is_new("What is it?", _png(pixels))
        assert not seen.is_new("What is it?", _png(near))


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_only_pixels_go_on() -> None:
    """Turned upright by what the camera wrote, which is then gone; what is transparent is white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = Image.open(io.BytesIO(screen.only_pixels(photo(1, height=96, width=128, exif=exif))))
    assert (turned.format, turned.size) == ("JPEG", (96, 128))
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert Image.open(io.BytesIO(screen.only_pixels(_png(clear)))).getpixel((0, 0)) == (255, 255, 255)
