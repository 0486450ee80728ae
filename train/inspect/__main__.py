"""`python -m train.inspect STORE|RUN`: samples as the model sees them, on one static HTML page.

Of a prepared source, samples drawn by seed (model and stage are chosen as for training, or with --like RUN); of a run,
those of one step. --loss runs each sample alone on one process: a replay of the step, which finds the samples behind a
loss spike.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_recipes.schema.arguments import ArgumentParser, count_argument, output_file, path_argument
from data_recipes.schema.console import run_program
from data_recipes.schema.sample import DataError
from llava_next.config import ModelError
from train.config.compose import load_yaml
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.html.page import write_page
from train.inspect.replay import replay
from train.inspect.sample_page import page_values
from train.inspect.sample_set import Subject, compose_config, open_run, open_store

_NUM_OF_STORE = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    try:
        subject, run_dir, out = _open_subject(options)
        replayed = replay(subject, run_dir) if options.loss else None
        if replayed:
            print(replayed.format_table())
        values = page_values(subject, options.num, replayed)
    except (ConfigError, ModelError, DataError, OSError) as error:
        return report_mistake(error)
    write_page(options.out or out, "samples.html", **values)
    return 0


def _open_subject(options: argparse.Namespace) -> tuple[Subject, Path | None, Path]:
    """The samples, the run whose weights are used, and where the page is written."""
    path: Path = options.path
    if (path / "config.yaml").is_file():
        _refuse(path, "a run, and its config.yaml decides", overrides=options.overrides, like=options.like)
        subject = open_run(path, options.step, ids=options.ids, seed=options.seed)
        return subject, path, path / "inspect" / f"step_{subject.run.step if subject.run else 0:06d}.html"
    if not (path / "manifest.json").is_file():
        parents = (file.parent.name for name in ("manifest.json", "config.yaml") for file in path.glob(f"*/{name}"))
        inside = ", ".join(sorted(set(parents)))
        raise ConfigError(
            f"{path} is neither a prepared source (it holds no manifest.json) nor the folder of a stage (no "
            f"config.yaml){'; inside it there are ' + inside if inside else ''}"
        )
    _refuse(path, "a prepared source, and steps are a run's", step=options.step)
    if options.like is not None:
        _refuse(path, "shown --like a run, and its config.yaml decides", overrides=options.overrides)
        config = load_yaml(options.like / "config.yaml")
    else:
        config = compose_config(options.overrides, options.config_dir)
    num = _NUM_OF_STORE if options.num is None else options.num
    subject = open_store(path, config, ids=options.ids, num=num, seed=options.seed)
    return subject, options.like, Path("outputs") / "inspect" / f"{path.resolve().name}.html"


def _refuse(path: Path, reason: str, **options: object) -> None:
    """Raises ConfigError if one of the options is given."""
    for name, value in options.items():
        if value not in (None, []):
            given = " ".join(map(str, value)) if isinstance(value, list) else f"--{name} {value}"
            raise ConfigError(f"{given}: {path} is {reason}; leave it out")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.inspect", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("path", type=path_argument, metavar="STORE|RUN", help="a prepared source, or the folder of a stage")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of a store: model and stage, as for training")
    add("--like", type=path_argument, metavar="RUN", help="of a store: model and stage of this run instead")
    add("--config-dir", help="a folder of further YAML files, which take precedence, as for training")
    add("--step", type=int, help="of a run: counted from 0 as in metrics.jsonl (default: its last)")
    ids = "these samples (ID or SOURCE:ID); of a run, --step then only chooses the weights of --loss"
    add("--ids", nargs="+", default=[], metavar="ID", help=ids)
    add("--num", type=int, help=f"at most so many on the page (default: of a store {_NUM_OF_STORE}, of a run all)")
    add("--seed", type=count_argument, default=0, help="draws the samples of a store (%(default)s)")
    add("--loss", action="store_true", help="run the samples alone, and sort them by their loss")
    add("--out", type=output_file, help="the page (default: RUN/inspect/step_N.html, outputs/inspect/STORE.html)")
    options = parser.parse_intermixed_args(arguments)
    if options.num is not None and options.num < 1:
        parser.error(f"--num {options.num}: at least 1 sample is needed")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
