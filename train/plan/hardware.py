"""A machine as numbers: what its data sheet says, and what is assumed beyond.

Owns `Hardware` and its rules. The numbers and their sources stand in `configs/hardware/*.yaml`, which the planner
alone reads.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pydantic

from train.config.schema import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One kind of node. Rates are of one GPU (of one rank, on CPU) unless a name or a line here says otherwise.

    Attributes:
        memory_gib, reserved_gib: what programs see, and what of it is never a tensor's.
        bf16_tflops, fp32_tflops: dense rates.
        link_gb_s: one way, between GPUs of a node. `network_gb_s`: one way, of a whole node.
        link_latency_us, network_latency_us: of one hop of a ring inside a node, between nodes.
        host_memory_gib, host_memory_gb_s, cores_per_node, disk_gb_s: of a whole node.
        host_link_gb_s: between a GPU and the host's memory.
        language_share, vision_share, attention_share: of the dense rate, what each reaches, on a GPU compiled.
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

    @property
    def usable_bytes(self) -> float:
        """Bytes of a rank that tensors can have."""
        return (self.memory_gib - self.reserved_gib) * 2**30

    def flops_per_s(self, *, half: bool) -> float:
        """The dense rate in FLOP/s; `half`: of bf16."""
        return (self.bf16_tflops if half else self.fp32_tflops) * 1e12


def check_hardware(values: dict[str, Any]) -> Hardware:
    """The hardware that a YAML describes.

    Raises:
        ConfigError: with the key, the rule and the value.
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
            raise ConfigError(f"hardware.{field.name} is a share of the dense rate, at most 1, got {value}")
    return hardware
