"""A training step of this project, of stock transformers and of the authors' trainer, on this machine's cores.

    python scripts/bench/step.py cpu [--quick] [--profile] [--shape sets]

One small model with real geometry (336-pixel tiles, samples of 2,000 to 3,200 tokens of the second stage's mixture),
the same weights and samples for all; forward, backward, optimizer and input are timed. Each competitor runs in a
process of its own, one after the other, in reversed order in every other repetition. Their first losses must be equal.
The narrower a model, the larger the share of its head, which this project runs at supervised positions only and the
others at every position: the head's shares are printed, and the default model is the wide one.
Stock transformers needs `./scripts/setup.sh --extras bench`, the authors' trainer ./scripts/oracles.sh. Results:
scripts/bench/results/step.json; of `--shape sets`, where half of the samples are sets of images and the model is a
LLaVA-OneVision, step_sets.json.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from measuring.result_files import RESULTS, columns_table, machine_facts, save, table
from training_step.competitors import (
    BenchError,
    Competitor,
    check_same_work,
    describe_head,
    head_shares,
    run_all,
    samples_per_s,
    vicuna_tokenizer,
)
from training_step.job import Job, Outcome
from training_step.materials import SHAPES, prepared
from training_step.profiling import profile_table

from data_recipes.schema.arguments import ArgumentParser

OURS = Competitor("ours", "ours")
STOCK_1 = Competitor("stock-1", "stock", batch=1)
STOCK_4 = Competitor("stock-4", "stock", batch=4)
OURS_FROZEN = Competitor("ours-frozen", "ours", trains_tower=False)
AUTHORS_4 = Competitor("authors-4", "authors", batch=4, trains_tower=False)
COMPETITORS = (OURS, STOCK_1, STOCK_4, OURS_FROZEN, AUTHORS_4)
"""Numbers are batch sizes. The authors' package trains no tower, so it is compared with ours with a frozen tower."""
VARIANTS = (
    Competitor("ours-compiled", "ours", changes={"compile": True}),
    Competitor("ours-recompute", "ours", changes={"recompute": True}),
)
"""This project's trainer with another option; run only if `--only` names them."""

Runs = Sequence[Mapping[str, Outcome]]
"""The outcomes of each repetition, by competitor."""


@dataclass(frozen=True)
class Comparison:
    """A ratio of two competitors, in samples per second or in peak memory."""

    what: str
    ours: str
    theirs: str
    is_memory: bool = False

    def ratios(self, runs: Runs, by: Callable[[Outcome], float] | None = None) -> list[float]:
        """The ratio in each repetition in which both ran.

        Args:
            by: the time of a run; by default the wall time of its timed steps.
        """
        pairs = [(run[self.ours], run[self.theirs]) for run in runs if self.ours in run and self.theirs in run]
        if self.is_memory:
            return [a.peak_gib / b.peak_gib for a, b in pairs]
        seconds = by or (lambda outcome: sum(outcome.seconds[1:]))
        return [seconds(b) / seconds(a) for a, b in pairs]


COMPARISONS = (
    Comparison("samples/s, stock at batch 4", "ours", "stock-4"),
    Comparison("peak memory, stock at batch 4", "ours", "stock-4", is_memory=True),
    Comparison("samples/s, stock at batch 1", "ours", "stock-1"),
    Comparison("samples/s, authors' at batch 4", "ours-frozen", "authors-4"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if there is a result, 1 if there is none."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    job = Job(
        options.samples,
        options.steps,
        threads=options.threads,
        max_tokens=options.max_tokens,
        engine=options.engine,
    )
    chosen = [competitor for competitor in (*COMPETITORS, *VARIANTS) if competitor.name in options.only]
    for competitor in [competitor for competitor in chosen if competitor.missing_requirement]:
        print(f"{competitor.name} is left out: {competitor.missing_requirement}")
        chosen.remove(competitor)
    try:
        tokenizer = options.tokenizer or vicuna_tokenizer()
        with prepared(SHAPES[options.shape], tokenizer, job) as job:
            runs = []
            for repetition in range(options.repetitions):
                print(f"repetition {repetition + 1} of {options.repetitions}", flush=True)
                outcomes = run_all(chosen if repetition % 2 == 0 else chosen[::-1], job)
                check_same_work({competitor.name: outcomes[competitor.name] for competitor in chosen})
                runs.append(outcomes)
            profile = OURS.run(replace(job, num_steps=2, profile=True)).profile if options.profile else {}
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    results = summary(runs, options.samples)
    print("\n" + columns_table(COMPETITOR_COLUMNS, results["competitors"]))
    print(f"GEMM: {1e3 * results['gemm_tflops']:.0f} GFLOP/s (a large product, fp32)")
    print(f"{describe_head(results)}\n\n{comparison_table(results['comparisons'])}")
    if profile:
        print("\n" + profile_table(profile))
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "tokenizer")}
    content = {**settings, "model": asdict(SHAPES[options.shape]), **results, "profile_s": profile}
    facts = machine_facts(threads=options.threads)
    print(f"\nwrote {save(_result_name(options.shape), 'step.py cpu', words, content, options.out, facts)}")
    return 0


def _result_name(shape: str) -> str:
    return "step" if SHAPES[shape].images_per_set == (1,) else "step_sets"


def summary(runs: Runs, samples_per_step: int) -> dict[str, Any]:
    """Plain values: medians over the repetitions of each competitor, the head's shares, ratios, all measurements."""
    gemm = max(outcome.gemm_tflops for run in runs for outcome in run.values())
    flops = {name: sum(run[name].flops[1:]) for run in runs for name in run if run[name].flops}
    competitors = {}
    for competitor in (competitor for competitor in (*COMPETITORS, *VARIANTS) if competitor.name in runs[0]):
        name = competitor.name
        outcomes = [run[name] for run in runs]
        # Useful FLOPs are those of our step, also for the competitors that compute more.
        useful = flops.get(name) or flops.get(OURS.name if competitor.trains_tower else OURS_FROZEN.name)
        shares = [useful / sum(o.seconds[1:]) / 1e12 / gemm for o in outcomes] if useful else []
        cpu_seconds = [sum(o.cpu_seconds[1:]) / samples_per_step / len(o.cpu_seconds[1:]) for o in outcomes]
        competitors[name] = {
            "samples_per_s": median(samples_per_s(o, samples_per_step) for o in outcomes),
            "cpu_s_per_sample": median(cpu_seconds),
            "peak_gib": median(o.peak_gib for o in outcomes),
            "first_loss": outcomes[0].losses[0],
            "last_loss": outcomes[0].losses[-1],
            "share_of_gemm": median(shares) if shares else None,
            "repetitions": [asdict(o) for o in outcomes],
        }
    comparisons = []
    for comparison in COMPARISONS:
        ratios = comparison.ratios(runs)
        if ratios:
            cpu_ratio = median(comparison.ratios(runs, by=lambda outcome: sum(outcome.cpu_seconds[1:])))
            values = {"ratio": median(ratios), "ratios": ratios, "cpu_ratio": cpu_ratio}
            comparisons.append({**asdict(comparison), **values})
    head = head_shares(next(outcome for outcome in runs[0].values() if outcome.head_flops))
    return {"gemm_tflops": gemm, **head, "competitors": competitors, "comparisons": comparisons}


COMPETITOR_COLUMNS = (
    ("samples_per_s", "samples/s", ".3f"),
    ("cpu_s_per_sample", "CPU s/sample", ".2f"),
    ("peak_gib", "peak GiB", ".2f"),
    ("share_of_gemm", "useful share of GEMM", ".0%"),
    ("first_loss", "first loss", ".6f"),
    ("last_loss", "last loss", ".6f"),
)


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A table of the ratios. Those of processor time also hold on a machine with other load."""
    rows = [
        (
            each["what"],
            f"{each['ratio']:.2f}",
            f"{min(each['ratios']):.2f} to {max(each['ratios']):.2f}",
            "" if each["is_memory"] else f"{each['cpu_ratio']:.2f}",
        )
        for each in comparisons
    ]
    return table(("ours to", "ratio", "repetitions", "by CPU time"), rows)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("step.py cpu", description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="two steps of four samples, one repetition")
    parser.add_argument("--profile", action="store_true", help="also the time of a step of ours by kind of operation")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="wide", help="of the model (default wide)")
    parser.add_argument("--repetitions", type=int, help="default 2")
    parser.add_argument("--samples", type=int, help="of a step, a multiple of 4 (default 8)")
    parser.add_argument("--steps", type=int, help="of each run; the first is not timed (default 4)")
    parser.add_argument("--max-tokens", type=int, help="of a packed row (default 6400, of sets 8000)")
    parser.add_argument("--engine", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage of ours (default 0)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    names = [competitor.name for competitor in COMPETITORS]
    choices = [*names, *(variant.name for variant in VARIANTS)]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=choices,
        help="some of them, including one of ours (default: all; of sets ours, stock-1 and stock-4)",
    )
    parser.add_argument("--tokenizer", type=Path, help="a directory (default: Vicuna's, from the cache)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    options.repetitions = options.repetitions or (1 if options.quick else 2)
    options.samples = options.samples or (4 if options.quick else 8)
    options.steps = options.steps or (2 if options.quick else 4)
    has_sets = SHAPES[options.shape].images_per_set != (1,)
    options.only = options.only or (names[:3] if has_sets else names)
    options.max_tokens = options.max_tokens or max(6400, SHAPES[options.shape].window[1])
    if options.samples % 4 or options.steps < 2:
        parser.error("--samples must be a multiple of 4 and --steps at least 2")
    if has_sets and AUTHORS_4.name in options.only:
        parser.error("--only must not name authors-4 for sets: its package has no OneVision")
    if not set(options.only) & {OURS.name, OURS_FROZEN.name}:
        parser.error("--only must name ours or ours-frozen: FLOPs are counted there")
    return options
