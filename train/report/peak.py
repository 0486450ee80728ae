"""The dense rate of the card that a run was made on, for MFU.

Owns the match between a device's name and the data sheets in `configs/hardware/`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from train.config import CONFIG_DIR
from train.report.folder import Run

_OTHER_FORMS = ("pcie", "nvl")
"""Cards of the same name with other rates than the sheets'."""


@dataclass(frozen=True)
class Peak:
    """A dense rate, and the data sheet that it is from."""

    tflops: float
    sheet: str


def peak_of(run: Run) -> Peak | None:
    """Of the run's last start. None where its device is not recorded, is a CPU, or has no data sheet here."""
    device = str(run.last_start.get("device") or "").replace(" ", "").lower()
    if any(form in device for form in _OTHER_FORMS):
        return None
    is_half = run.last_start.get("dtype") == "bfloat16"
    for sheet in _sheets():
        card = str(sheet["name"]).partition("_")[0]
        if sheet["device"] == "cuda" and card in device:
            return Peak(float(sheet["bf16_tflops" if is_half else "fp32_tflops"]), str(sheet["name"]))
    return None


@cache
def _sheets() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((CONFIG_DIR / "hardware").glob("*.yaml"))]
