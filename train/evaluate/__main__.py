"""`python -m train.evaluate RUN|EXPORT`: held-out loss, metrics of free answers, and the effect of the image.

A run is evaluated with its export on its mixture's held-out samples; any other model directory on prepared sources
(--store). The results of each source are the loss on whole conversations, as in training; greedy answers to single
questions, scored by the metric in the source's YAML; and the share of exactly right answers, with the question's image,
with another one, and with the base view of its image alone (--base-view). --server asks a running server instead, and
--suite measures the published results table with lmms-eval.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_recipes.schema.arguments import output_file
from data_recipes.schema.console import run_program
from data_recipes.schema.sample import DataError
from llava_next.config import ModelError
from llava_next.model_directory import get_model_name
from train.config.exit_codes import EXIT_FAILED, report_mistake
from train.config.schema import ConfigError
from train.distributed.launch import read_launch
from train.distributed.quiet_libraries import quiet_libraries
from train.evaluate.answers import Answer
from train.evaluate.evaluated_model import SampleMaxima, select_samples
from train.evaluate.evaluation_ranks import EvaluationError, join_ranks
from train.evaluate.options import find_use, parse
from train.evaluate.results import format_tables, make_result
from train.evaluate.served_answers import ServedEvaluation, connect
from train.evaluate.suite_columns import describe_columns, read_suite, select_columns, select_published
from train.evaluate.suite_run import SuiteRun, enter_scores, format_suite, run_suite
from train.evaluate.weights_evaluation import evaluate, is_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program on this rank; returns the exit code."""
    options = parse(arguments, (__doc__ or "").split("\n\n")[0])
    use = find_use(options)
    if use != "suite":  # lmms-eval would inherit the environment in which the hub is not asked
        quiet_libraries(on_cpu=not torch.cuda.is_available())
    is_main = True
    try:
        if use == "weights":
            out = _choose_out(options)
            with join_ranks() as ranks:
                is_main = ranks.is_main
                result, answers = evaluate(options, ranks)
            if is_main:
                _write_results(out, result, answers)
            return 0
        launch = read_launch()
        is_main = launch.rank == 0
        if launch.size > 1:
            raise ConfigError(f"--{use} is one process, and a launcher has started {launch.size}; start it without one")
        return _measure_suite(options) if use == "suite" else _evaluate_server(options)
    except argparse.ArgumentTypeError as error:
        return report_mistake(f"{error}; give a file for the results with --out", is_main=is_main)
    except (ConfigError, ModelError, DataError, OSError) as error:
        return report_mistake(error, is_main=is_main)
    except EvaluationError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _evaluate_server(options: argparse.Namespace) -> int:
    """Asks a running server the questions of a run's held-out samples or of stores, and writes the results."""
    path: Path | None = options.path
    if path is not None and not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is not a run folder (it has no config.yaml); with --server, name the run whose held-out samples "
            "are asked, or no path and prepared sources with --store"
        )
    asked = select_samples(
        path,
        options.store,
        maxima=SampleMaxima.parse(options.num_samples),
        seed=options.seed,
        chosen=dict(pair.split("=", 1) for pair in options.metric),
    )
    server = connect(options.server, options.server_model, options.server_timeout)
    out = _choose_out(options, server.model)
    evaluation = ServedEvaluation(options.limit, options.per_picture, options.batch_size, options.max_new_tokens)
    reports = evaluation.evaluate(server, asked)
    header = {"server": server.url, "model": server.model, "run": path and str(path), "seed": options.seed}
    _write_results(out, make_result(header, reports, None), [a for report in reports for a in report.answers])
    return 0


def _measure_suite(options: argparse.Namespace) -> int:
    """Measures the columns of a results table, or prints them."""
    suite = read_suite(options.suite)
    if options.describe:
        print(describe_columns(suite))
        return 0
    columns = select_columns(suite, options.columns)
    export: Path = options.path / "export" if is_run(options.path) else options.path
    if not (export / "config.json").is_file():
        raise ConfigError(f"{options.path} is neither a run with an export/ nor a model directory (config.json)")
    published = select_published(suite, export, options.published)
    run = SuiteRun(suite, export, _choose_out(options), published, options.limit)
    if options.score:
        print(format_suite(enter_scores(run, dict(options.score))))
        print(f"wrote {run.out}")
        return 0
    results, has_failed = run_suite(run, columns, frozenset(columns) if options.columns else frozenset())
    print(format_suite(results))
    print(f"wrote {run.out}")
    return EXIT_FAILED if has_failed else 0


def _choose_out(options: argparse.Namespace, served_model: str = "") -> Path:
    """Returns the file of the results: --out, else one in a run's folder, else one in outputs/evaluate.

    Raises:
        argparse.ArgumentTypeError: it cannot be written.
    """
    if options.out is not None:
        return options.out  # type: ignore[no-any-return]
    path: Path | None = options.path
    if path is not None and path.name == "export" and (path.parent / "config.yaml").is_file() and options.suite:
        path = path.parent  # the report and the model card look there
    use = find_use(options)
    suffix = {"weights": "evaluation", "server": "server_evaluation", "suite": f"suite_{options.suite}"}[use]
    if path is not None and is_run(path):
        return output_file(str(path / f"{suffix}.json"))
    name = served_model.rstrip("/").rpartition("/")[2] if path is None else get_model_name(path)
    tail = "" if use == "weights" else f"_{suffix}"
    return output_file(str(Path("outputs") / "evaluate" / f"{name}{tail}.json"))


def _write_results(out: Path, result: dict[str, Any], answers: list[Answer]) -> None:
    """Writes the results and the answers, and prints the tables."""
    out.parent.mkdir(parents=True, exist_ok=True)
    answers_path = out.with_suffix(".answers.jsonl")
    _write(answers_path, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    _write(out, json.dumps(result, indent=1) + "\n")
    print(format_tables(result))
    for answer in result["generated"]:
        print(f"  {answer['source']}: {answer['text']!r} -> {answer['answer']!r} (truth {answer['truth']!r})")
    print(f"wrote {out} and {answers_path}")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # an answer may end within a character
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(run_program(main))
