"""The settings that determine memory and time but change nothing that is learned; the planner varies them."""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from data_recipes.schema.config_dir import CONFIG_DIR
from train.config.schema import PackingConfig, RunConfig
from train.engine.bucket_sizes import with_bucket_sizes
from train.engine.node_sharding import KEY, ranks_per_copy

REDUCE_BUCKET_SIZE = 500_000_000
"""DeepSpeed's default of reduce_bucket_size, in elements (runtime/zero/config.py)."""
REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default of stage3_max_reuse_distance, in elements."""
PREFETCH_BUCKET_SIZE = 50_000_000
"""DeepSpeed's default of stage3_prefetch_bucket_size, in elements."""
PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's default of stage3_param_persistence_threshold, in elements."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters and of sub_group_size, in elements."""
_REDUCE_TYPE = "communication_data_type"
"""DeepSpeed's key for the data type in which gradients are reduced over the ranks."""


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

    @property
    def reduce_bucket(self) -> int:
        """Size of the reduce bucket, in elements."""
        return int(self.zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))

    @property
    def live_parameters(self) -> int:
        """Maximum number of elements that ZeRO-3 keeps gathered at a time."""
        return int(self.zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))

    @property
    def prefetch_bucket(self) -> int:
        """Size of the bucket that ZeRO-3 gathers ahead, in elements."""
        return int(self.zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET_SIZE))

    @property
    def persistence_threshold(self) -> int:
        """Elements of the largest tensor that ZeRO-3 does not partition."""
        return int(self.zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))

    @property
    def reuse_distance(self) -> int:
        """Elements within which ZeRO-3 keeps weights that are used again."""
        return int(self.zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient's element while it is reduced over the ranks."""
        return 2 if self.engine.get(_REDUCE_TYPE, "fp32") == "bf16" else 4

    def ranks_per_copy(self, num_ranks: int) -> int:
        """Returns the ranks that share a copy of the weights besides ZeRO-3's partition; 1: there is no such copy."""
        return ranks_per_copy(self.zero, num_ranks=num_ranks, ranks_per_node=-(-num_ranks // self.nodes))

    @property
    def overlaps(self) -> bool:
        """Whether gradient reduction overlaps with the backward pass (DeepSpeed's default at stage 3)."""
        return bool(self.zero.get("overlap_comm", self.zero_stage == 3))

    @property
    def engine_name(self) -> str:
        """Name of the file in configs/engine."""
        return f"zero{self.zero_stage}" + ("_node" if KEY in self.zero else "")

    def with_engine(self, name: str, *, offload: bool = False) -> "ExecutionSettings":
        """Returns a copy with `engine=NAME` and, with `offload`, the optimizer on the host.

        The data type in which gradients are reduced is kept, since it changes what is learned.
        """
        engine: dict[str, Any] = yaml.safe_load((CONFIG_DIR / "engine" / f"{name}.yaml").read_text())
        if offload:
            engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if _REDUCE_TYPE in self.engine:
            engine[_REDUCE_TYPE] = self.engine[_REDUCE_TYPE]
        return replace(self, engine=engine)

    def with_bucket_sizes(self, num_ranks: int, num_parameters: int, num_trained: int) -> "ExecutionSettings":
        """Returns a copy with the bucket sizes that a run derives (train/engine/bucket_sizes.py)."""
        zero = with_bucket_sizes(self.zero, num_ranks=num_ranks, num_parameters=num_parameters, num_trained=num_trained)
        return replace(self, engine={**self.engine, "zero_optimization": zero})

    def with_row(self, max_tokens: int, max_tiles: int) -> "ExecutionSettings":
        """Returns a copy with other budgets of a row."""
        return replace(self, packing=PackingConfig(max_tokens, max_tiles))

    def list_overrides(self, base: "ExecutionSettings") -> tuple[str, ...]:
        """Returns the command line overrides that change `base` to these settings."""
        overrides = []
        if self.engine != base.engine:
            overrides.append(f"engine={self.engine_name}")
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
