"""The command line of `python -m train.evaluate`, and which options belong to which of its three uses."""

import argparse
import math
from collections.abc import Sequence
from typing import Literal

from data_recipes.schema.arguments import (
    ArgumentParser,
    count_argument,
    output_file,
    path_argument,
    positive_argument,
    positive_size,
    text_argument,
)
from llava_next.model_directory import model_argument
from train.evaluate.chat_server import KEY_VARIABLE
from train.evaluate.evaluated_model import DEFAULT_NUM_SAMPLES

DEFAULT_LIMIT = 600
"""Maximum number of questions per source."""

Use = Literal["weights", "server", "suite"]

_ASKING = ("store", "num_samples", "seed", "per_picture", "batch_size", "max_new_tokens", "metric")
_OPTIONS: dict[Use, tuple[str, ...]] = {
    "weights": (*_ASKING, "base_view", "generate", "max_tokens", "max_tiles"),
    "server": (*_ASKING, "server", "server_model", "server_timeout"),
    "suite": ("suite", "columns", "published", "describe", "score"),
}
"""The options of each use, besides `path`, `limit` and `out`."""
_USE_NAMES = {"weights": "an evaluation of weights on stores", "server": "--server", "suite": "--suite"}


def find_use(options: argparse.Namespace) -> Use:
    """Returns what the program is asked for: weights on stores, a running server, or a results table."""
    if options.suite is not None:
        return "suite"
    return "weights" if options.server is None else "server"


def _sample_maximum(text: str) -> tuple[str, int]:
    """Parses NUM or SOURCE=NUM into a source, empty for every source, and a number."""
    source, _, number = text.rpartition("=")
    return source, positive_argument(number)


def _column_score(text: str) -> tuple[str, float]:
    """Parses COLUMN=VALUE."""
    column, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not column or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: write COLUMN=VALUE, for example vizwiz=57.6")
    return column, number


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Parses and checks the command line; ends the program with one sentence for a mistake."""
    parser = ArgumentParser(prog="python -m train.evaluate", description=description)
    parser.add_argument(
        "path",
        type=model_argument,
        nargs="?",
        metavar="RUN|EXPORT",
        help="a run folder with an export/, or a LLaVA or LLaVA-NeXT directory in the Hugging Face layout, or the id "
        "of a fetched one on the hub; with --server, the run whose held-out samples are asked",
    )
    parser.add_argument(
        "--store",
        type=path_argument,
        action="append",
        default=[],
        metavar="STORE",
        help="a prepared source (can be repeated); for a run, instead of its held-out samples",
    )
    # Not --num: torchrun would take that for one of its own options.
    parser.add_argument(
        "--num-samples",
        type=_sample_maximum,
        action="append",
        default=[],
        metavar="[SOURCE=]NUM",
        help=f"maximum number of samples per source, or of one source (can be repeated; default {DEFAULT_NUM_SAMPLES})",
    )
    parser.add_argument(
        "--seed", type=count_argument, default=0, help="seed for drawing the samples of --store (%(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help=f"maximum number of questions per source ({DEFAULT_LIMIT}); with --suite, of each column (default: all)",
    )
    parser.add_argument("--per-picture", type=int, default=4, help="questions per image (%(default)s)")
    parser.add_argument(
        "--base-view",
        action="store_true",
        help="also ask every question with the base view of its image alone, without the AnyRes tiles",
    )
    parser.add_argument("--generate", type=int, help="free answers per source (default: all; 0: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per batch, or requests at a time to "
                        "a server (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive_argument, help="tokens of a row (default: the run's packing, or 8192)"
    )
    parser.add_argument(
        "--max-tiles", type=positive_argument, help="image tiles of a row (default: the run's packing, or 48)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_argument, default=128, help="maximum length of a free answer (%(default)s)"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="SOURCE=METRIC",
        help="score a source's answers with another metric than the one in its YAML",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        help="the file for the results (default: RUN/evaluation.json or outputs/evaluate/EXPORT.json); the answers are "
        "written next to it, as .answers.jsonl",
    )
    group = parser.add_argument_group("a running server")
    group.add_argument("--server", type=text_argument, metavar="URL", help="ask a server that speaks OpenAI's chat "
                       f"protocol, such as http://localhost:8000/v1; its key is read from {KEY_VARIABLE}")  # fmt: skip
    group.add_argument(
        "--server-model", type=text_argument, metavar="NAME", help="name of the model (default: the only one it lists)"
    )
    group.add_argument(
        "--server-timeout", type=positive_size, default=600.0, metavar="S", help="seconds for one answer (%(default)g)"
    )
    group = parser.add_argument_group("a results table")
    group.add_argument("--suite", type=text_argument, metavar="NAME", help="measure the columns of "
                       "configs/suite/NAME.yaml (llava_next) with lmms-eval, beside the published values")  # fmt: skip
    group.add_argument("--columns", type=text_argument, metavar="A,B", help="only these columns (default: all)")
    group.add_argument("--published", type=text_argument, metavar="MODEL", help="the published model to compare with, "
                       "or none (default: the one of the run's language model or of the directory's name)")  # fmt: skip
    group.add_argument(
        "--score",
        type=_column_score,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="enter the value that a server gave for the file of a column (can be repeated); nothing is measured",
    )
    group.add_argument("--describe", action="store_true", help="print the columns and the published values, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_args(arguments)
    positive = ("limit", "per_picture", "batch_size", "max_tokens", "max_tiles")
    for name, least in (*((name, 1) for name in positive), ("generate", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for pair in options.metric:
        if "=" not in pair:
            parser.error(f"--metric {pair}: write SOURCE=METRIC")
    _check_use(parser, options)
    if options.limit is None and options.suite is None:
        options.limit = DEFAULT_LIMIT
    return options


def _check_use(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options of another use, and a missing model."""
    use = find_use(options)
    if options.suite is not None and options.server is not None:
        parser.error("--server and --suite are two uses; give one")
    for name in sorted({name for names in _OPTIONS.values() for name in names} - set(_OPTIONS[use])):
        if getattr(options, name) != parser.get_default(name):
            others = " or ".join(_USE_NAMES[other] for other, names in _OPTIONS.items() if name in names)
            parser.error(f"--{name.replace('_', '-')} belongs to {others}, not to {_USE_NAMES[use]}; leave it out")
    for name in ("columns", "limit", "describe"):
        if options.score and getattr(options, name) != parser.get_default(name):
            parser.error(f"--score enters values and measures nothing; leave out --{name}")
    scored = [column for column, _ in options.score]
    if len(set(scored)) < len(scored):
        parser.error(f"--score names a column twice: {', '.join(scored)}")
    if options.path is None and not options.describe and not (use == "server" and options.store):
        what = "a run, or prepared sources with --store" if use == "server" else "a run or a model directory"
        parser.error(f"name {what}")
