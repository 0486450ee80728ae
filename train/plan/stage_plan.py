"""Plans one stage: the requested settings, the same with every ZeRO stage, and advice."""

from train.config.schema import RunConfig
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware
from train.plan.model_facts import count_model, read_architecture
from train.plan.plan_text import StagePlan
from train.plan.sample_lengths import load_population


def plan_stage(
    config: RunConfig, hardware: Hardware, nodes: int, *, num_samples: int | None = None, config_dir: str | None = None
) -> StagePlan:
    """Returns the plan of a validated configuration. See `load_population` for `num_samples` and `config_dir`.

    Raises:
        ModelError, DataError, ConfigError, PackingError: as in the run.
    """
    architecture = read_architecture(config.model)
    architecture.check_length(config.stage.max_length)
    population = load_population(config, architecture, num_samples=num_samples, config_dir=config_dir)
    planner = StagePlanner(config, count_model(architecture, config), population, hardware)
    settings = read_settings(config, nodes)
    requested = planner.estimate(settings)
    variants = {}
    for stage in range(4):
        changed = settings if stage == settings.zero_stage else settings.with_zero(stage)
        variants[f"zero{stage}" + (" *" if changed is settings else "")] = planner.estimate(changed)
    for stage in (2, 3):
        if hardware.device == "cuda":
            variants[f"zero{stage} offload"] = planner.estimate(settings.with_zero(stage, offload=True))
    return StagePlan(planner, requested, variants, advise(planner, requested))
