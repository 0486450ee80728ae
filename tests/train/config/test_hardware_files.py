"""The peak rate of a GPU is the one of its hardware file."""

import pytest

from train.config.hardware_files import HARDWARE_DIR, matching_files, peak_bf16_tflops, read_hardware_file


@pytest.mark.parametrize(
    ("device_name", "tflops", "files"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, ["h100_80g"]),
        ("NVIDIA H100 PCIe", 756.0, ["h100_pcie_80g"]),
        ("NVIDIA H100 NVL", 835.0, ["h100_nvl_94g"]),
        ("NVIDIA H200", 989.0, ["h200_141g"]),
        ("NVIDIA A100-SXM4-80GB", 312.0, ["a100_40g", "a100_80g"]),
        ("NVIDIA GeForce RTX 4090", 165.2, ["rtx4090_24g"]),
        ("NVIDIA T4", None, []),
        ("", None, []),
    ],
)
def test_the_longest_matching_name_counts(device_name: str, tflops: float | None, files: list[str]) -> None:
    """Variants of one card have rates of their own; a card without a file has no rate."""
    assert peak_bf16_tflops(device_name) == tflops
    assert [path.stem for path in matching_files(device_name)] == files


def test_files_of_one_card_agree_on_its_rate() -> None:
    """Sizes of memory share a name, so any of the files may be read. Only the CPU's file has no name."""
    rates: dict[str, set[float]] = {}
    for path in HARDWARE_DIR.glob("*.yaml"):
        values = read_hardware_file(path)
        rates.setdefault(values.get("device_name", ""), set()).add(values["bf16_tflops"])
        assert ("device_name" in values) == (values["device"] == "cuda")
    assert all(len(of_card) == 1 for of_card in rates.values())
