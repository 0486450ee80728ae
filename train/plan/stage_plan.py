"""Plans one stage: the requested settings, the same with every ZeRO stage, and advice."""

from train.config.schema import RunConfig
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware
from train.plan.model_facts import count_model, read_architecture
from train.plan.plan_text import StagePlan
from train.plan.sample_lengths import load_population

NETWORK_RATES = (12.5, 25.0, 50.0, 200.0)
"""GB/s per node in one direction: one, two and four ports of 100 Gb/s, and eight of 200 Gb/s."""


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
    names = ["zero0", "zero1", "zero2", "zero3"]
    if nodes > 1 or settings.engine_name == "zero3_node":
        names.append("zero3_node")
    for name in names:
        is_requested = name == settings.engine_name
        variants[name + " *" * is_requested] = (
            requested if is_requested else planner.estimate(settings.with_engine(name))
        )
    for name in ("zero2", "zero3"):
        if hardware.device == "cuda":
            variants[f"{name} offload"] = planner.estimate(settings.with_engine(name, offload=True))
    networks = {} if nodes == 1 else {rate: planner.with_network(rate).estimate(settings) for rate in NETWORK_RATES}
    return StagePlan(planner, requested, variants, networks, advise(planner, requested))
