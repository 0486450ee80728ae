"""The step bench on one GPU: CLIP ViT-L/14-336 and a language model that fills the card, in bf16, against stock.

    python scripts/bench/gpu.py [--profile] [--variants compiled plain liger deterministic]
    python scripts/bench/gpu.py --device cpu --tiny      the whole program without a GPU, for what it is worth

Layers of a 7B as many as the card's memory holds, random weights, rows of packing.max_tokens; stock
transformers pads, with fp32 weights under autocast, at the largest batch that fits. Useful MFU is the share of the
data sheet's dense bf16 rate that the samples' own FLOPs take (costs.py and the head at supervised positions): padding,
imbalance, input and optimizer are inside, so they lower it, and recompute does not count.

Owns the card's numbers and the table. What is compared, and how, is the step bench's: materials.py, runs.py.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from job import Job, Outcome
from materials import SHAPES, Shape, prepared
from profiling import profile_table
from results import RESULTS, machine_facts, save, table
from runs import BenchError, Competitor, check_same_work, run_all, samples_per_s, vicuna_tokenizer

from train.observability.rates import DENSE_BF16_TFLOPS, peak_tflops

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "liger": {"liger": True},
    "deterministic": {"compile": True, "deterministic": True},
    "recompute": {"compile": True, "recompute": True},
}
"""What a run may change about its kernels without learning anything else: changes to the Job."""

SAME_LOSS_BF16 = 5.0e-3

# Bytes that training takes, without recompute. A parameter: bf16 weight and gradient, fp32 weight, gradient and two
# moments. A token in a layer of the language model (D wide, its MLP I wide): 36 D + 8 I; a patch in a tower's: 44 D.
# With recompute 2 D of each, and one layer more in full.
PARAMETER_BYTES = 20
USABLE = 0.90


def layers_that_fit(memory_bytes: float, max_tokens: int, shape: Shape, *, recompute: bool = False) -> int:
    """Layers of the language model with which a row of `max_tokens` fits a card; at least one."""
    width, mlp, tower = shape.width, shape.mlp, shape.tower_width
    whole = max_tokens * (36 * width + 8 * mlp)
    layer = PARAMETER_BYTES * (4 * width * width + 3 * width * mlp) + (2 * width * max_tokens if recompute else whole)
    patches = (shape.tile // shape.patch) ** 2
    tiles = 5 * max_tokens / 2400  # a picture of five tiles makes about as many tokens
    tower_parameters = shape.tower_layers * 12 * tower * tower
    rest = PARAMETER_BYTES * (2 * shape.vocabulary * width + tower_parameters + tower * width + width * width)
    rest += int(tiles * patches * shape.tower_layers * (2 if recompute else 44) * tower) + (whole if recompute else 0)
    return max(1, int((USABLE * memory_bytes - rest) // layer))


def result_name(device_name: str) -> str:
    """Of the JSON file: gpu_h100, or gpu where the device is in no table."""
    card = next((name for name, _ in DENSE_BF16_TFLOPS if name in device_name), None)
    return f"gpu_{card.lower().replace(' ', '_')}" if card else "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 if there is a result, 1 if there is none."""
    options = _options(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("bench: there is no CUDA device here; --device cpu --tiny runs the program without one", file=sys.stderr)
        return 1
    device_name = torch.cuda.get_device_name() if on_gpu else "CPU"
    rate = options.peak_tflops or peak_tflops(device_name)
    if rate is None and on_gpu:
        print(f"bench: the dense bf16 rate of {device_name} is not known: give --peak-tflops", file=sys.stderr)
        return 1
    job = Job(
        folder="",
        result="",
        batch=0,
        samples_per_step=options.samples,
        num_steps=options.steps,
        trains_tower=True,
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
    command = ["python", "scripts/bench/gpu.py", *(arguments if arguments is not None else sys.argv[1:])]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "tokenizer")}
    try:
        for outcomes, fitted in _measured(options, job, shape):  # kept after each: a lent GPU may be gone
            results = summary(outcomes, options.samples, rate)
            content = {**settings, "model": asdict(fitted), "competitors": results}
            path = save(result_name(device_name), command, facts, content, options.out)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print("\n" + results_table(results))
    profile = next(iter(outcomes.values())).profile
    if profile:
        print("\n" + profile_table(profile))
    print(f"\nwrote {path}")
    return 0


def _measured(options: argparse.Namespace, job: Job, shape: Shape) -> Iterator[tuple[dict[str, Outcome], Shape]]:
    """What has been measured so far, after each competitor: ours, with a layer less as often as the card asks for it;
    stock at the first batch that fits; our other variants."""
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
            for batch in options.batches:
                found = _if_it_fits(Competitor(f"stock, batch {batch}", "stock", batch=batch), given)
                outcomes |= found
                if found:
                    break
            check_same_work(outcomes, SAME_LOSS_BF16)
            yield outcomes, shape
            for variant in others:
                outcomes |= _if_it_fits(variant, given)
                check_same_work(outcomes, SAME_LOSS_BF16)
                yield outcomes, shape
            return


def _if_it_fits(competitor: Competitor, job: Job) -> dict[str, Outcome]:
    try:
        return run_all([competitor], job)
    except BenchError as error:
        if not _is_out_of_memory(error):
            raise
        print(f"  {competitor.name} does not fit", flush=True)
        return {}


def _is_out_of_memory(error: BenchError) -> bool:
    return "out of memory" in str(error).lower()


def summary(outcomes: Mapping[str, Outcome], samples_per_step: int, rate: float | None) -> dict[str, dict[str, object]]:
    """Plain values of each competitor. MFU of tower and language model apart where the tower was watched."""
    ours = next(iter(outcomes.values()))  # counted from its plans; stock does the same samples
    flops, tower_flops = median(ours.flops[1:]), median(ours.tower_flops[1:])
    num_tokens = sum(ours.num_tokens[1:])
    values = {}
    for name, outcome in outcomes.items():
        seconds = median(outcome.seconds[1:])
        watched: dict[str, object] = {}
        if outcome.tower_seconds:
            tower_seconds = median(outcome.tower_seconds[1:])
            watched["tower_mfu"] = _mfu(tower_flops, tower_seconds, rate)
            watched["language_model_mfu"] = _mfu(flops - tower_flops, seconds - tower_seconds, rate)
            watched["tower_share_of_time"] = tower_seconds / seconds
        values[name] = {
            "samples_per_s": samples_per_s(outcome, samples_per_step),
            "tokens_per_s": num_tokens / sum(outcome.seconds[1:]),
            "mfu": _mfu(flops, seconds, rate),
            **watched,
            "gemm_mfu": outcome.gemm_tflops / rate if rate else None,
            "peak_gib": outcome.peak_gib,
            "first_loss": outcome.losses[0],
            "steps": asdict(outcome),
        }
    return values


def _mfu(flops: float, seconds: float, rate: float | None) -> float | None:
    return flops / seconds / 1e12 / rate if rate else None


def results_table(results: Mapping[str, Mapping[str, object]]) -> str:
    """One line for each competitor."""
    columns = (
        ("samples_per_s", "samples/s", ".2f"),
        ("tokens_per_s", "tokens/s", ",.0f"),
        ("mfu", "useful MFU", ".1%"),
        ("tower_mfu", "of the tower", ".1%"),
        ("language_model_mfu", "of the LM", ".1%"),
        ("gemm_mfu", "torch.mm alone", ".1%"),
        ("peak_gib", "peak GiB", ".1f"),
        ("first_loss", "first loss", ".4f"),
    )
    rows = [
        (name, *("" if values.get(key) is None else format(values[key], form) for key, _, form in columns))
        for name, values in results.items()
    ]
    return table(("", *(title for _, title, _ in columns)), rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
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
    parser.add_argument("--samples", type=int, default=64, help="of a step (default 64)")
    parser.add_argument("--steps", type=int, default=6, help="the first is not timed (default 6)")
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


if __name__ == "__main__":
    raise SystemExit(main())
