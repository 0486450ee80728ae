"""`python -m train.evaluate RUN|EXPORT`: held-out loss, metrics of free answers, and the effect of the image.

A run is evaluated with its export on its mixture's held-out samples; any other model directory on prepared sources
(--store). The results of each source are the loss on whole conversations, as in training; greedy answers to single
questions, scored by the metric in the source's YAML; and the share of exactly right answers, with the question's image,
with another one, and with the base view of its image alone (--base-view).
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_recipes.schema.arguments import ArgumentParser, count_argument, output_file, path_argument, positive_argument
from data_recipes.schema.console import run_program
from data_recipes.schema.sample import DataError
from data_recipes.store.reader import StoredSample
from llava_next.config import ModelError
from llava_next.model.flops import step_costs
from llava_next.model.towers import stock_unsupported_reason
from llava_next.model_directory import model_argument
from train.config.exit_codes import EXIT_FAILED, report_mistake
from train.config.schema import ConfigError, PackingConfig
from train.distributed.quiet_libraries import quiet_libraries
from train.evaluate.answers import LOSS_ONLY_HINT, Answer, StockModel
from train.evaluate.evaluated_model import (
    DEFAULT_NUM_SAMPLES,
    EvaluatedModel,
    SampleMaxima,
    load_directory,
    load_run,
)
from train.evaluate.evaluation_ranks import (
    EvaluationError,
    EvaluationRanks,
    describe_row_budgets,
    explain_out_of_memory,
    join_ranks,
)
from train.evaluate.image_questions import (
    Accuracy,
    Question,
    answer_all,
    answer_base_views,
    extract_questions,
    filter_askable,
    read_image_samples,
    summarize,
)
from train.evaluate.results import SourceReport, format_tables, make_result
from train.validation.held_out import HeldOutSet, build_held_out

_Hits = tuple[list[Question], npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]
"""Questions, and whether each was answered exactly with the right image, with the other one, and with the base view of
the right one if it was asked for, bool [num_questions]."""

_QuestionsBySource = dict[str, tuple[list[StoredSample], list[Question], int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program on this rank; returns the exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    is_main = True
    try:
        out: Path = options.out or output_file(str(_get_default_out(options.path)))
        with join_ranks() as ranks:
            is_main = ranks.is_main
            result, answers = evaluate(options, ranks)
    except argparse.ArgumentTypeError as error:
        return report_mistake(f"{error}; give a file for the results with --out", is_main=is_main)
    except (ConfigError, ModelError, DataError, OSError) as error:
        return report_mistake(error, is_main=is_main)
    except EvaluationError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if is_main:
        _write_results(out, result, answers)
    return 0


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


def evaluate(options: argparse.Namespace, ranks: EvaluationRanks) -> tuple[dict[str, Any], list[Answer]]:
    """Evaluates the model. Every rank must call it.

    Returns:
        All results as plain values, and every answer.

    Raises:
        ConfigError, ModelError, DataError: the model, a store or a metric does not exist, or they do not match.
        EvaluationError: a row or a batch did not fit into memory.
    """
    is_run = _is_run(options.path)
    load = load_run if is_run else load_directory
    chosen = dict(pair.split("=", 1) for pair in options.metric)
    maxima = SampleMaxima.parse(options.num_samples)
    evaluated = ranks.run(
        lambda: load(options.path, options.store, ranks.device, maxima=maxima, seed=options.seed, chosen=chosen)
    )
    evaluated = replace(evaluated, packing=_read_budgets(options, evaluated.packing))
    reason = stock_unsupported_reason(evaluated.backbone.hf_config.vision_config)
    if reason is not None and options.generate != 0:
        raise ModelError(f"stock transformers cannot run {evaluated.export}: {reason}; {LOSS_ONLY_HINT}")
    single = evaluated.processor.config.views.rules[0]
    if options.base_view and single.mode != "anyres":
        raise ConfigError(
            f"--base-view: {options.path} shows an image as one view ({single.mode}), so it has no tiles; "
            "leave out --base-view"
        )
    losses, held_out = _compute_losses(evaluated, ranks)
    questions_by_source = ranks.run(lambda: _select_questions(evaluated, held_out, options))
    hits: dict[str, _Hits] = {}
    for source, (samples, questions, _) in questions_by_source.items():
        if questions:
            args = (evaluated.model, evaluated.processor, samples, questions, evaluated.packing, ranks)
            base_view = answer_base_views(*args) if options.base_view else None
            hits[source] = (questions, *answer_all(*args), base_view)
    answers = _generate_answers(evaluated, questions_by_source, ranks, options)
    reports = [
        SourceReport(
            source,
            num_rejected=held_out.num_rejected.get(source, 0),
            **losses[source],
            metric=evaluated.metrics[source],
            answers=answers.get(source, []),
            accuracy=summarize(*hits[source]) if source in hits else None,
            num_unasked=questions_by_source[source][2],
        )
        for source in evaluated.samples
    ]
    header = {"run" if is_run else "model": str(options.path), "seed": options.seed}
    every = [answer for report in reports for answer in report.answers]
    return make_result(header, reports, _summarize_all(list(hits.values()))), every


def _read_budgets(options: argparse.Namespace, packing: PackingConfig) -> PackingConfig:
    """Returns the budgets of a row: those of the command line, else those of the model's run."""
    return PackingConfig(options.max_tokens or packing.max_tokens, options.max_tiles or packing.max_tiles)


def _compute_losses(evaluated: EvaluatedModel, ranks: EvaluationRanks) -> tuple[dict[str, dict[str, Any]], HeldOutSet]:
    """Returns the number of samples, the number of supervised tokens and the loss by source, and the held-out set."""
    model, names = evaluated.model, list(evaluated.samples)
    model.num_sources = len(names)
    hf = evaluated.backbone.hf_config
    costs = step_costs(
        hf.vision_config,
        hf.text_config,
        projector=evaluated.backbone.config.projector,
        num_vision_layers=model.num_tower_layers,
        trains_tower=False,
        trains_language_model=False,
    )
    held_out = ranks.run(
        lambda: build_held_out(
            evaluated.samples, names, evaluated.processor, evaluated.packing, costs, per_sample=evaluated.per_sample
        )
    )

    def compute(row: Sequence[int]) -> torch.Tensor:
        with explain_out_of_memory(f"a row of {len(row)} held-out samples", describe_row_budgets(evaluated.packing)):
            return held_out.compute_row_sums(row, model, ranks.device)

    sums = torch.zeros(3, len(names), dtype=torch.float64)
    for row_sums in ranks.map(compute, held_out.rows, description="held-out loss", unit="row"):
        sums += row_sums
    losses = held_out.compute_losses(sums)
    counts = sums[1:].long().tolist()
    return {
        name: {"num_samples": counts[1][n], "num_tokens": counts[0][n], "loss": losses.get(name)}
        for n, name in enumerate(names)
    }, held_out


def _select_questions(
    evaluated: EvaluatedModel, held_out: HeldOutSet, options: argparse.Namespace
) -> _QuestionsBySource:
    """Returns the samples with images, their questions, and the number of questions that cannot be asked."""
    questions_by_source: _QuestionsBySource = {}
    for source in evaluated.samples:
        accepted = [sample for sample in held_out.samples if sample.source == source]
        samples = read_image_samples(accepted, options.limit)
        questions, num_unasked = filter_askable(
            evaluated.processor, samples, extract_questions(source, samples, options.limit, options.per_picture)
        )
        questions_by_source[source] = samples, questions, num_unasked
    return questions_by_source


def _generate_answers(
    evaluated: EvaluatedModel,
    questions_by_source: _QuestionsBySource,
    ranks: EvaluationRanks,
    options: argparse.Namespace,
) -> dict[str, list[Answer]]:
    """Returns free answers to the first questions of each source. The packed model is freed for the stock one."""
    num = options.limit if options.generate is None else options.generate
    if not num or not any(questions for _, questions, _ in questions_by_source.values()):
        return {}
    evaluated.model.to("meta")
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    stock = ranks.run(
        lambda: StockModel(
            evaluated.export,
            evaluated.processor,
            ranks,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
    )
    return {
        source: stock.generate_answers(samples, questions[:num], evaluated.metrics[source])
        for source, (samples, questions, _) in questions_by_source.items()
    }


def _summarize_all(hits: list[_Hits]) -> Accuracy | None:
    """Returns the accuracy over the questions of all sources."""
    if not hits:
        return None
    questions = [question for each, *_ in hits for question in each]
    base_views = [hit[3] for hit in hits if hit[3] is not None]
    return summarize(
        questions,
        np.concatenate([hit[1] for hit in hits]),
        np.concatenate([hit[2] for hit in hits]),
        np.concatenate(base_views) if base_views else None,
    )


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or not (path / "config.json").is_file()


def _get_default_out(path: Path) -> Path:
    """Returns evaluation.json in a run folder, or a file in outputs/evaluate for a model without a run."""
    return path / "evaluation.json" if _is_run(path) else Path("outputs") / "evaluate" / f"{path.resolve().name}.json"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # an answer may end within a character
    partial.rename(path)


def _sample_maximum(text: str) -> tuple[str, int]:
    """Parses NUM or SOURCE=NUM into a source, empty for every source, and a number."""
    source, _, number = text.rpartition("=")
    return source, positive_argument(number)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "path",
        type=model_argument,
        metavar="RUN|EXPORT",
        help="a run folder with an export/, or a LLaVA or LLaVA-NeXT directory in the Hugging Face layout, or the id "
        "of a fetched one on the hub",
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
    parser.add_argument("--limit", type=int, default=600, help="maximum number of questions per source (%(default)s)")
    parser.add_argument("--per-picture", type=int, default=4, help="questions per image (%(default)s)")
    parser.add_argument(
        "--base-view",
        action="store_true",
        help="also ask every question with the base view of its image alone, without the AnyRes tiles",
    )
    parser.add_argument("--generate", type=int, help="free answers per source (default: all; 0: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per batch (%(default)s)")
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
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
