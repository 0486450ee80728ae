"""The settings that determine memory and time but change nothing that is learned; the planner varies them."""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.schema import PackingConfig, RunConfig
from train.engine.bucket_sizes import bucket_elements
from train.engine.node_sharding import ranks_per_copy

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters and of sub_group_size, in elements."""


@dataclass(frozen=True)
class ExecutionSettings:
    """How a stage is executed.

    Attributes:
        engine: DeepSpeed's configuration, as in configs/engine.
        recompute: parts whose blocks are recomputed in the backward pass.
        packing: budgets of a row.
        nodes: number of nodes.
        compile: parts whose blocks are compiled with torch.compile.
    """

    engine: dict[str, Any]
    recompute: tuple[str, ...]
    packing: PackingConfig
    nodes: int
    compile: tuple[str, ...] = ()

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        options: dict[str, Any] = self.engine.get("zero_optimization", {})
        return options

    @property
    def zero_stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        return _offload_device(self.zero, "offload_optimizer") != "none" and self.zero_stage > 0

    @property
    def offloads_parameters(self) -> bool:
        return _offload_device(self.zero, "offload_param") != "none" and self.zero_stage == 3

    def reduce_bucket(self, num_ranks: int, num_trained: int) -> int:
        """Size of the reduce bucket, in elements; at most what is trained."""
        size: int | None = self.zero.get("reduce_bucket_size")
        return bucket_elements(num_ranks, num_trained) if size is None else min(size, num_trained)

    def ranks_per_copy(self, num_ranks: int) -> int:
        """Ranks that share a copy of the weights besides ZeRO-3's partition; 1: there is no such copy."""
        return ranks_per_copy(self.zero, num_ranks=num_ranks, ranks_per_node=-(-num_ranks // self.nodes))

    @property
    def live_parameters(self) -> int:
        """Maximum number of elements that ZeRO-3 keeps gathered at a time."""
        return int(self.zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))

    @property
    def overlaps(self) -> bool:
        """Whether gradient reduction overlaps with the backward pass (DeepSpeed's default at stage 3)."""
        return bool(self.zero.get("overlap_comm", self.zero_stage == 3))

    def with_zero(self, stage: int, *, offload: bool = False) -> "ExecutionSettings":
        """Returns a copy with `engine=zeroN` and, with `offload`, the optimizer on the host."""
        engine: dict[str, Any] = yaml.safe_load((CONFIG_DIR / "engine" / f"zero{stage}.yaml").read_text())
        if offload:
            engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return replace(self, engine=engine)

    def with_row(self, max_tokens: int, max_tiles: int) -> "ExecutionSettings":
        """Returns a copy with other budgets of a row."""
        return replace(self, packing=PackingConfig(max_tokens, max_tiles))

    def list_overrides(self, base: "ExecutionSettings") -> tuple[str, ...]:
        """Returns the command line overrides that change `base` to these settings."""
        overrides = []
        if self.engine != base.engine:
            overrides.append(f"engine=zero{self.zero_stage}")
            if self.offloads_optimizer:
                overrides.append("+engine.zero_optimization.offload_optimizer.device=cpu")
        if self.recompute != base.recompute:
            overrides.append(f"recompute=[{','.join(self.recompute)}]")
        if self.compile != base.compile:
            overrides.append(f"compile=[{','.join(self.compile)}]")
        if self.packing.max_tokens != base.packing.max_tokens:
            overrides.append(f"packing.max_tokens={self.packing.max_tokens}")
        if self.packing.max_tiles != base.packing.max_tiles:
            overrides.append(f"packing.max_tiles={self.packing.max_tiles}")
        if self.nodes != base.nodes:
            overrides.append(f"nodes={self.nodes}")
        return tuple(overrides)


def read_settings(config: RunConfig, nodes: int) -> ExecutionSettings:
    """Returns the settings of a configuration."""
    return ExecutionSettings(config.engine, tuple(config.recompute), config.packing, nodes, tuple(config.compile))


def _offload_device(zero: dict[str, Any], key: str) -> str:
    options = zero.get(key) or {}
    return str(options.get("device", "none"))
