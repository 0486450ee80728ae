"""`python -m train.inspect STORE|RUN`: samples as the model sees them, on one static HTML page.

Of a prepared source, samples drawn by seed (the model and stage are chosen as for training, or with --like RUN); of a
run, exactly those of one step. --loss runs them alone, each by itself on one process: a replay of the step, and the
way to find the samples behind a loss spike.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_recipes.schema.sample import DataError
from llava_next.config import ModelError
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.inspect.replay import replay, table
from train.inspect.sample_set import Subject, of_run, of_store, of_store_like
from train.inspect.samples_page import write_page

_NUM_OF_STORE = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    try:
        out = inspect(options)
    except (ConfigError, ModelError, DataError) as error:
        return report_mistake(error)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB); open it in a browser")
    return 0


def inspect(options: argparse.Namespace) -> Path:
    """Writes the page, and prints the losses if they are asked for; returns where the page is.

    Raises:
        ConfigError, ModelError, DataError: what is asked for is not there, or does not go together.
    """
    subject, run_dir, out = _subject(options)
    found = None
    if options.loss:
        found = replay(subject, run_dir)
        print(table(found))
    page = write_page(subject, options.num, found)
    out = options.out or out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # a broken record may hold half a character
    partial.rename(out)
    return Path(out)


def _subject(options: argparse.Namespace) -> tuple[Subject, Path | None, Path]:
    """What is looked at, the run whose weights it is run with, and where the page goes."""
    place: Path = options.place
    if (place / "config.yaml").is_file():
        _refuse(place, "a run", "its config.yaml decides", overrides=options.overrides, like=options.like)
        subject = of_run(place, options.step, ids=options.ids, seed=options.seed)
        assert subject.run is not None
        return subject, place, place / "inspect" / f"step_{subject.run.step:06d}.html"
    if not (place / "manifest.json").is_file():
        raise ConfigError(
            f"{place} is neither a prepared source (it holds no manifest.json) nor the folder of a stage (no "
            f"config.yaml){_inside(place)}"
        )
    _refuse(place, "a prepared source", "steps are a run's", step=options.step)
    num = _NUM_OF_STORE if options.num is None else options.num
    out = Path("outputs") / "inspect" / f"{place.resolve().name}.html"
    if options.like is not None:
        _refuse(place, "shown --like a run", "its config.yaml decides", overrides=options.overrides)
        return of_store_like(place, options.like, ids=options.ids, num=num, seed=options.seed), options.like, out
    subject = of_store(place, options.overrides, options.config_dir, ids=options.ids, num=num, seed=options.seed)
    return subject, None, out


def _refuse(place: Path, kind: str, why: str, **given: object) -> None:
    for name, value in given.items():
        if value not in (None, []):
            what = " ".join(map(str, value)) if isinstance(value, list) else f"--{name} {value}"
            raise ConfigError(f"{what}: {place} is {kind}, and {why}; leave it out")


def _inside(place: Path) -> str:
    """The folders inside it that would do, for a message."""
    found = sorted({path.parent.name for name in ("manifest.json", "config.yaml") for path in place.glob(f"*/{name}")})
    return f"; inside it there are {', '.join(found)}" if found else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = __doc__ or ""
    parser = argparse.ArgumentParser(prog="python -m train.inspect", description=text.split("\n\n")[0])
    parser.add_argument("place", type=Path, metavar="STORE|RUN", help="a prepared source, or the folder of a stage")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of a store: model and stage, as for training"
    )
    parser.add_argument("--like", type=Path, metavar="RUN", help="of a store: model and stage of this run instead")
    parser.add_argument("--config-dir", help="a folder of further YAML files, as for training")
    parser.add_argument("--step", type=int, help="of a run: counted from 0 as in metrics.jsonl (default: its last)")
    parser.add_argument(
        "--ids",
        nargs="+",
        default=[],
        metavar="ID",
        help="these samples (ID or SOURCE:ID); of a run, --step then only tells whose weights --loss takes",
    )
    parser.add_argument(
        "--num", type=int, help=f"at most so many on the page (default: of a store {_NUM_OF_STORE}, of a run all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the samples of a store (%(default)s)")
    parser.add_argument("--loss", action="store_true", help="run the samples alone, and sort them by their loss")
    parser.add_argument(
        "--out", type=Path, help="the page (default: RUN/inspect/step_N.html, outputs/inspect/STORE.html)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.num is not None and options.num < 1:
        parser.error(f"--num {options.num}: at least 1 sample is needed")
    return options


if __name__ == "__main__":
    sys.exit(main())
