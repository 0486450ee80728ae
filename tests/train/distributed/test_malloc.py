"""What is freed stays with the process on a CPU, unless the environment has its own settings."""

import os
import subprocess
import sys

import pytest

FREES_BLOCKS = """
import torch
from train.distributed.malloc import keep_freed_memory

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
before = resident_mib()
blocks = [torch.ones(8 << 20) for _ in range(8)]
held = resident_mib()
del blocks
print(held - before, resident_mib() - before)
"""


@pytest.mark.parametrize(
    ("settings", "is_kept"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, False)],
)
def test_freed_memory_is_kept(settings: dict[str, str], is_kept: bool) -> None:
    """A quarter of a GiB in eight blocks, freed: still resident, or given back where the user has a say of his own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FREES_BLOCKS]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=env | settings).stdout
    held, left = map(float, output.split())
    assert held == pytest.approx(256, abs=10)
    assert left > 240 if is_kept else left < 16
