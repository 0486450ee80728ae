"""The benchmark of saves: both ways run at every interval, and their numbers are of the saves that were due."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer


@pytest.mark.full
def test_both_ways_are_measured(bench: Callable[[str], Any], tmp_path: Path) -> None:
    """Every save of both ways has its times; a background save has a copy and a blocking one has none."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", "metaspace")
    arguments = ["--tokenizer", str(tokenizer), "--steps", "4", "--out", str(tmp_path)]
    assert bench("save").main(["--tiny", "--every", "1", "3", *arguments]) in (0, 1)  # the limit is for a quiet machine
    results = json.loads((tmp_path / "save.json").read_text())["results"]
    assert results["losses_equal"]
    for name, values in results["cases"].items():
        assert values["saves"] == {"1": 4, "3": 2}[name[-1]]
        assert (values["copy_s"] > 0) is name.startswith("background")
        assert values["stall_s"] >= values["copy_s"] + values["waited_s"]
        assert len(values["times"]["written_s"]) == values["saves"]
        assert values["save_gb"] > 0
