"""A training step on one GPU: CLIP ViT-L/14-336 and a language model that fills the card, in bf16, against stock.

    python scripts/bench/step.py gpu [--profile] [--variants compiled plain liger deterministic]
    python scripts/bench/step.py gpu --device cpu --tiny      exercises the program without a GPU

The language model has as many layers of a 7B as the memory of the card holds, random weights, and rows of --max-tokens.
Stock transformers pads, with fp32 weights under autocast, at the largest batch that fits. Useful MFU is the rate of the
samples' own FLOPs (`StepCosts` and the head at supervised positions) as a share of the data sheet's dense bf16 rate:
padding, imbalance, input and optimizer lower it, and recompute is not counted. Results:
scripts/bench/results/gpu_*.json.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from measuring.result_files import RESULTS, columns_table, machine_facts, save
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
from training_step.materials import SHAPES, Shape, prepared
from training_step.profiling import profile_table

from data_recipes.schema.arguments import ArgumentParser
from train.config.hardware_files import known_name, matching_files, peak_bf16_tflops

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "liger": {"liger": True},
    "deterministic": {"compile": True, "deterministic": True},
    "recompute": {"compile": True, "recompute": True},
}
"""Changes to the Job that change kernels and memory, and nothing that is learned."""

STOCK_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sdpa": {},
    "flash_attention_2": {"attention": "flash_attention_2"},
    "compiled": {"compile": True},
    "liger": {"attention": "flash_attention_2", "liger": True},
}
"""The same of stock transformers' Trainer."""

SAME_LOSS_BF16 = 5.0e-3

# Bytes of training without recompute. Per parameter: bf16 weight and gradient, fp32 weight, gradient and two moments.
# Per token in a layer of the language model (width D, MLP width I): 36 D + 8 I. Per patch in a layer of the tower:
# 44 D. With recompute 2 D of each, and one layer in full.
PARAMETER_BYTES = 20
USABLE = 0.90


def layers_that_fit(memory_bytes: float, max_tokens: int, shape: Shape, *, recompute: bool = False) -> int:
    """Layers of the language model with which a row of `max_tokens` fits on the card; at least one."""
    width, mlp, tower = shape.width, shape.mlp, shape.tower_width
    whole = max_tokens * (36 * width + 8 * mlp)
    layer = PARAMETER_BYTES * (4 * width * width + 3 * width * mlp) + (2 * width * max_tokens if recompute else whole)
    patches = (shape.tile // shape.patch) ** 2
    tiles = 5 * max_tokens / 2400  # an image of five tiles has about as many tokens
    tower_parameters = shape.tower_layers * 12 * tower * tower
    rest = PARAMETER_BYTES * (2 * shape.vocabulary * width + tower_parameters + tower * width + width * width)
    rest += int(tiles * patches * shape.tower_layers * (2 if recompute else 44) * tower) + (whole if recompute else 0)
    return max(1, int((USABLE * memory_bytes - rest) // layer))


def result_name(device_name: str) -> str:
    """Name of the JSON file: gpu_h100, or gpu where configs/hardware has no file of the device."""
    files = matching_files(device_name)
    return f"gpu_{known_name(files[0]).lower().replace(' ', '_')}" if files else "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if there is a result, 1 if there is none."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(words)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("bench: there is no CUDA device; --device cpu --tiny runs the program without one", file=sys.stderr)
        return 1
    device_name = torch.cuda.get_device_name() if on_gpu else "CPU"
    rate = options.peak_tflops or peak_bf16_tflops(device_name)
    if rate is None and on_gpu:
        print(f"bench: the dense bf16 rate of {device_name} is not known: give --peak-tflops", file=sys.stderr)
        return 1
    job = Job(
        options.samples,
        options.steps,
        threads=options.threads,
        max_tokens=options.max_tokens,
        device=options.device,
        workers=options.workers,
        engine=options.engine,
        recompute=options.recompute,
    )
    shape = SHAPES["tiny" if options.tiny else "large"]
    if not options.tiny:
        memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 80e9
        fitting = layers_that_fit(memory, options.max_tokens, shape, recompute=options.recompute)
        shape = replace(shape, layers=options.layers or fitting)
    facts = machine_facts(device=device_name, dense_bf16_tflops=rate, cuda=torch.version.cuda)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "tokenizer")}
    not_run: dict[str, str] = {}
    try:
        for outcomes, fitted in _measured(options, job, shape, not_run):  # saved after each: the GPU may be taken away
            results = summary(outcomes, options.samples, rate)
            shares = head_shares(next(iter(outcomes.values())))
            content = {**settings, "model": asdict(fitted), **shares, "competitors": results, "not_run": not_run}
            path = save(result_name(device_name), "step.py gpu", words, content, options.out, facts)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"\n{columns_table(COLUMNS, results)}\n{describe_head(shares)}")
    profile = next(iter(outcomes.values())).profile
    if profile:
        print("\n" + profile_table(profile))
    print(f"\nwrote {path}")
    return 0


def _measured(
    options: argparse.Namespace, job: Job, shape: Shape, not_run: dict[str, str]
) -> Iterator[tuple[dict[str, Outcome], Shape]]:
    """Yields the outcomes so far after each competitor: ours, with fewer layers where memory does not suffice; each
    variant of stock at the first batch that fits; our other variants. `not_run` gets the reasons of those left out."""
    first, *others = [Competitor(f"ours, {name}", "ours", changes=VARIANTS[name]) for name in options.variants]
    while True:
        print(f"{shape.layers} layers, rows of {job.max_tokens} tokens; making the model and the samples", flush=True)
        with prepared(shape, options.tokenizer or vicuna_tokenizer(), job) as given:
            try:
                outcomes = run_all([first], replace(given, profile=options.profile))
            except BenchError as error:
                if not _is_out_of_memory(error) or shape.layers == 1:
                    raise
                shape = replace(shape, layers=shape.layers - 1)
                continue
            yield outcomes, shape
            for name in options.stock:
                for batch in options.batches:
                    stock = Competitor(f"stock {name}, batch {batch}", "stock", batch, changes=STOCK_VARIANTS[name])
                    outcome = _run_if_possible(stock, given, not_run)
                    outcomes |= outcome
                    if outcome or stock.missing_requirement:
                        break
                check_same_work(outcomes, SAME_LOSS_BF16)
                yield outcomes, shape
            for variant in others:
                outcomes |= _run_if_possible(variant, given, not_run)
                check_same_work(outcomes, SAME_LOSS_BF16)
                yield outcomes, shape
            return


def _run_if_possible(competitor: Competitor, job: Job, not_run: dict[str, str]) -> dict[str, Outcome]:
    """The outcome; empty if a package is missing or memory does not suffice, with the reason in `not_run`."""
    reason = competitor.missing_requirement
    if reason is None:
        try:
            return run_all([competitor], job)
        except BenchError as error:
            if not _is_out_of_memory(error):
                raise
            reason = "memory does not suffice"
    not_run[competitor.name] = reason
    print(f"  {competitor.name}: not run, {reason}", flush=True)
    return {}


def _is_out_of_memory(error: BenchError) -> bool:
    return "out of memory" in str(error).lower()


def summary(outcomes: Mapping[str, Outcome], samples_per_step: int, rate: float | None) -> dict[str, dict[str, object]]:
    """Plain values of each competitor; separate MFU of tower and language model where the tower was timed."""
    ours = next(iter(outcomes.values()))  # counted from its plans; stock has the same samples
    flops, tower_flops = median(ours.flops[1:]), median(ours.tower_flops[1:])
    tokens_per_step = fmean(ours.num_tokens[1:])  # outcomes can have different numbers of timed steps
    values = {}
    for name, outcome in outcomes.items():
        seconds = median(outcome.seconds[1:])
        parts: dict[str, object] = {}
        if outcome.tower_seconds:
            tower_seconds = median(outcome.tower_seconds[1:])
            parts["tower_mfu"] = _mfu(tower_flops, tower_seconds, rate)
            parts["language_model_mfu"] = _mfu(flops - tower_flops, seconds - tower_seconds, rate)
            parts["tower_share_of_time"] = tower_seconds / seconds
        values[name] = {
            "samples_per_s": samples_per_s(outcome, samples_per_step),
            "tokens_per_s": tokens_per_step / fmean(outcome.seconds[1:]),
            "mfu": _mfu(flops, seconds, rate),
            **parts,
            "gemm_mfu": outcome.gemm_tflops / rate if rate else None,
            "peak_gib": outcome.peak_gib,
            "first_loss": outcome.losses[0],
            "steps": asdict(outcome),
        }
    return values


def _mfu(flops: float, seconds: float, rate: float | None) -> float | None:
    return flops / seconds / 1e12 / rate if rate else None


COLUMNS = (
    ("samples_per_s", "samples/s", ".2f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("mfu", "useful MFU", ".1%"),
    ("tower_mfu", "of the tower", ".1%"),
    ("language_model_mfu", "of the LM", ".1%"),
    ("gemm_mfu", "torch.mm alone", ".1%"),
    ("peak_gib", "peak GiB", ".1f"),
    ("first_loss", "first loss", ".4f"),
)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("step.py gpu", description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on tiny tiles, to exercise the program")
    parser.add_argument(
        "--profile", action="store_true", help="the first variant's last step under the profiler, untimed"
    )
    parser.add_argument("--layers", type=int, help="of the language model (default: what the card's memory holds)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a packed row (default 8192)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["compiled", "plain"], help="of ours")
    parser.add_argument("--recompute", action="store_true", help="run blocks again in the backward pass, on both sides")
    parser.add_argument("--engine", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage of ours (default 2)")
    parser.add_argument("--stock", nargs="*", choices=STOCK_VARIANTS, default=[*STOCK_VARIANTS], help="of stock (all)")
    parser.add_argument("--samples", type=int, default=64, help="of a step (default 64)")
    parser.add_argument("--steps", type=int, default=11, help="the first is not timed (default 11)")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 4, 2, 1], help="of stock: the first that fits")
    parser.add_argument("--workers", type=int, default=8, help="reading processes of each competitor (default 8)")
    parser.add_argument("--threads", type=int, default=8, help="of torch on the host (default 8)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 rate of a device that is not in the table")
    parser.add_argument("--tokenizer", type=Path, help="a directory (default: Vicuna's, from the cache)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.steps < 2 + options.profile or any(options.samples % batch for batch in options.batches):
        parser.error("--steps must be at least 2 (3 with --profile), and --samples a multiple of every batch")
    return options
