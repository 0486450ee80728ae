"""Dense bf16 rates of GPUs, from their data sheets: what MFU is a share of.

Owns the table. The planner's hardware files have the same numbers beside what else it needs.
"""

DENSE_BF16_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("RTX 4090", 165.0),
)
"""The first whose name is in the device's is meant. TFLOP/s without sparsity, half of what is often printed."""


def peak_tflops(device_name: str) -> float | None:
    """The data sheet's dense bf16 rate; None for a device that the table lacks."""
    return next((rate for name, rate in DENSE_BF16_TFLOPS if name in device_name), None)
