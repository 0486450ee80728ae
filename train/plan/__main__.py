"""`python -m train.plan`: estimates memory and time of a run before it starts, without GPU, weights or data.

    python -m train.plan experiment=quickstart hardware=cpu
    python -m train.plan model/language_model=vicuna_7b hardware=a100_80g nodes=4 --out plan.json --picture plan.svg
    python -m train.plan --model-card

It takes the overrides of `python -m train`, and `hardware=NAME nodes=N` (`hardware.KEY=VALUE` changes one value).
Without `stage=`, both stages are planned and added; without a mixture, the published mixtures are used. The exit code
is 0 if the configuration fits into memory, 1 if it does not, and 2 if the configuration is invalid.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from data_recipes.schema.arguments import ArgumentParser, output_file, positive_argument
from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.console import run_program
from train.config.compose import check, compose_overrides
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError, RunConfig
from train.plan.hardware import Hardware, check_hardware

EXIT_DOES_NOT_FIT = 1
PUBLISHED_MIXTURES = {"align": "lcs_558k", "finetune": "llava_next_779k"}
_LATER_MIXTURES = {
    "interleave/finetune": "interleave",
    "onevision/mid": "onevision_mid",
    "onevision/single_image": "onevision_single_image",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans the stages and prints the result; returns the exit code."""
    options = _parse(arguments)
    try:
        stages = _compose_stages(options)
    except (ConfigError, OSError) as error:
        return report_mistake(error)
    from train.distributed.quiet_libraries import quiet_libraries

    quiet_libraries(on_cpu=True)
    from data_recipes.schema.sample import DataError
    from llava_next.config import ModelError
    from train.data.packing import PackingError

    try:
        return _plan_model_card(stages[0][1], options.out) if options.model_card else _plan(stages, options)
    except (ConfigError, ModelError, DataError, PackingError, OSError) as error:
        return report_mistake(error)


def list_stages(arguments: Sequence[str]) -> list[str]:
    """Returns the names of the stages that the arguments select. Raises ConfigError if a configuration is invalid."""
    return [config.stage.name for config, _, _ in _compose_stages(_parse(arguments))]


def _compose_stages(options: argparse.Namespace) -> list[tuple[RunConfig, Hardware, int]]:
    """Returns configuration, hardware and number of nodes of each stage."""
    return [_compose(overrides, options.config_dir) for overrides in _split_stages(_check_overrides(options))]


def _plan(stages: list[tuple[RunConfig, Hardware, int]], options: argparse.Namespace) -> int:
    from train.plan.bar_chart import render_bar_chart
    from train.plan.plan_text import format_bracket, format_plan, plan_values
    from train.plan.stage_plan import plan_stage

    plans = []
    for config, hardware, nodes in stages:
        plans.append(plan_stage(config, hardware, nodes, num_samples=options.samples, config_dir=options.config_dir))
        print(format_plan(plans[-1]), end="\n\n", flush=True)
    hours, without_overlap, gpu_hours, gpu_hours_without_overlap = (
        sum(getattr(plan.requested, name) for plan in plans)
        for name in ("hours", "hours_without_overlap", "gpu_hours", "gpu_hours_without_overlap")
    )
    fits = all(plan.requested.fits for plan in plans)
    if len(plans) > 1:
        gpus = format_bracket(gpu_hours, gpu_hours_without_overlap, digits=0)
        duration = f"{format_bracket(hours, without_overlap)} h, {gpus} GPU-hours"
        print(f"both stages: {duration}{'' if fits else ' (does not fit)'}")
    if options.out:
        values = {
            "fits": fits,
            "hours": hours,
            "hours_without_overlap": without_overlap,
            "gpu_hours": gpu_hours,
            "gpu_hours_without_overlap": gpu_hours_without_overlap,
            "stages": [plan_values(plan) for plan in plans],
        }
        options.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.out}")
    if options.picture:
        options.picture.write_text(render_bar_chart(plans), encoding="utf-8")
        print(f"wrote {options.picture}")
    return 0 if fits else EXIT_DOES_NOT_FIT


def _plan_model_card(hardware: Hardware, out: Path | None) -> int:
    from train.plan.published_model_card import format_card, plan_card

    rows = plan_card(hardware)
    print(format_card(rows))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _check_overrides(options: argparse.Namespace) -> list[str]:
    """Returns the overrides. Raises ConfigError for one without a value, and if the hardware is missing."""
    overrides = list(options.overrides)
    if options.model_card:
        hardware = [override for override in overrides if override.startswith("hardware.")]
        overrides = ["hardware=a100_80g", *hardware, "stage=finetune"]
    if invalid := [override for override in overrides if "=" not in override and not override.startswith("~")]:
        raise ConfigError(f"{invalid[0]!r} is no override KEY=VALUE; `python -m train.plan --help` lists the options")
    if not _is_set(overrides, "hardware"):
        folders = [CONFIG_DIR, *([Path(options.config_dir)] if options.config_dir else [])]
        known = ", ".join(sorted({path.stem for folder in folders for path in (folder / "hardware").glob("*.yaml")}))
        raise ConfigError(f"hardware has no value; give one of {known} as hardware=NAME")
    return overrides


def _split_stages(overrides: list[str]) -> list[list[str]]:
    """Returns the overrides of each stage to plan: one stage if it or a mixture is given, else both."""
    has_mixture = _is_set(overrides, "mixture")
    if not _is_set(overrides, "name"):
        overrides = ["name=plan", *overrides]
    if _is_set(overrides, "stage") or (has_mixture and not _is_set(overrides, "experiment")):
        stage = next((word.partition("=")[2] for word in overrides if word.startswith("stage=")), "finetune")
        stages = {stage: overrides}
    else:
        stages = {stage: [*overrides, f"stage={stage}"] for stage in PUBLISHED_MIXTURES}
    if has_mixture or _is_set(overrides, "experiment"):
        return list(stages.values())
    return [[*words, f"mixture={_published_mixture(stage)}"] for stage, words in stages.items()]


def _published_mixture(stage: str) -> str:
    """Returns the mixture of a stage; a stage of an own file has none, which the configuration reports."""
    return _LATER_MIXTURES.get(stage) or PUBLISHED_MIXTURES.get(stage.rpartition("/")[2], "null")


def _compose(overrides: list[str], config_dir: str | None) -> tuple[RunConfig, Hardware, int]:
    """Returns the configuration of the run, the hardware and the number of nodes."""
    added = [f"+{override}" if override.startswith(("hardware=", "nodes=")) else override for override in overrides]
    if not _is_set(overrides, "nodes"):
        added.append("+nodes=1")
    composed = compose_overrides(added, config_dir)
    OmegaConf.set_struct(composed, False)
    if "hardware" not in composed or "nodes" not in composed:
        raise ConfigError("hardware and nodes are needed by the planner; leave ~hardware and ~nodes out")
    hardware, nodes = OmegaConf.to_container(composed.pop("hardware")), composed.pop("nodes")
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ConfigError(f"nodes must be an integer of at least 1, got {nodes!r}")
    assert isinstance(hardware, dict)
    return check(composed, folders=False), check_hardware({str(key): value for key, value in hardware.items()}), nodes


def _is_set(overrides: Sequence[str], key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in overrides)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "python -m train.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m train, and hardware=NAME nodes=N")
    parser.add_argument("--out", type=output_file, help="write all numbers to this JSON file")
    parser.add_argument("--picture", type=output_file, help="write memory and time as stacked bars to this SVG file")
    parser.add_argument(
        "--samples", type=positive_argument, help="number of samples in an epoch, instead of the mixture's"
    )
    parser.add_argument(
        "--model-card", action="store_true", help="compare the model card's three sizes with their plans"
    )
    parser.add_argument("--config-dir", help="a folder of further YAML files, which take precedence")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main))
