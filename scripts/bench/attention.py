"""What this package's attention on a CPU saves over torch's SDPA, one call a sample: `varlen` and `sdpa` of the key
`attention`, in turns, in one process.

    python scripts/bench/attention.py

Rows of about 4,096 tokens as a language model sees them, and tiles as a tower does, fp32. Rates are of useful FLOPs
(products of the scores that are seen, three times forward's in all, though both compute scores a second time), as
shares of a large product's; seconds are the medians of the rounds, ratios those of each round. Results:
scripts/bench/results/attention.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from job import gemm_tflops
from results import RESULTS, machine_facts, save, table
from torch import nn

from llava_next.config import AttentionKernel
from llava_next.inputs.batch import Segments
from llava_next.kernels.attention import segment_attention, tile_attention

KERNELS: tuple[AttentionKernel, ...] = ("varlen", "sdpa")


@dataclass(frozen=True)
class Case:
    """Attention of one layer: of a row of samples (causal), or of tiles."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    causal: bool = True

    @property
    def flops(self) -> float:
        """Useful ones, forward and backward."""
        pairs = sum(length**2 / 2 if self.causal else length**2 for length in self.lengths)
        return 3.0 * 4 * pairs * self.heads * self.width


CASES = (
    Case("one long sample", (4096,), 6, 6, 64),
    Case("two samples", (2200, 1800), 6, 6, 64),
    Case("samples of 600", (600,) * 7, 6, 6, 64),
    Case("samples of 150", (150,) * 27, 6, 6, 64),
    Case("heads of 128", (2200, 1800), 4, 4, 128),
    Case("grouped heads", (2200, 1800), 14, 2, 64),
    Case("tiles of ViT-L/14-336", (577,) * 5, 16, 16, 64, causal=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    gemm = gemm_tflops("cpu")
    found = {}
    for case in CASES:
        rounds = measure(case, options.rounds)
        found[case.name] = {
            **asdict(case),
            "seconds": {kernel: median(seconds[kernel] for seconds in rounds) for kernel in KERNELS},
            "times_as_fast": median(seconds["sdpa"] / seconds["varlen"] for seconds in rounds),
            "rounds": rounds,
        }
    gemm = max(gemm, gemm_tflops("cpu"))
    rows = []
    for case in CASES:
        values = found[case.name]
        seconds: Any = values["seconds"]
        shares = [f"{case.flops / seconds[kernel] / 1e12 / gemm:.0%}" for kernel in KERNELS]
        rows.append((case.name, *shares, f"{values['times_as_fast']:.2f}"))
    print(table(("forward and backward", *KERNELS, "times as fast"), rows))
    print(f"shares of a large product's rate, {1e3 * gemm:.0f} GFLOP/s")
    command = ["python", "scripts/bench/attention.py", *(arguments if arguments is not None else sys.argv[1:])]
    facts = machine_facts(threads=options.threads)
    print(f"\nwrote {save('attention', command, facts, {'gemm_tflops': gemm, 'cases': found}, options.out)}")
    return 0


def measure(case: Case, num_rounds: int) -> list[dict[str, float]]:
    """Seconds of forward and backward by each kernel, round by round; a first round is not counted."""
    torch.manual_seed(0)
    query, key, value = _states(case, case.heads), _states(case, case.kv_heads), _states(case, case.kv_heads)
    run = _in_a_row(case) if case.causal else _in_tiles(case)
    rounds = []
    for number in range(num_rounds + 1):
        seconds: dict[str, float] = {}
        for kernel in KERNELS:
            started = time.perf_counter()
            output = run(kernel, query, key, value)
            torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
            seconds[kernel] = time.perf_counter() - started
        if number:
            rounds.append(seconds)
    return rounds


def _states(case: Case, heads: int) -> torch.Tensor:
    """[1, heads, T, width] of a row or [tiles, heads, patches, width], in the layout in which projections give them."""
    shape = (1, sum(case.lengths)) if case.causal else (len(case.lengths), case.lengths[0])
    return torch.randn(*shape, heads, case.width).transpose(1, 2).requires_grad_()


def _in_a_row(case: Case) -> Callable[..., torch.Tensor]:
    bounds = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32)
    segments = Segments(bounds, case.lengths)
    return lambda kernel, q, k, v: segment_attention(nn.Module(), q, k, v, None, segments=segments, kernel=kernel)[0]


def _in_tiles(case: Case) -> Callable[..., torch.Tensor]:
    def run(kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kernel == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return tile_attention(nn.Module(), q, k, v, None, is_causal=False)[0]

    return run


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="that are counted (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
