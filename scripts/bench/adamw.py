"""What AdamW's fused kernel saves over torch's other two, on this machine's device.

    python scripts/bench/adamw.py [--millions 100] [--device cuda]

One step over matrices of that many parameters in all, fp32, gradients given: *fused* (what training uses), *foreach*
(torch's own choice on a GPU) and *loop* (its own choice on a CPU), in turns, in one process. Seconds are the medians of
the rounds, ratios those of each round. Results: scripts/bench/results/adamw.json.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import RESULTS, machine_facts, save, table

WIDTH = 1024
KINDS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    options = _options(arguments)
    rounds = measure(round(options.millions * 1e6 / WIDTH**2), options.rounds, options.device)
    found = {
        kind: {
            "step_s": median(seconds[kind] for seconds in rounds),
            "times_fused": median(seconds[kind] / seconds["fused"] for seconds in rounds),
        }
        for kind in KINDS
    }
    rows = [(kind, f"{values['step_s']:.3f}", f"{values['times_fused']:.2f}") for kind, values in found.items()]
    print(table(("AdamW", "step, s", "times fused"), rows))
    facts = machine_facts(threads=torch.get_num_threads())
    if options.device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    command = ["python", "scripts/bench/adamw.py", *(arguments if arguments is not None else sys.argv[1:])]
    print(f"\nwrote {save('adamw', command, facts, {'kinds': found, 'rounds': rounds}, options.out)}")
    return 0


def measure(num_matrices: int, num_rounds: int, device: str) -> list[dict[str, float]]:
    """Seconds of a step of each kind, round by round; a first round makes the states and is not counted."""
    steppers = {}
    for kind, choice in KINDS.items():
        weights = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, device=device)) for _ in range(num_matrices)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        steppers[kind] = torch.optim.AdamW(weights, lr=1e-5, **choice)
    rounds = []
    for number in range(num_rounds + 1):
        seconds = {kind: _step_seconds(steppers[kind], device) for kind in KINDS}
        if number:
            rounds.append(seconds)
    return rounds


def _step_seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--millions", type=float, default=100.0, help="of parameters (default 100)")
    parser.add_argument("--rounds", type=int, default=7, help="that are counted (default 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
