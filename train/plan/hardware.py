"""The properties of one kind of node, from its data sheet and from assumptions.

The values and their sources are in `configs/hardware/*.yaml`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pydantic

from train.config.schema import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One kind of node. Values are per GPU (per rank on a CPU) unless stated otherwise.

    Attributes:
        device_name: part of the name that CUDA reports, by which a run finds its peak rate; may be empty.
        memory_gib: memory that programs see.
        reserved_gib: part of it that tensors cannot use.
        bf16_tflops, fp32_tflops: dense rates.
        memory_gb_s: memory bandwidth.
        link_gb_s: bandwidth in one direction between GPUs of a node.
        network_gb_s: bandwidth in one direction of a whole node.
        link_latency_us, network_latency_us: of one hop of a ring inside a node and between nodes.
        host_memory_gib, host_memory_gb_s, cores_per_node, disk_gb_s: of a whole node.
        host_link_gb_s: bandwidth between a GPU and the host's memory.
        language_share, vision_share, attention_share: fraction of the dense rate that each reaches, on a GPU compiled.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    device: Literal["cuda", "cpu"]
    memory_gib: float
    reserved_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    link_latency_us: float
    network_latency_us: float
    gpus_per_node: int
    cores_per_node: int
    host_memory_gib: float
    host_memory_gb_s: float
    host_link_gb_s: float
    disk_gb_s: float
    language_share: float
    vision_share: float
    attention_share: float
    device_name: str = ""

    @property
    def usable_bytes(self) -> float:
        """Memory of a rank that tensors can use, in bytes."""
        return (self.memory_gib - self.reserved_gib) * 2**30

    def flops_per_s(self, *, half: bool) -> float:
        """Returns the dense rate in FLOP/s, of bf16 if `half`, else of fp32."""
        return (self.bf16_tflops if half else self.fp32_tflops) * 1e12


def check_hardware(values: dict[str, Any]) -> Hardware:
    """Validates the content of a hardware file.

    Raises:
        ConfigError: a value is invalid; the message has the key, the rule and the value.
    """
    try:
        hardware = pydantic.TypeAdapter(Hardware).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        rule = first["msg"][0].lower() + first["msg"][1:]
        known = ", ".join(field.name for field in fields(Hardware))
        raise ConfigError(f"hardware.{key}: {rule}, got {first['input']!r}; the keys are {known}") from error
    for field in fields(Hardware):
        value = getattr(hardware, field.name)
        least = 0.0 if field.name == "reserved_gib" or field.name.endswith("_latency_us") else 1e-9
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise ConfigError(f"hardware.{field.name} must be above 0 and finite, got {value}")
        if field.name.endswith("_share") and value > 1:
            raise ConfigError(
                f"hardware.{field.name} is a fraction of the dense rate and must be at most 1, got {value}"
            )
    return hardware
