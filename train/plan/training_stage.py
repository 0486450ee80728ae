"""One stage from its configuration to its plan.

Owns the order: shapes, samples, what was asked, the same under every ZeRO stage, advice.
"""

from train.config.schema import RunConfig
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.hardware import Hardware
from train.plan.model_facts import model_facts, read_architecture
from train.plan.plan_text import StagePlan
from train.plan.sample_lengths import population_of
from train.plan.setting import setting_of


def plan_stage(
    config: RunConfig, hardware: Hardware, nodes: int, *, num_samples: int | None = None, config_dir: str | None = None
) -> StagePlan:
    """The plan of a checked configuration. See `population_of` for the options.

    Raises:
        ModelError, DataError, ConfigError, PackingError: as the run would.
    """
    architecture = read_architecture(config.model)
    architecture.check_length(config.stage.max_length)
    population = population_of(config, architecture, num_samples=num_samples, config_dir=config_dir)
    planner = StagePlanner(config, model_facts(architecture, config), population, hardware)
    setting = setting_of(config, nodes)
    asked = planner.estimate(setting)
    variants = {}
    for stage in range(4):
        changed = setting if stage == setting.zero_stage else setting.with_zero(stage)
        variants[f"zero{stage}" + (" *" if changed is setting else "")] = planner.estimate(changed)
    for stage in (2, 3):
        if hardware.device == "cuda":
            variants[f"zero{stage} offload"] = planner.estimate(setting.with_zero(stage, offload=True))
    return StagePlan(planner, asked, variants, advise(planner, asked))
