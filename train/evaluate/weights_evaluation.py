"""Evaluates the weights of a run or of a model directory: losses, free answers, and the effect of the image."""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_recipes.store.reader import StoredSample
from llava_next.config import ModelError
from llava_next.model.flops import step_costs
from llava_next.model.towers import stock_unsupported_reason
from train.config.schema import ConfigError, PackingConfig
from train.evaluate.answers import LOSS_ONLY_HINT, Answer, StockModel
from train.evaluate.evaluated_model import EvaluatedModel, SampleMaxima, load_directory, load_run
from train.evaluate.evaluation_ranks import EvaluationRanks, describe_row_budgets, explain_out_of_memory
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
from train.evaluate.results import SourceReport, make_result
from train.validation.held_out import HeldOutSet, build_held_out

_Hits = tuple[list[Question], npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]
"""Questions, and whether each was answered exactly with the right image, with the other one, and with the base view of
the right one if it was asked for, bool [num_questions]."""

_QuestionsBySource = dict[str, tuple[list[StoredSample], list[Question], int]]


def evaluate(options: argparse.Namespace, ranks: EvaluationRanks) -> tuple[dict[str, Any], list[Answer]]:
    """Evaluates the model. Every rank must call it.

    Returns:
        All results as plain values, and every answer.

    Raises:
        ConfigError, ModelError, DataError: the model, a store or a metric does not exist, or they do not match.
        EvaluationError: a row or a batch did not fit into memory.
    """
    of_run = is_run(options.path)
    load = load_run if of_run else load_directory
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
    header = {"run" if of_run else "model": str(options.path), "seed": options.seed}
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


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder rather than a model's directory."""
    return (path / "config.yaml").is_file() or not (path / "config.json").is_file()
