"""`python -m train.evaluate RUN|EXPORT`: held-out loss, published metrics of answers, and whether the model looks.

A run is evaluated by its export, on what its mixture holds out; any directory of a model, ours or published, on
prepared sources (--store). For each source: the loss of whole conversations, computed as training computes it; greedy
answers to single questions, judged by the metric that the source's YAML names; and how often the answer is exactly the
truth, with the question's own picture and with another's.
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
from llava_next.model.towers import unsupported_by_stock
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.evaluate.answers import ONLY_LOSSES, Answer, StockModel
from train.evaluate.evaluated_model import Subject, of_directory, of_run
from train.evaluate.image_questions import (
    Accuracy,
    Question,
    answer_all,
    filter_by_length,
    questions_of,
    summarize,
    with_one_picture,
)
from train.evaluate.results import SourceReport, as_result, format_tables
from train.validation.held_out import HeldOut, hold_out

_Hits = tuple[list[Question], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=not torch.cuda.is_available())
    try:
        result, answers = evaluate(options)
    except (ConfigError, ModelError, DataError) as error:
        return report_mistake(error)
    out: Path = options.out or _place_of_figures(options.place)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".answers.jsonl")
    _write(beside, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    _write(out, json.dumps(result, indent=1) + "\n")
    print(format_tables(result))
    for answer in result["generated"]:
        print(f"  {answer['source']}: {answer['text']!r} -> {answer['answer']!r} (truth {answer['truth']!r})")
    print(f"wrote {out} and {beside}")
    return 0


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], list[Answer]]:
    """All figures as plain values, and every answer.

    Raises:
        ConfigError, ModelError, DataError: what is asked for is not there, or does not go together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_run = _is_run(options.place)
    find = of_run if is_run else of_directory
    chosen = dict(pair.split("=", 1) for pair in options.metric)
    subject = find(options.place, options.store, device, num=options.num, seed=options.seed, chosen=chosen)
    why_not = unsupported_by_stock(subject.backbone.hf_config.vision_config)
    if why_not is not None and options.generate != 0:
        raise ModelError(f"{subject.export} cannot answer in stock transformers: {why_not}; {ONLY_LOSSES}")
    losses, held_out = _losses(subject)
    asked: dict[str, tuple[list[StoredSample], list[Question], int]] = {}
    hits: dict[str, _Hits] = {}
    for source in subject.samples:
        with_place = [sample for sample in held_out.samples if sample.source == source]
        samples = with_one_picture(with_place, options.limit)
        questions, num_unasked = filter_by_length(
            subject.processor, samples, questions_of(source, samples, options.limit, options.per_picture)
        )
        asked[source] = samples, questions, num_unasked
        if questions:
            hits[source] = (questions, *answer_all(subject.model, subject.processor, samples, questions))
    answers = _answers(subject, asked, device, options)
    reports = [
        SourceReport(
            source,
            num_left_out=held_out.left_out.get(source, 0),
            **losses[source],
            metric=subject.metrics[source],
            answers=answers.get(source, []),
            accuracy=summarize(*hits[source]) if source in hits else None,
            num_unasked=asked[source][2],
        )
        for source in subject.samples
    ]
    of = {"run" if is_run else "model": str(options.place), "seed": options.seed}
    every = [answer for report in reports for answer in report.answers]
    return as_result(of, reports, _together(list(hits.values()))), every


def _losses(subject: Subject) -> tuple[dict[str, dict[str, Any]], HeldOut]:
    """Samples, supervised tokens and loss of each source."""
    model, names = subject.model, list(subject.samples)
    model.num_sources = len(names)
    hf = subject.backbone.hf_config
    costs = step_costs(
        hf.vision_config,
        hf.text_config,
        projector=subject.backbone.config.projector,
        num_vision_layers=model.num_tower_layers,
        trains_tower=False,
        trains_language_model=False,
    )
    held_out = hold_out(
        subject.samples, names, subject.processor, subject.packing, costs, per_sample=subject.per_sample
    )
    sums = held_out.sums(model, model.hf.model.image_newline.device)
    losses = held_out.losses(sums)
    counts = sums[1:].long().tolist()
    return {
        name: {"num_samples": counts[1][n], "num_tokens": counts[0][n], "loss": losses.get(name)}
        for n, name in enumerate(names)
    }, held_out


def _answers(
    subject: Subject,
    asked: dict[str, tuple[list[StoredSample], list[Question], int]],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, list[Answer]]:
    """Free answers to the first questions of each source; the packed model makes room for the stock one."""
    num = options.limit if options.generate is None else options.generate
    if not num or not any(questions for _, questions, _ in asked.values()):
        return {}
    subject.model.to("meta")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    stock = StockModel(
        subject.export,
        subject.processor,
        device,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    return {
        source: stock.answers(samples, questions[:num], subject.metrics[source])
        for source, (samples, questions, _) in asked.items()
    }


def _together(hits: list[_Hits]) -> Accuracy | None:
    """The questions of all sources as one."""
    if not hits:
        return None
    questions = [question for each, _, _ in hits for question in each]
    return summarize(questions, np.concatenate([hit[1] for hit in hits]), np.concatenate([hit[2] for hit in hits]))


def _is_run(place: Path) -> bool:
    return (place / "config.yaml").is_file() or not (place / "config.json").is_file()


def _place_of_figures(place: Path) -> Path:
    """A run's lie in its folder; a model may be somebody else's, and is left as it is."""
    return (
        place / "evaluation.json" if _is_run(place) else Path("outputs") / "evaluate" / f"{place.resolve().name}.json"
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # a broken record may hold half a character
    partial.rename(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "place",
        type=Path,
        metavar="RUN|EXPORT",
        help="the folder of a stage that wrote an export, or a directory of a LLaVA or LLaVA-NeXT for transformers",
    )
    parser.add_argument(
        "--store",
        type=Path,
        action="append",
        default=[],
        metavar="STORE",
        help="a prepared source (several times: several); of a run, instead of what it holds out",
    )
    parser.add_argument("--num", type=int, default=512, help="at most so many samples of each source (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples of --store (%(default)s)")
    parser.add_argument("--limit", type=int, default=600, help="at most so many questions of each source (%(default)s)")
    parser.add_argument("--per-picture", type=int, default=4, help="questions of each picture (%(default)s)")
    parser.add_argument("--generate", type=int, help="questions of each source answered freely (default: all; 0: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered at a time (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="the longest free answer (%(default)s)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="SOURCE=METRIC",
        help="judge a source's answers by another metric than its YAML names",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the figures go (default: RUN/evaluation.json, outputs/evaluate/EXPORT.json); the answers go beside "
        "them, as .answers.jsonl",
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
