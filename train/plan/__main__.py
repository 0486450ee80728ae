"""`python -m train.plan`: what a run will need, before it is launched; no GPU, no weights, no data.

    python -m train.plan experiment=quickstart hardware=cpu
    python -m train.plan model/language_model=vicuna_7b hardware=a100_80g nodes=4 --out plan.json --picture plan.svg
    python -m train.plan --model-card

Takes the overrides of `python -m train`, and `hardware=NAME nodes=N` (`hardware.KEY=VALUE` changes a number of it).
Without `stage=`, both stages are planned and added up; without a mixture, the published ones. The exit code is 0 where
what was asked for fits, 1 where it does not, and 2 for a mistake in the configuration.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from train.config.compose import check, composed_from
from train.config.exit_codes import report_mistake
from train.config.schema import CONFIG_DIR, ConfigError, RunConfig
from train.plan.hardware import Hardware, check_hardware

EXIT_DOES_NOT_FIT = 1
PUBLISHED = {"align": "lcs_558k", "finetune": "llava_next_779k"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, plans, prints; returns the exit code."""
    options = _options(arguments)
    try:
        stages = _checked(options)
    except ConfigError as error:
        return report_mistake(error)
    from train.distributed.quiet_libraries import quiet_libraries

    quiet_libraries(on_cpu=True)
    from data_recipes.schema.sample import DataError
    from llava_next.config import ModelError
    from train.data.packing import PackingError

    try:
        return _model_card(stages[0][1], options.out) if options.model_card else _plan(stages, options)
    except (ConfigError, ModelError, DataError, PackingError) as error:
        return report_mistake(error)


def planned_stages(arguments: Sequence[str]) -> list[str]:
    """Names of the stages that these arguments plan, their configurations checked. Raises ConfigError."""
    return [config.stage.name for config, _, _ in _checked(_options(arguments))]


def _checked(options: argparse.Namespace) -> list[tuple[RunConfig, Hardware, int]]:
    return [_read(words, options.config_dir) for words in _stages(_overrides(options))]


def _plan(stages: list[tuple[RunConfig, Hardware, int]], options: argparse.Namespace) -> int:
    from train.plan.bar_chart import plan_picture
    from train.plan.plan_text import plan_text, plan_values
    from train.plan.training_stage import plan_stage

    plans = []
    for config, hardware, nodes in stages:
        plans.append(plan_stage(config, hardware, nodes, num_samples=options.samples, config_dir=options.config_dir))
        print(plan_text(plans[-1]), end="\n\n", flush=True)
    hours, gpu_hours = (sum(getattr(plan.asked, name) for plan in plans) for name in ("hours", "gpu_hours"))
    fits = all(plan.asked.fits for plan in plans)
    if len(plans) > 1:
        print(f"both stages: {hours:,.1f} h, {gpu_hours:,.0f} GPU-hours{'' if fits else ' (if they did fit)'}")
    if options.out:
        values = {"fits": fits, "hours": hours, "gpu_hours": gpu_hours, "stages": [plan_values(plan) for plan in plans]}
        options.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.out}")
    if options.picture:
        options.picture.write_text(plan_picture(plans), encoding="utf-8")
        print(f"wrote {options.picture}")
    return 0 if fits else EXIT_DOES_NOT_FIT


def _model_card(hardware: Hardware, out: Path | None) -> int:
    from train.plan.published_model_card import card_rows, card_text

    rows = card_rows(hardware)
    print(card_text(rows))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    """The overrides, checked for what the planner needs besides the run's."""
    words = list(options.overrides)
    if options.model_card:
        words = ["hardware=a100_80g", *(word for word in words if word.startswith("hardware.")), "stage=finetune"]
    if strange := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ConfigError(f"{strange[0]!r} is no override KEY=VALUE; `python -m train.plan --help` lists the options")
    if not _chosen(words, "hardware"):
        known = ", ".join(sorted(path.stem for path in (CONFIG_DIR / "hardware").glob("*.yaml")))
        raise ConfigError(f"hardware has no value; give one of {known} as hardware=NAME")
    return words


def _stages(words: list[str]) -> list[list[str]]:
    """The overrides of each stage to plan: both, unless one is named or a mixture of one's own fits one only."""
    own_mixture = _chosen(words, "mixture")
    if not _chosen(words, "name"):
        words = ["name=plan", *words]
    if _chosen(words, "stage") or (own_mixture and not _chosen(words, "experiment")):
        named = next((word.partition("=")[2] for word in words if word.startswith("stage=")), "finetune")
        stages = {named: words}
    else:
        stages = {stage: [*words, f"stage={stage}"] for stage in PUBLISHED}
    if own_mixture or _chosen(words, "experiment"):
        return list(stages.values())
    return [[*given, f"mixture={PUBLISHED[stage.rpartition('/')[2]]}"] for stage, given in stages.items()]


def _read(words: list[str], config_dir: str | None) -> tuple[RunConfig, Hardware, int]:
    """The run's configuration, and what of the words is the planner's own."""
    added = [f"+{word}" if word.startswith(("hardware=", "nodes=")) else word for word in words]
    if not _chosen(words, "nodes"):
        added.append("+nodes=1")
    composed = composed_from(added, config_dir)
    OmegaConf.set_struct(composed, False)
    hardware, nodes = OmegaConf.to_container(composed.pop("hardware")), composed.pop("nodes")
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ConfigError(f"nodes must be a whole number from 1, got {nodes!r}")
    assert isinstance(hardware, dict)
    return check(composed, folders=False), check_hardware({str(key): value for key, value in hardware.items()}), nodes


def _chosen(words: Sequence[str], key: str) -> bool:
    return any(word.lstrip("+").startswith(f"{key}=") for word in words)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m train.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as of python -m train; hardware=NAME nodes=N besides")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--picture", type=Path, help="an SVG file for memory and time as stacked bars")
    parser.add_argument("--samples", type=int, help="of an epoch, instead of the mixture's own number")
    parser.add_argument("--model-card", action="store_true", help="the card's three rows beside what is planned")
    parser.add_argument("--config-dir", help="a folder of further YAML files")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
