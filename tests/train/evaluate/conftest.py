"""Fixtures of the tests of train/evaluate/."""

import pytest

from tests.train.evaluate.learned import Learned, learn


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """An export that has learned three of four answers."""
    return learn(tmp_path_factory.mktemp("learned"))
