"""What of a run may change without changing what is learned: the knobs that the planner turns.

Owns `Setting` and how it is written on a command line. What each costs is `memory.py`'s and `hours.py`'s.
"""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from train.config.schema import CONFIG_DIR, PackingConfig, RunConfig

BUCKET = 500_000_000
"""DeepSpeed's default reduce bucket, in elements (runtime/zero/config.py)."""
LIVE_PARAMETERS = 1_000_000_000
"""Its default of stage3_max_live_parameters and of sub_group_size."""


@dataclass(frozen=True)
class Setting:
    """How a stage is laid on machines.

    Attributes:
        engine: DeepSpeed's dictionary, as in configs/engine.
        recompute: parts whose blocks run again in the backward pass.
        packing: budgets of a row.
        nodes: how many of them.
        compile: parts whose blocks torch.compile translates.
        attention, elementwise: kernels, as in configs/train.yaml.
    """

    engine: dict[str, Any]
    recompute: tuple[str, ...]
    packing: PackingConfig
    nodes: int
    compile: tuple[str, ...] = ()
    attention: str = "auto"
    elementwise: str = "auto"

    @property
    def zero(self) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.get("zero_optimization", {})
        return found

    @property
    def zero_stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        return _device(self.zero, "offload_optimizer") != "none" and self.zero_stage > 0

    @property
    def offloads_parameters(self) -> bool:
        return _device(self.zero, "offload_param") != "none" and self.zero_stage == 3

    @property
    def reduce_bucket(self) -> int:
        """Elements."""
        return int(self.zero.get("reduce_bucket_size", BUCKET))

    @property
    def live_parameters(self) -> int:
        """Elements that ZeRO-3 keeps whole at a time, at most."""
        return int(self.zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))

    @property
    def overlaps(self) -> bool:
        """Whether reducing runs beside the backward pass (DeepSpeed's default for stage 3 is yes)."""
        return bool(self.zero.get("overlap_comm", self.zero_stage == 3))

    def with_zero(self, stage: int, *, offload: bool = False) -> "Setting":
        """The same with `engine=zeroN`, and the optimizer on the host where asked."""
        engine: dict[str, Any] = yaml.safe_load((CONFIG_DIR / "engine" / f"zero{stage}.yaml").read_text())
        if offload:
            engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return replace(self, engine=engine)

    def with_row(self, max_tokens: int, max_tiles: int) -> "Setting":
        """The same with other budgets of a row."""
        return replace(self, packing=PackingConfig(max_tokens, max_tiles))

    def words(self, before: "Setting") -> tuple[str, ...]:
        """What to put on the command line to come from `before` to this."""
        words = []
        if self.engine != before.engine:
            words.append(f"engine=zero{self.zero_stage}")
            if self.offloads_optimizer:
                words.append("+engine.zero_optimization.offload_optimizer.device=cpu")
        if self.recompute != before.recompute:
            words.append(f"recompute=[{','.join(self.recompute)}]")
        if self.compile != before.compile:
            words.append(f"compile=[{','.join(self.compile)}]")
        if self.packing.max_tokens != before.packing.max_tokens:
            words.append(f"packing.max_tokens={self.packing.max_tokens}")
        if self.packing.max_tiles != before.packing.max_tiles:
            words.append(f"packing.max_tiles={self.packing.max_tiles}")
        if self.nodes != before.nodes:
            words.append(f"nodes={self.nodes}")
        return tuple(words)


def setting_of(config: RunConfig, nodes: int) -> Setting:
    """The setting that a configuration asks for."""
    kernels = (config.attention, config.elementwise)
    return Setting(config.engine, tuple(config.recompute), config.packing, nodes, tuple(config.compile), *kernels)


def _device(zero: dict[str, Any], key: str) -> str:
    found = zero.get(key) or {}
    return str(found.get("device", "none"))
