"""The peak rate of a GPU, looked up in `configs/hardware/*.yaml` by the name that CUDA reports.

MFU is a share of that rate. The planner reads the same files as a whole (`train/plan/hardware.py`).
"""

from pathlib import Path
from typing import Any

import yaml

from data_recipes.schema.config_dir import CONFIG_DIR

HARDWARE_DIR = CONFIG_DIR / "hardware"


def read_hardware_file(path: Path) -> dict[str, Any]:
    """The keys of a hardware file, not validated."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def matching_files(device_name: str) -> list[Path]:
    """The hardware files of a GPU, sorted by name; empty if there is none.

    A file matches if its `device_name` occurs in the reported name. Files with the longest match are returned, so that
    an H100 PCIe does not get the numbers of an H100 SXM.

    Args:
        device_name: as `torch.cuda.get_device_name` reports it, for example "NVIDIA H100 80GB HBM3".
    """
    matches = {path: known_name(path) for path in sorted(HARDWARE_DIR.glob("*.yaml"))}
    matches = {path: name for path, name in matches.items() if name and name in device_name}
    longest = max(map(len, matches.values()), default=0)
    return [path for path, name in matches.items() if len(name) == longest]


def known_name(path: Path) -> str:
    """The part of a reported name by which a hardware file is chosen; empty if it is chosen by name only."""
    return str(read_hardware_file(path).get("device_name", ""))


def peak_bf16_tflops(device_name: str) -> float | None:
    """The dense bf16 rate of the data sheet, in TFLOP/s without sparsity; None if no file matches the device."""
    files = matching_files(device_name)
    return float(read_hardware_file(files[0])["bf16_tflops"]) if files else None
