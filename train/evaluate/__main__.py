"""`python -m train.evaluate RUN|EXPORT`: held-out loss, metrics of free answers, and the effect of the image.

A run is evaluated with its export on its mixture's held-out samples; any other model directory on prepared sources
(--store). The results of each source are the loss on whole conversations, as in training; greedy answers to single
questions, scored by the metric in the source's YAML; and the share of exactly right answers, with the question's image
and with another one.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_recipes.schema.sample import DataError
from data_recipes.store.reader import StoredSample
from llava_next.config import ModelError
from llava_next.model.flops import step_costs
from llava_next.model.towers import stock_unsupported_reason
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.evaluate.answers import LOSS_ONLY_HINT, Answer, StockModel
from train.evaluate.evaluated_model import EvaluatedModel, load_directory, load_run
from train.evaluate.image_questions import (
    Accuracy,
    Question,
    answer_all,
    extract_questions,
    filter_by_length,
    read_single_image_samples,
    summarize,
)
from train.evaluate.results import SourceReport, format_tables, make_result
from train.validation.held_out import HeldOutSet, build_held_out

_Hits = tuple[list[Question], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""Questions, and whether each was answered exactly with the right and with the other image, bool [num_questions]."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    try:
        result, answers = evaluate(options)
    except (ConfigError, ModelError, DataError) as error:
        return report_mistake(error)
    out: Path = options.out or _get_default_out(options.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    answers_path = out.with_suffix(".answers.jsonl")
    _write(answers_path, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    _write(out, json.dumps(result, indent=1) + "\n")
    print(format_tables(result))
    for answer in result["generated"]:
        print(f"  {answer['source']}: {answer['text']!r} -> {answer['answer']!r} (truth {answer['truth']!r})")
    print(f"wrote {out} and {answers_path}")
    return 0


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], list[Answer]]:
    """Evaluates the model.

    Returns:
        All results as plain values, and every answer.

    Raises:
        ConfigError, ModelError, DataError: the model, a store or a metric does not exist, or they do not match.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_run = _is_run(options.path)
    load = load_run if is_run else load_directory
    chosen = dict(pair.split("=", 1) for pair in options.metric)
    evaluated = load(options.path, options.store, device, num=options.num, seed=options.seed, chosen=chosen)
    reason = stock_unsupported_reason(evaluated.backbone.hf_config.vision_config)
    if reason is not None and options.generate != 0:
        raise ModelError(f"stock transformers cannot run {evaluated.export}: {reason}; {LOSS_ONLY_HINT}")
    losses, held_out = _compute_losses(evaluated)
    questions_by_source: dict[str, tuple[list[StoredSample], list[Question], int]] = {}
    hits: dict[str, _Hits] = {}
    for source in evaluated.samples:
        accepted = [sample for sample in held_out.samples if sample.source == source]
        samples = read_single_image_samples(accepted, options.limit)
        questions, num_unasked = filter_by_length(
            evaluated.processor, samples, extract_questions(source, samples, options.limit, options.per_picture)
        )
        questions_by_source[source] = samples, questions, num_unasked
        if questions:
            hits[source] = (questions, *answer_all(evaluated.model, evaluated.processor, samples, questions))
    answers = _generate_answers(evaluated, questions_by_source, device, options)
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


def _compute_losses(evaluated: EvaluatedModel) -> tuple[dict[str, dict[str, Any]], HeldOutSet]:
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
    held_out = build_held_out(
        evaluated.samples, names, evaluated.processor, evaluated.packing, costs, per_sample=evaluated.per_sample
    )
    sums = held_out.compute_sums(model, model.hf.model.image_newline.device)
    losses = held_out.compute_losses(sums)
    counts = sums[1:].long().tolist()
    return {
        name: {"num_samples": counts[1][n], "num_tokens": counts[0][n], "loss": losses.get(name)}
        for n, name in enumerate(names)
    }, held_out


def _generate_answers(
    evaluated: EvaluatedModel,
    questions_by_source: dict[str, tuple[list[StoredSample], list[Question], int]],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, list[Answer]]:
    """Returns free answers to the first questions of each source. The packed model is freed for the stock one."""
    num = options.limit if options.generate is None else options.generate
    if not num or not any(questions for _, questions, _ in questions_by_source.values()):
        return {}
    evaluated.model.to("meta")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    stock = StockModel(
        evaluated.export,
        evaluated.processor,
        device,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    return {
        source: stock.generate_answers(samples, questions[:num], evaluated.metrics[source])
        for source, (samples, questions, _) in questions_by_source.items()
    }


def _summarize_all(hits: list[_Hits]) -> Accuracy | None:
    """Returns the accuracy over the questions of all sources."""
    if not hits:
        return None
    questions = [question for each, _, _ in hits for question in each]
    return summarize(questions, np.concatenate([hit[1] for hit in hits]), np.concatenate([hit[2] for hit in hits]))


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or not (path / "config.json").is_file()


def _get_default_out(path: Path) -> Path:
    """Returns evaluation.json in a run folder, or a file in outputs/evaluate for a model without a run."""
    return path / "evaluation.json" if _is_run(path) else Path("outputs") / "evaluate" / f"{path.resolve().name}.json"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # an answer may end within a character
    partial.rename(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN|EXPORT",
        help="a run folder with an export/, or a LLaVA or LLaVA-NeXT directory in the Hugging Face layout",
    )
    parser.add_argument(
        "--store",
        type=Path,
        action="append",
        default=[],
        metavar="STORE",
        help="a prepared source (can be repeated); for a run, instead of its held-out samples",
    )
    parser.add_argument("--num", type=int, default=512, help="maximum number of samples per source (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the samples of --store (%(default)s)")
    parser.add_argument("--limit", type=int, default=600, help="maximum number of questions per source (%(default)s)")
    parser.add_argument("--per-picture", type=int, default=4, help="questions per image (%(default)s)")
    parser.add_argument("--generate", type=int, help="free answers per source (default: all; 0: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per batch (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum length of a free answer (%(default)s)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="SOURCE=METRIC",
        help="score a source's answers with another metric than the one in its YAML",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the file for the results (default: RUN/evaluation.json or outputs/evaluate/EXPORT.json); the answers are "
        "written next to it, as .answers.jsonl",
    )
    options = parser.parse_args(arguments)
    for name, least in (("num", 1), ("limit", 1), ("per_picture", 1), ("generate", 0), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for pair in options.metric:
        if "=" not in pair:
            parser.error(f"--metric {pair}: write SOURCE=METRIC")
    return options


if __name__ == "__main__":
    sys.exit(main())
