"""Tests that the table of pairs in docs/backbones.md is made from the records of the tests that ran them."""

import json

from tests.house.pages import DOCS
from tests.train.pair_results import RECORDS, format_table
from tests.train.test_shipped_backbones import PAIRS


def test_the_page_has_the_table() -> None:
    """Every pair of the tests is in it, with what they saw."""
    pairs = json.loads(RECORDS.read_text())
    assert f"\n\n{format_table(pairs)}\n\n" in (DOCS / "backbones.md").read_text()
    recorded = {
        (p["language_model"], p["vision_tower"], f"zero{p['zero_stages'][1]}", ",".join(p["recompute"])) for p in pairs
    }
    assert recorded == set(PAIRS)
    assert all(pair["packed_difference"] <= 2e-6 for pair in pairs)
