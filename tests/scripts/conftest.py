"""Imports of the programs of scripts/bench, whose modules import each other as neighbours."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(scope="session")
def bench() -> Iterator[Callable[[str], Any]]:
    """Imports a module of scripts/bench by its name, such as `training_step.job`."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path.remove(str(BENCH))
