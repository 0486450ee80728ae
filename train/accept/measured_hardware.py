"""The measured machine as a file of `configs/hardware/`, for the planner.

Keys that were measured replace those of a base file; which file that is, and which keys were measured, is written into
the comments. Rates are divided by the share of a link's rate that the planner reckons with, so that it computes with
what was measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from train.config.schema import CONFIG_DIR, ConfigError
from train.observability.rates import peak_tflops
from train.plan.hardware import check_hardware
from train.plan.hours import LINK_SHARE


def base_hardware(name: str | None, device_name: str, memory_gib: float) -> str:
    """The file whose numbers stand where nothing is measured: the one that is named, or the device's.

    Args:
        device_name: "CPU", or as CUDA reports it.

    Raises:
        ConfigError: there is no such file, or none is this device's.
    """
    folder = CONFIG_DIR / "hardware"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name is not None:
        if name not in known:
            raise ConfigError(f"--hardware-base: there is no {folder / name}.yaml; name one of {', '.join(known)}")
        return name
    for candidate in known:
        values = yaml.safe_load((folder / f"{candidate}.yaml").read_text())
        if device_name == "CPU" and values["device"] == "cpu":
            return candidate
        same_memory = abs(values["memory_gib"] / max(memory_gib, 1e-9) - 1) < 0.05
        if values["device"] == "cuda" and same_memory and values["bf16_tflops"] == peak_tflops(device_name):
            return candidate
    raise ConfigError(
        f"--hardware-base has no value, and no file of {folder} is of a {device_name} with {memory_gib:.1f} GiB; name "
        f"the most similar of {', '.join(known)}: it gives the rates and sizes that are not measured"
    )


def measured_keys(links: Mapping[str, Any]) -> dict[str, float]:
    """Rates and latencies of `interconnect.py`, under the planner's keys.

    The planner passes a ring over all ranks through every host, so that the network's rate is that of the ring: the
    bytes that pass through one rank's link one way.
    """
    groups = links["groups"]
    keys: dict[str, float] = {}
    if "one_host" in groups:
        inside = groups["one_host"]
        keys |= {"link_gb_s": _rate_gb_s(inside) / LINK_SHARE, "link_latency_us": inside["latency_us"]}
    if links["num_hosts"] > 1:
        whole, num_hosts = groups["all_ranks"], links["num_hosts"]
        hops = whole["num_ranks"] - 1
        inside_us = max(0, hops - num_hosts) * keys.get("link_latency_us", 0.0)
        keys["network_gb_s"] = _rate_gb_s(whole) / LINK_SHARE
        keys["network_latency_us"] = max(0.0, whole["latency_us"] * hops - inside_us) / min(num_hosts, hops)
    return {key: float(f"{value:.4g}") for key, value in keys.items()}


def _rate_gb_s(group: Mapping[str, Any]) -> float:
    """The rate of the largest message, of the slower collective."""
    return min(float(group[name][-1]["gb_s"]) for name in ("all_gather", "reduce_scatter"))


def write_hardware(path: Path, base: str, measured: Mapping[str, float], about: str) -> None:
    """Writes the file; its name is the planner's `hardware=NAME`.

    Args:
        measured: replaces keys of the base file.
        about: one line: what was measured, where and when.

    Raises:
        ConfigError: a measured value that the planner refuses.
    """
    values = yaml.safe_load((CONFIG_DIR / "hardware" / f"{base}.yaml").read_text())
    values |= dict(measured) | {"name": path.stem}
    check_hardware(values)
    lines = [
        f"# {about}",
        f"# Not measured, and taken from configs/hardware/{base}.yaml: every key without a remark.",
    ]
    rates = ("link_gb_s", "network_gb_s")
    for key, value in values.items():
        remark = ""
        if key in measured:
            remark = f"   # measured, over the planner's share of {LINK_SHARE}" if key in rates else "   # measured"
        lines.append(yaml.safe_dump({key: value}).strip() + remark)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
