"""Owns what the marks mean; fixtures live beside the tests that use them.

`full` is left out by default (pyproject.toml) and asked for by `scripts/test.sh full`. `gpu` is
skipped here, with a reason, where there is no CUDA device.
"""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; torch is imported only if a test asks for one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
