"""A stage on a machine: any setting → does it fit, and how long does it take.

Owns `StagePlanner`, which knows the model, the samples and the hardware and deals rows once for each budget and
number of ranks; and `Estimate`, its answer to one setting.
"""

from dataclasses import dataclass, field

from data_recipes.mixture.order import num_steps
from train.config.schema import PackingConfig, RunConfig
from train.plan.hardware import Hardware
from train.plan.hours import StepTime, step_time
from train.plan.memory import Memory, Row, memory_of
from train.plan.model_facts import ModelFacts, half_precision
from train.plan.rows import StepRows, draw_steps, largest_row
from train.plan.sample_lengths import Population
from train.plan.setting import Setting

NUM_STEPS = 12
"""Steps that are dealt; their balance differs by less than 1 % from that of 200 (scripts/bench/balance.py)."""


@dataclass(frozen=True)
class Estimate:
    """What one setting costs.

    Attributes:
        why_not: sentences, empty where it fits.
        hours: of the stage, with its checkpoints.
    """

    setting: Setting
    memory: Memory
    row: Row
    time: StepTime
    num_steps: int
    num_ranks: int
    limit_bytes: float
    why_not: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def hours(self) -> float:
        return self.time.total * self.num_steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_ranks


@dataclass
class StagePlanner:
    """Estimates settings of one stage. Errors are `packing.deal`'s: a sample that is longer than a row."""

    config: RunConfig
    facts: ModelFacts
    population: Population
    hardware: Hardware
    _dealt: dict[tuple[PackingConfig, int], list[StepRows]] = field(default_factory=dict, init=False, repr=False)

    @property
    def half(self) -> bool:
        return half_precision(self.config, self.hardware.device)

    @property
    def num_steps(self) -> int:
        """Of the stage, or of max_steps where that ends it."""
        stage = self.config.stage
        whole = num_steps(self.population.num_samples, stage.batch_size, stage.epochs)
        return min(whole, self.config.max_steps or whole)

    def steps(self, packing: PackingConfig, num_ranks: int) -> list[StepRows]:
        """Some steps, dealt for these budgets and ranks."""
        key = (packing, num_ranks)
        if key not in self._dealt:
            self._dealt[key] = draw_steps(
                self.population,
                packing,
                self.facts.costs,
                num_ranks=num_ranks,
                batch_size=self.config.stage.batch_size,
                seed=self.config.seed,
                count=NUM_STEPS,
            )
        return self._dealt[key]

    def memory(self, setting: Setting) -> tuple[Memory, Row]:
        """What the setting holds, and the row that was taken for the largest."""
        num_ranks = setting.nodes * self.hardware.gpus_per_node
        row = largest_row(self.steps(setting.packing, num_ranks), self.population, setting.packing)
        on_gpu = self.hardware.device == "cuda"
        return memory_of(self.facts, setting, row, num_ranks=num_ranks, half=self.half, on_gpu=on_gpu), row

    def estimate(self, setting: Setting) -> Estimate:
        """Memory, time and whether it fits."""
        memory, row = self.memory(setting)
        num_ranks = setting.nodes * self.hardware.gpus_per_node
        time = step_time(
            self.facts,
            setting,
            self.steps(setting.packing, num_ranks),
            self.hardware,
            half=self.half,
            workers=self.config.data.workers,
            save_every=self.config.save.every,
        )
        limit = self.hardware.usable_bytes
        return Estimate(
            setting, memory, row, time, self.num_steps, num_ranks, limit, tuple(self.why_not(setting, memory))
        )

    def why_not(self, setting: Setting, memory: Memory) -> list[str]:
        """Every reason why a setting cannot run, with numbers."""
        reasons, hardware = [], self.hardware
        if self.half and setting.zero_stage == 0:
            reasons.append("engine=zero0 keeps no fp32 weights beside bf16 ones; the run refuses it")
        if memory.total > hardware.usable_bytes:
            moment = {
                "backward": "in the backward pass",
                "reduce": "at the end of the backward pass",
                "step": "in the optimizer's step",
            }
            reasons.append(
                f"{memory.total / 2**30:.1f} GiB a rank {moment[memory.peak]}, {hardware.usable_bytes / 2**30:.1f} "
                "are available"
            )
        on_host, has = memory.host / 2**30, hardware.host_memory_gib * 0.9
        if hardware.device == "cuda" and on_host > has:
            reasons.append(f"{on_host:.0f} GiB of the host's memory on a node, {has:.0f} of it are available")
        return reasons
