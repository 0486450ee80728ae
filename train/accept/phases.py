"""The checks, in their order. Every rank runs every phase; rank 0 compares, and all get its answer.

A phase returns what it found. It fails by the problem that it returns or by a PhaseError, and is reported as not run by
NotRun.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.accept.bench import Bench, NotRun
from train.accept.compare import TOLERANCES, WHY, compare_runs, read_metrics
from train.accept.measurements import bandwidth, export, hardware, save, speed
from train.accept.outcome import Check, Finding
from train.accept.ranks import PhaseError
from train.accept.row_coverage import count_kinds
from train.checkpoint import atomic_folder
from train.checkpoint.saver import place_name
from train.config.schema import ConfigError

REFERENCE = "one_rank"
_LEAST_S = 20.0
"""With less time left, a phase is not begun."""
_RECOMPUTE = "recompute=[language_model]"
_BF16_LOSS = {"loss": 2e-2}
_WHY_BF16 = "bf16 keeps 8 bits of a number: sums in another order differ by up to 4e-3 each"


@dataclass(frozen=True)
class Phase:
    """One check: its name, what is compared, and how it is carried out."""

    name: str
    compared: str
    run: Callable[[Bench], Finding]


def phases(num_ranks: int, *, quick: bool, base: str, own: Sequence[str], own_ranks: int) -> list[Phase]:
    """The checks of this number of ranks. With one rank, nothing between ranks is checked.

    Args:
        base: name of the hardware file whose numbers stand where nothing is measured.
        own: the command line of the user's own run; empty for none.
        own_ranks: ranks that it is compared with.
    """
    half = max(1, num_ranks // 2)
    found = [Phase(REFERENCE, "the tiny model on one rank, ZeRO 0: every loss is finite", reference)]
    for name in ("zero3",) if quick else ("zero1", "zero2", "zero3"):
        text = f"{name} on {num_ranks} ranks against ZeRO 0 on one: losses, gradient norms, weights"
        found.append(Phase(name, text, partial(equal, name=name, engine=name)))
        if not quick:
            run = partial(equal, name=f"{name}_recompute", engine=name, more=(_RECOMPUTE,))
            found.append(Phase(f"{name}_recompute", f"{text}; with {_RECOMPUTE}", run))
    if not quick:
        for name in ("zero2", "zero3"):
            text = f"{name} killed on {num_ranks} ranks, resumed on {half}, against the undisturbed run on one rank"
            found.append(Phase(f"resume_{name}", text, partial(resume, name=f"resume_{name}", engine=name)))
        found += [
            Phase("export", "a checkpoint exported; stock transformers' logits against ours", export),
            Phase("speed", "measured: rate of a slice of a real width", speed),
            Phase("save", "measured: time of a checkpoint, and how long the ranks wait for it", save),
        ]
    if num_ranks > 1:
        found += [
            Phase("links", "measured: all-gather and reduce-scatter between the ranks", bandwidth),
            Phase("hardware", "the planner reads the measured machine", partial(hardware, base=base)),
        ]
    if own:
        text = f"own configuration: {num_ranks} ranks against {own_ranks}, losses of the first steps"
        found.append(Phase("own", text, partial(own_runs, words=own, num_ranks=own_ranks)))
    return found


def run_phases(bench: Bench, chosen: Sequence[Phase]) -> Iterator[Check]:
    """The checks, each as soon as it is done. Every rank must take them all."""
    try:
        bench.prepare()
    except (PhaseError, ConfigError) as error:
        for phase in chosen:
            yield Check(phase.name, phase.compared, "not run", reason=f"the materials could not be made: {error}")
        return
    for phase in chosen:
        started = time.monotonic()
        try:
            if bench.left_s() < _LEAST_S:
                raise NotRun("the time was over before it began")
            found = phase.run(bench)
        except NotRun as error:
            yield Check(phase.name, phase.compared, "not run", time.monotonic() - started, reason=str(error))
        except (PhaseError, ConfigError) as error:
            yield Check(phase.name, phase.compared, "failed", time.monotonic() - started, reason=str(error))
        else:
            yield Check(
                phase.name,
                phase.compared,
                "failed" if found.problem else "passed",
                round(time.monotonic() - started, 1),
                found.summary,
                found.numbers,
                found.tolerances,
                found.why,
                found.problem,
            )


def reference(bench: Bench) -> Finding:
    """The run that the others are compared with."""
    ended = bench.train_tiny(REFERENCE, "zero0", 1, limit_s=bench.limit_s)
    if not ended.succeeded:
        return Finding(problem=bench.problem_of(ended, REFERENCE))
    losses = bench.ranks.on_main(lambda: [line["train/loss"] for line in read_metrics(bench.run_dir(REFERENCE))])
    if len(losses) != len(bench.kinds) or None in losses:
        return Finding(problem=f"{len(bench.kinds)} finite losses were expected: {losses}")
    bench.reference_ok = True
    counts = count_kinds(bench.kinds)
    numbers = {"losses": losses, "rows": counts, "batch_size": bench.sizes.batch_size, "last_batch": bench.sizes.last}
    rows = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return Finding(f"loss {losses[0]:.4f} to {losses[-1]:.4f}; rows on {bench.ranks.size} ranks: {rows}", numbers)


def equal(bench: Bench, *, name: str, engine: str, more: tuple[str, ...] = ()) -> Finding:
    """A run on all ranks against the reference."""
    bench.needs_reference()
    ended = bench.train_tiny(name, engine, bench.ranks.size, *more, limit_s=bench.limit_s)
    if not ended.succeeded:
        return Finding(problem=bench.problem_of(ended, name))
    return _against_reference(bench, name)


def resume(bench: Bench, *, name: str, engine: str) -> Finding:
    """A run that is killed after its first checkpoint, and gone on with by half of the ranks."""
    bench.needs_reference()
    first = bench.run_dir(name) / "checkpoints" / place_name(2)
    half = max(1, bench.ranks.size // 2)
    saves = ("save.every=2", "save.keep=9")
    ended = bench.train_tiny(
        name,
        engine,
        bench.ranks.size,
        *saves,
        limit_s=bench.limit_s,
        kill_when=partial(atomic_folder.is_complete, first),
    )
    if not ended.killed:
        problem = bench.problem_of(ended, name) or "the run ended before it could be killed"
        return Finding(problem=problem)
    done = bench.ranks.on_main(lambda: len(read_metrics(bench.run_dir(name))))
    ended = bench.train_tiny(name, engine, half, *saves, limit_s=bench.limit_s)
    if not ended.succeeded:
        return Finding(problem=f"resumed on {half}: {bench.problem_of(ended, name)}")
    starts = bench.ranks.on_main(lambda: _starts(bench.run_dir(name)))
    if [ranks for ranks, _ in starts] != [bench.ranks.size, half] or not starts[-1][1]:
        return Finding(problem=f"not resumed from a checkpoint: (ranks, first step) of its starts are {starts}")
    bench.checkpoint = first
    found = _against_reference(bench, name)
    numbers = found.numbers | {"killed_in_step": done, "resumed_at_step": starts[-1][1], "resumed_on": half}
    summary = f"killed in step {done + 1}, resumed after step {starts[-1][1]} on {half}: {found.summary}"
    return Finding(summary, numbers, found.tolerances, found.why, found.problem)


def own_runs(bench: Bench, *, words: Sequence[str], num_ranks: int) -> Finding:
    """The user's own configuration, three steps on all ranks and on fewer."""
    names = {"own": bench.ranks.size, "own_fewer": num_ranks}
    common = [f"root={bench.out / 'runs'}", "max_steps=3", "save.every=0", "log.wandb=off"]
    for name, size in names.items():
        ended = bench.run(name, ["train", *words, *common, f"name={name}"], size, limit_s=900.0)
        if not ended.succeeded:
            return Finding(problem=f"on {size} ranks: {bench.problem_of(ended, name)}")

    def compared() -> Finding:
        own, fewer = [next((bench.out / "runs" / name).glob("*/metrics.jsonl")).parent for name in names]
        starts = json.loads((own / "starts.jsonl").read_text().splitlines()[-1])
        exact = starts["dtype"] == "float32"
        tolerances = {key: TOLERANCES[key] for key in ("loss", "grad_norm")} if exact else _BF16_LOSS
        found = compare_runs(own, fewer, tolerances, weights=False)
        why = WHY if exact else _WHY_BF16
        return Finding(found.summary, found.numbers, tolerances, why, found.problem)

    return bench.ranks.on_main(compared)


def _against_reference(bench: Bench, name: str) -> Finding:
    def compared() -> Finding:
        run_dir = bench.run_dir(name)
        found = compare_runs(run_dir, bench.run_dir(REFERENCE), TOLERANCES, weights=True)
        return Finding(found.summary, found.numbers, TOLERANCES, WHY, found.problem or _other_rows(bench, run_dir))

    return bench.ranks.on_main(compared)


def _other_rows(bench: Bench, run_dir: Path) -> str:
    """A sentence where the run's last step had other micro-steps than were computed beforehand; else empty."""
    last = read_metrics(run_dir)[-1]
    num_ranks = int(_starts(run_dir)[-1][0])
    if num_ranks == bench.ranks.size and last["perf/micro_steps"] != len(bench.kinds[-1]):
        return f"its last step had {last['perf/micro_steps']} micro-steps, computed were {len(bench.kinds[-1])}"
    return ""


def _starts(run_dir: Path) -> list[tuple[int, int]]:
    """(ranks, first step) of every start of a run."""
    lines = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    return [(line["ranks"], line["step"]) for line in lines]
