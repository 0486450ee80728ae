"""Writes the measurements as a file in the format of `configs/hardware/`, for the planner.

Measured values replace those of a base file; comments name the base file and the measured keys. The planner multiplies
link rates by `LINK_SHARE`, so measured rates are divided by it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.hardware_files import matching_files
from train.config.schema import ConfigError
from train.plan.communication import LINK_SHARE
from train.plan.hardware import check_hardware


def select_base_hardware(name: str | None, device_name: str, memory_gib: float) -> str:
    """Returns the name of the hardware file for values that are not measured: `name`, or that of the device.

    Args:
        device_name: "CPU", or the name that CUDA reports.

    Raises:
        ConfigError: there is no such file, or none for this device.
    """
    folder = CONFIG_DIR / "hardware"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name is not None:
        if name not in known:
            raise ConfigError(f"--hardware-base: there is no {folder / name}.yaml; give one of {', '.join(known)}")
        return name
    for candidate in known:
        values = yaml.safe_load((folder / f"{candidate}.yaml").read_text())
        if device_name == "CPU" and values["device"] == "cpu":
            return candidate
        has_same_memory = abs(values["memory_gib"] / max(memory_gib, 1e-9) - 1) < 0.05
        if has_same_memory and folder / f"{candidate}.yaml" in matching_files(device_name):
            return candidate
    raise ConfigError(
        f"--hardware-base has no value, and {folder} has no file for a {device_name} with {memory_gib:.1f} GiB; give "
        f"the most similar of {', '.join(known)} for the values that are not measured"
    )


def convert_links(links: Mapping[str, Any]) -> dict[str, float]:
    """Converts the results of `interconnect` to keys of the planner.

    The planner models a ring over all ranks that passes every host once, so the rate of the network is that of the
    ring: the rate of one rank's link in one direction.
    """
    groups = links["groups"]
    keys: dict[str, float] = {}
    if "one_host" in groups:
        one_host = groups["one_host"]
        keys |= {"link_gb_s": _get_rate_gb_s(one_host) / LINK_SHARE, "link_latency_us": one_host["latency_us"]}
    if links["num_hosts"] > 1:
        all_ranks, num_hosts = groups["all_ranks"], links["num_hosts"]
        hops = all_ranks["num_ranks"] - 1
        link_us = max(0, hops - num_hosts) * keys.get("link_latency_us", 0.0)
        keys["network_gb_s"] = _get_rate_gb_s(all_ranks) / LINK_SHARE
        keys["network_latency_us"] = max(0.0, all_ranks["latency_us"] * hops - link_us) / min(num_hosts, hops)
    return {key: float(f"{value:.4g}") for key, value in keys.items()}


def _get_rate_gb_s(group: Mapping[str, Any]) -> float:
    """Returns the rate of the slower collective with the largest message."""
    return min(float(group[name][-1]["gb_s"]) for name in ("all_gather", "reduce_scatter"))


def write_hardware(path: Path, base: str, measured: Mapping[str, float], description: str) -> None:
    """Writes a hardware file, whose name is NAME of the planner's `hardware=NAME`.

    Args:
        measured: values that replace those of the base file.
        description: one line that says what was measured, where and when.

    Raises:
        ConfigError: a measured value is invalid.
    """
    values = yaml.safe_load((CONFIG_DIR / "hardware" / f"{base}.yaml").read_text())
    values |= dict(measured) | {"name": path.stem}
    check_hardware(values)
    lines = [
        f"# {description}",
        f"# Keys without a comment were not measured; their values are those of configs/hardware/{base}.yaml.",
    ]
    rates = ("link_gb_s", "network_gb_s")
    for key, value in values.items():
        comment = ""
        if key in measured:
            comment = (
                f"   # measured, divided by the planner's LINK_SHARE {LINK_SHARE}" if key in rates else "   # measured"
            )
        lines.append(yaml.safe_dump({key: value}).strip() + comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
