"""The phases of the acceptance test in order. Every rank runs every phase; rank 0 compares and broadcasts the result.

A phase has failed if its result has a problem or if it raises PhaseError; it is reported as not run if it raises
NotRun.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.acceptance.check_report import Check, PhaseResult
from train.acceptance.compare_runs import TOLERANCE_REASON, TOLERANCES, compare_runs, read_metrics
from train.acceptance.measurements import (
    measure_links,
    measure_save,
    measure_speed,
    run_export,
    write_hardware_file,
)
from train.acceptance.phase_context import NotRun, PhaseContext
from train.acceptance.ranks import PhaseError
from train.acceptance.row_coverage import count_kinds
from train.checkpoint import atomic_folder
from train.checkpoint.saver import checkpoint_name
from train.config.schema import ConfigError

REFERENCE = "one_rank"
_MIN_REMAINING_S = 20.0
"""A phase is not started with less remaining time, in seconds."""
_RECOMPUTE = "recompute=[language_model]"
_BF16_LOSS = {"loss": 2e-2}
_BF16_REASON = "bf16 has 8 significant bits: sums in another order differ by up to 4e-3 each"


@dataclass(frozen=True)
class Phase:
    """One phase: its name, a sentence that says what is compared, and the function that runs it."""

    name: str
    compared: str
    run: Callable[[PhaseContext], PhaseResult]


def list_phases(
    num_ranks: int, *, quick: bool, base: str, user_overrides: Sequence[str], user_ranks: int, num_nodes: int = 1
) -> list[Phase]:
    """Returns the phases for a number of ranks; with one rank, those that measure communication are omitted.

    Args:
        quick: run fewer phases.
        base: name of the hardware file for values that are not measured.
        user_overrides: command line of the user's own configuration; empty for none.
        user_ranks: number of ranks that it is compared with.
        num_nodes: number of hosts; on one, half of the ranks stand for a node.
    """
    half = max(1, num_ranks // 2)
    phases = [Phase(REFERENCE, "the tiny model on one rank, ZeRO 0: every loss is finite", run_reference)]
    for name in ("zero3",) if quick else ("zero1", "zero2", "zero3"):
        text = f"{name} on {num_ranks} ranks compared with ZeRO 0 on one: losses, gradient norms, weights"
        phases.append(Phase(name, text, partial(run_equality, name=name, engine=name)))
        if not quick:
            run = partial(run_equality, name=f"{name}_recompute", engine=name, more=(_RECOMPUTE,))
            phases.append(Phase(f"{name}_recompute", f"{text}; with {_RECOMPUTE}", run))
    size = _ranks_per_copy(num_ranks, num_nodes)
    if not quick and size > 1:
        text = f"zero3_node on {num_ranks} ranks, a copy of the weights in every {size}, compared with ZeRO 0 on one"
        more = (f"engine.zero_optimization.zero_hpz_partition_size={size}",)
        phases.append(
            Phase("zero3_node", text, partial(run_equality, name="zero3_node", engine="zero3_node", more=more))
        )
    if not quick:
        for name in ("zero2", "zero3"):
            text = f"{name} killed on {num_ranks} ranks, resumed on {half}, compared with the reference on one rank"
            phases.append(Phase(f"resume_{name}", text, partial(run_resume, name=f"resume_{name}", engine=name)))
        phases += [
            Phase("export", "export of a checkpoint: logits of stock transformers compared with ours", run_export),
            Phase("speed", "measured: rate of a few blocks of full width", measure_speed),
            Phase("save", "measured: duration of a checkpoint, and how long the ranks wait for it", measure_save),
        ]
    if num_ranks > 1:
        phases += [
            Phase("links", "measured: all-gather and reduce-scatter between the ranks", measure_links),
            Phase("hardware", "the planner reads the hardware file", partial(write_hardware_file, base=base)),
        ]
    if user_overrides:
        text = f"own configuration: {num_ranks} ranks compared with {user_ranks}, losses of the first steps"
        phases.append(
            Phase("own", text, partial(run_user_configuration, overrides=user_overrides, num_ranks=user_ranks))
        )
    return phases


def _ranks_per_copy(num_ranks: int, num_nodes: int) -> int:
    """The ranks of a node; on one node half of the ranks. 0: a node has one rank, or not the same number as another."""
    num_nodes = max(2, num_nodes)
    return num_ranks // num_nodes if num_ranks % num_nodes == 0 and num_ranks > num_nodes else 0


def run_phases(context: PhaseContext, selected: Sequence[Phase]) -> Iterator[Check]:
    """Runs the phases and yields each check when it is done. Every rank must consume all of them."""
    try:
        context.prepare()
    except (PhaseError, ConfigError) as error:
        for phase in selected:
            yield Check(phase.name, phase.compared, "not run", reason=f"the inputs could not be generated: {error}")
        return
    for phase in selected:
        started = time.monotonic()
        try:
            if context.get_remaining_s() < _MIN_REMAINING_S:
                raise NotRun("--minutes passed before the phase started")
            result = phase.run(context)
        except NotRun as error:
            yield Check(phase.name, phase.compared, "not run", time.monotonic() - started, reason=str(error))
        except (PhaseError, ConfigError) as error:
            yield Check(phase.name, phase.compared, "failed", time.monotonic() - started, reason=str(error))
        else:
            yield Check(
                phase.name,
                phase.compared,
                "failed" if result.problem else "passed",
                round(time.monotonic() - started, 1),
                result.summary,
                result.numbers,
                result.tolerances,
                result.why,
                result.problem,
            )


def run_reference(context: PhaseContext) -> PhaseResult:
    """Runs the reference, which the other runs are compared with."""
    result = context.train_tiny(REFERENCE, "zero0", 1, limit_s=context.limit_s)
    if not result.succeeded:
        return PhaseResult(problem=context.describe_failure(result, REFERENCE))
    losses = context.ranks.on_main(lambda: [line["train/loss"] for line in read_metrics(context.run_dir(REFERENCE))])
    if len(losses) != len(context.kinds) or None in losses:
        return PhaseResult(problem=f"expected {len(context.kinds)} finite losses, got {losses}")
    context.reference_ok = True
    counts = count_kinds(context.kinds)
    numbers = {
        "losses": losses,
        "rows": counts,
        "batch_size": context.sizes.batch_size,
        "last_batch": context.sizes.last,
    }
    rows = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return PhaseResult(f"loss {losses[0]:.4f} to {losses[-1]:.4f}; rows on {context.ranks.size} ranks: {rows}", numbers)


def run_equality(context: PhaseContext, *, name: str, engine: str, more: tuple[str, ...] = ()) -> PhaseResult:
    """Runs the tiny model on all ranks and compares the run with the reference."""
    context.require_reference()
    result = context.train_tiny(name, engine, context.ranks.size, *more, limit_s=context.limit_s)
    if not result.succeeded:
        return PhaseResult(problem=context.describe_failure(result, name))
    return _compare_with_reference(context, name)


def run_resume(context: PhaseContext, *, name: str, engine: str) -> PhaseResult:
    """Kills a run after its first checkpoint and resumes it on half of the ranks."""
    context.require_reference()
    first = context.run_dir(name) / "checkpoints" / checkpoint_name(2)
    half = max(1, context.ranks.size // 2)
    saves = ("save.every=2", "save.keep=9")
    result = context.train_tiny(
        name,
        engine,
        context.ranks.size,
        *saves,
        limit_s=context.limit_s,
        kill_when=partial(atomic_folder.is_complete, first),
    )
    if not result.killed:
        problem = context.describe_failure(result, name) or "the run ended before it could be killed"
        return PhaseResult(problem=problem)
    done = context.ranks.on_main(lambda: len(read_metrics(context.run_dir(name))))
    result = context.train_tiny(name, engine, half, *saves, limit_s=context.limit_s)
    if not result.succeeded:
        return PhaseResult(problem=f"resumed on {half}: {context.describe_failure(result, name)}")
    starts = context.ranks.on_main(lambda: _read_starts(context.run_dir(name)))
    if [ranks for ranks, _ in starts] != [context.ranks.size, half] or not starts[-1][1]:
        return PhaseResult(problem=f"not resumed from a checkpoint; (ranks, first step) of its starts: {starts}")
    context.checkpoint = first
    compared = _compare_with_reference(context, name)
    numbers = compared.numbers | {"killed_in_step": done, "resumed_at_step": starts[-1][1], "resumed_on": half}
    summary = f"killed in step {done + 1}, resumed after step {starts[-1][1]} on {half}: {compared.summary}"
    return PhaseResult(summary, numbers, compared.tolerances, compared.why, compared.problem)


def run_user_configuration(context: PhaseContext, *, overrides: Sequence[str], num_ranks: int) -> PhaseResult:
    """Runs three steps of the user's configuration on all ranks and on `num_ranks`, and compares them."""
    names = {"own": context.ranks.size, "own_fewer": num_ranks}
    common = [f"root={context.out / 'runs'}", "max_steps=3", "save.every=0", "log.wandb=off", "allow_idle_gpus=true"]
    for name, size in names.items():
        result = context.run(name, ["train", *overrides, *common, f"name={name}"], size, limit_s=900.0)
        if not result.succeeded:
            return PhaseResult(problem=f"on {size} ranks: {context.describe_failure(result, name)}")

    def compare() -> PhaseResult:
        run_dir, fewer_dir = [next((context.out / "runs" / name).glob("*/metrics.jsonl")).parent for name in names]
        starts = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
        is_fp32 = starts["dtype"] == "float32"
        tolerances = {key: TOLERANCES[key] for key in ("loss", "grad_norm")} if is_fp32 else _BF16_LOSS
        difference = compare_runs(run_dir, fewer_dir, tolerances, weights=False)
        why = TOLERANCE_REASON if is_fp32 else _BF16_REASON
        return PhaseResult(difference.summary, difference.numbers, tolerances, why, difference.problem)

    return context.ranks.on_main(compare)


def _compare_with_reference(context: PhaseContext, name: str) -> PhaseResult:
    def compare() -> PhaseResult:
        run_dir = context.run_dir(name)
        difference = compare_runs(run_dir, context.run_dir(REFERENCE), TOLERANCES, weights=True)
        return PhaseResult(
            difference.summary,
            difference.numbers,
            TOLERANCES,
            TOLERANCE_REASON,
            difference.problem or _check_micro_steps(context, run_dir),
        )

    return context.ranks.on_main(compare)


def _check_micro_steps(context: PhaseContext, run_dir: Path) -> str:
    """Returns a sentence if the last step had another number of micro-steps than was computed before; else empty."""
    last = read_metrics(run_dir)[-1]
    num_ranks = int(_read_starts(run_dir)[-1][0])
    if num_ranks == context.ranks.size and last["perf/micro_steps"] != len(context.kinds[-1]):
        return f"the last step had {last['perf/micro_steps']} micro-steps, expected {len(context.kinds[-1])}"
    return ""


def _read_starts(run_dir: Path) -> list[tuple[int, int]]:
    """Returns (number of ranks, first step) of every start of a run."""
    lines = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    return [(line["ranks"], line["step"]) for line in lines]
