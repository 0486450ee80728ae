"""Estimates memory and time of a stage for any execution settings on given hardware."""

from dataclasses import dataclass, field, replace

from data_recipes.mixture.order import num_steps
from train.config.schema import PackingConfig, RunConfig
from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware
from train.plan.hours import StepTime, estimate_step_time
from train.plan.memory import Memory, Row, estimate_memory
from train.plan.model_facts import ModelFacts, is_half_precision
from train.plan.sample_lengths import Population
from train.plan.saving import Save, estimate_save
from train.plan.simulated_steps import StepRows, draw_steps, largest_row

NUM_STEPS = 12
"""Number of simulated steps; their balance differs by under 1 % from that of 200 (scripts/bench/plan.py balance)."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time with some settings.

    Attributes:
        row: the largest row, from which the memory is computed.
        time: of a step.
        save: one checkpoint.
        num_steps: of the stage.
        limit_bytes: memory of a rank that tensors can use.
        problems: sentences that say why the settings do not work; empty if they do.
    """

    settings: ExecutionSettings
    memory: Memory
    row: Row
    time: StepTime
    save: Save
    num_steps: int
    num_ranks: int
    limit_bytes: float
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def hours(self) -> float:
        """Hours of the stage, checkpoints included."""
        return self.time.total * self.num_steps / 3600

    @property
    def hours_without_overlap(self) -> float:
        """Hours of the stage if computation hides no communication."""
        return self.time.total_without_overlap * self.num_steps / 3600

    @property
    def middle_hours(self) -> float:
        """The middle of both, by which settings are compared."""
        return (self.hours + self.hours_without_overlap) / 2

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_ranks

    @property
    def gpu_hours_without_overlap(self) -> float:
        return self.hours_without_overlap * self.num_ranks


@dataclass
class StagePlanner:
    """Estimates one stage with different settings.

    The methods raise PackingError if a sample exceeds the budgets of a row.
    """

    config: RunConfig
    facts: ModelFacts
    population: Population
    hardware: Hardware
    _simulated: dict[tuple[PackingConfig, int], list[StepRows]] = field(default_factory=dict, init=False, repr=False)

    @property
    def half(self) -> bool:
        return is_half_precision(self.config, self.hardware.device)

    @property
    def num_steps(self) -> int:
        """Number of steps of the stage, limited by max_steps."""
        stage = self.config.stage
        total = num_steps(self.population.num_samples, stage.batch_size, stage.epochs)
        return min(total, self.config.max_steps or total)

    def with_network(self, network_gb_s: float) -> "StagePlanner":
        """Returns a planner with another rate of the network, which shares the simulated steps."""
        hardware = replace(self.hardware, network_gb_s=network_gb_s)
        planner = StagePlanner(self.config, self.facts, self.population, hardware)
        planner._simulated = self._simulated
        return planner

    def simulate_steps(self, packing: PackingConfig, num_ranks: int) -> list[StepRows]:
        """Returns some steps with these budgets and ranks; the result is cached."""
        key = (packing, num_ranks)
        if key not in self._simulated:
            self._simulated[key] = draw_steps(
                self.population,
                packing,
                self.facts.costs,
                num_ranks=num_ranks,
                batch_size=self.config.stage.batch_size,
                seed=self.config.seed,
                count=NUM_STEPS,
            )
        return self._simulated[key]

    def estimate_memory(self, settings: ExecutionSettings) -> tuple[Memory, Row]:
        """Returns the memory with some settings, and the row that is assumed to be the largest."""
        num_ranks = settings.nodes * self.hardware.gpus_per_node
        settings = self.with_derived_sizes(settings)
        row = largest_row(self.simulate_steps(settings.packing, num_ranks), self.population, settings.packing)
        on_gpu = self.hardware.device == "cuda"
        return estimate_memory(self.facts, settings, row, num_ranks=num_ranks, half=self.half, on_gpu=on_gpu), row

    def with_derived_sizes(self, settings: ExecutionSettings) -> ExecutionSettings:
        """Returns the settings with the sizes that a run derives from its ranks and its model."""
        num_ranks = settings.nodes * self.hardware.gpus_per_node
        return settings.with_bucket_sizes(num_ranks, self.facts.num_parameters, self.facts.num_trained)

    def estimate(self, settings: ExecutionSettings) -> Estimate:
        """Returns memory, time and problems with some settings."""
        memory, row = self.estimate_memory(settings)
        num_ranks = settings.nodes * self.hardware.gpus_per_node
        derived = self.with_derived_sizes(settings)
        save = estimate_save(self.facts, derived, self.hardware, half=self.half, used_host_bytes=memory.host)
        time = estimate_step_time(
            self.facts,
            derived,
            self.simulate_steps(settings.packing, num_ranks),
            self.hardware,
            half=self.half,
            workers=self.config.data.workers,
            save=save,
            save_every=self.config.save.every,
        )
        limit = self.hardware.usable_bytes
        return Estimate(
            settings,
            memory,
            row,
            time,
            save,
            self.num_steps,
            num_ranks,
            limit,
            tuple(self.list_problems(settings, memory)),
        )

    def list_problems(self, settings: ExecutionSettings, memory: Memory) -> list[str]:
        """Returns sentences that say why some settings do not work; empty if they do."""
        problems, hardware = [], self.hardware
        if self.half and settings.zero_stage == 0:
            problems.append("engine=zero0 keeps no fp32 copy of bf16 weights, so a run rejects it")
        if memory.total > hardware.usable_bytes:
            moment = {
                "backward": "in the backward pass",
                "reduce": "at the end of the backward pass",
                "step": "in the optimizer's step",
            }
            problems.append(
                f"{memory.total / 2**30:.1f} GiB per rank are needed {moment[memory.peak]}, "
                f"{hardware.usable_bytes / 2**30:.1f} are available"
            )
        needed_gib, available_gib = memory.host / 2**30, hardware.host_memory_gib * 0.9
        if hardware.device == "cuda" and needed_gib > available_gib:
            problems.append(
                f"{needed_gib:.0f} GiB of host memory per node are needed, {available_gib:.0f} are available"
            )
        return problems
