"""`python -m train.accept --out DIR`: the acceptance test of this framework on the machines that it is started on.

    torchrun --standalone --nproc-per-node 8 -m train.accept --out DIR
    deepspeed --no_local_rank --module train.accept --out DIR
    sbatch -N 2 scripts/slurm/accept.sbatch --out DIR
    torchrun --standalone --nproc-per-node 8 -m train.accept --out DIR experiment=mine
    python -m train.accept --table docs/verified

It trains small generated models with `python -m train` on one rank and on all ranks and compares losses and weights at
ZeRO 1 to 3; kills a run and resumes it on half of the ranks; exports a checkpoint; and measures links, saving and
speed. DIR must be on a file system that all nodes share; report.json, logs, and a hardware file for the planner are
written to it. Overrides of `python -m train` add a check of your own configuration. The exit code is 0 if every check
has passed, 1 if one has failed or was not run, and 2 if the command line is invalid.
"""

import argparse
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from data_recipes.schema.arguments import ArgumentParser, path_argument
from data_recipes.schema.console import run_program
from train.acceptance.check_report import (
    Check,
    format_verdict,
    format_verified_table,
    has_passed,
    list_report_files,
    write_report,
)
from train.config.exit_codes import EXIT_FAILED, EXIT_USAGE, report_mistake
from train.config.schema import ConfigError

if TYPE_CHECKING:
    from train.acceptance.ranks import Ranks

_VISIBILITY_TIMEOUT_S = 20.0
"""Longest time until a new folder is visible on the other hosts of a network file system."""
_MARGIN_S = 900.0
"""Time in addition to --minutes that ranks wait for each other before they give up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code, which is the same on every rank."""
    options = _parse(arguments)
    if options.table:
        try:
            print(format_verified_table(list_report_files(options.table)))
        except ValueError as error:
            return report_mistake(error)
        return 0
    import torch

    from train.acceptance.ranks import PhaseError, destroy_group, join_ranks, read_launcher_name
    from train.distributed.quiet_libraries import quiet_libraries

    started_s, launcher = time.monotonic(), read_launcher_name()
    quiet_libraries(on_cpu=not torch.cuda.is_available())  # sets variables that child runs inherit
    ranks = join_ranks(60 * options.minutes + _MARGIN_S)
    try:
        return _run(options, ranks, launcher, started_s)
    except (PhaseError, ConfigError) as error:
        if ranks.is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    finally:
        destroy_group()


def _run(options: argparse.Namespace, ranks: "Ranks", launcher: str, started_s: float) -> int:
    """Validates the command line, runs the phases and writes the report.

    Raises:
        ConfigError: the command line is invalid.
        PhaseError: a rank could not read its device.
    """
    from train.acceptance.measured_hardware import select_base_hardware
    from train.acceptance.phase_context import PhaseContext, read_device
    from train.acceptance.phases import list_phases, run_phases

    out = options.out.resolve()
    config_dir = ["--config-dir", str(options.config_dir.resolve())] if options.config_dir else []
    ranks.on_main(lambda: _check_usage(options, out, ranks.size))
    _check_shared(out, ranks)
    device = read_device(ranks, out)
    base = ""
    if ranks.size > 1:
        base = ranks.on_main(lambda: select_base_hardware(options.hardware_base, device.name, device.memory_gib))
    context = PhaseContext(ranks, device, out, options.timeout_s, started_s + 60 * options.minutes)
    facts = ranks.gather((socket.gethostname(), device.name, _read_versions()))
    selected = list_phases(
        ranks.size,
        quick=options.quick,
        base=base,
        user_overrides=[*config_dir, *options.overrides] if options.overrides else [],
        user_ranks=options.own_ranks,
        num_nodes=ranks.num_nodes,
    )
    checks: list[Check] = []
    for check in run_phases(context, selected):
        checks.append(check)
        if ranks.is_main:
            print(check.line, flush=True)
            for line in check.reason.splitlines()[1:]:
                print(f"    {line}")
    if ranks.is_main:
        report = out / "report.json"
        devices = Counter(name for _, name, _ in facts)
        verdict = format_verdict(checks, devices, ranks.num_nodes, quick=options.quick)
        metadata = {
            "verdict": verdict,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started_s, 1),
            "launcher": launcher,
            "arguments": [word for word in sys.argv[1:] if not word.startswith("--local_rank")],
            "ranks": ranks.size,
            "nodes": [{"host": host, "ranks": number} for host, number in Counter(ranks.hosts).items()],
            "devices": devices,
            "versions": facts[0][2],
            "versions_equal": len({str(versions) for _, _, versions in facts}) == 1,
        }
        write_report(report, checks, metadata, _list_replacements(out, ranks.hosts) if options.anonymous else {})
        print(f"wrote {report}\n{verdict}", flush=True)
    return 0 if has_passed(checks) else EXIT_FAILED


def _check_usage(options: argparse.Namespace, out: Path, num_ranks: int) -> None:
    """Validates the command line and creates the folder. Raises ConfigError for an invalid value."""
    from train.acceptance.measured_hardware import select_base_hardware
    from train.config.compose import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty; give a new or empty folder")
    if not 1 <= options.own_ranks <= num_ranks:
        raise ConfigError(f"--own-ranks must be from 1 to {num_ranks}, the number of ranks, got {options.own_ranks}")
    if not 0 < options.minutes < math.inf or options.timeout_s < 1:
        raise ConfigError(f"--minutes and --timeout-s must be above 0, got {options.minutes} and {options.timeout_s}")
    if options.hardware_base is not None:
        select_base_hardware(options.hardware_base, "", 0.0)
    if options.overrides:
        load(["name=own", *options.overrides], str(options.config_dir) if options.config_dir else None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be created: {error.strerror}; give another folder") from error


def _check_shared(out: Path, ranks: "Ranks") -> None:
    """Raises ConfigError on every rank if a host does not see the folder that rank 0 has created."""
    deadline_s = time.monotonic() + _VISIBILITY_TIMEOUT_S
    while not out.is_dir() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    missing = sorted(
        {host for host, is_visible in zip(ranks.hosts, ranks.gather(out.is_dir()), strict=True) if not is_visible}
    )
    if missing:
        raise ConfigError(
            f"--out {out} does not exist on {', '.join(missing)}; give a folder on a file system that all nodes share"
        )


def _read_versions() -> dict[str, str]:
    """Returns the versions of packages, the commit, and the hash of this checkout's Python files."""
    import torch

    from train.distributed.versions import versions
    from train.supervision.preflight import hash_code

    return versions() | {"code_hash": hash_code(), "cuda": str(torch.version.cuda)}


def _list_replacements(out: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Returns the texts that --anonymous replaces: host names, and the paths of the folder, checkout and home."""
    names = {host: f"host{number}" for number, host in enumerate(dict.fromkeys(hosts))}
    checkout = Path(__file__).resolve().parents[1]
    folders = {str(out): "DIR", str(checkout): "CHECKOUT", sys.prefix: "PYTHON", str(Path.home()): "HOME"}
    return names | folders


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "python -m train.accept", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of python -m train: also check this configuration")
    parser.add_argument("--out", type=path_argument, help="a new folder on a file system that all nodes share")
    parser.add_argument("--quick", action="store_true", help="fewer checks: one ZeRO stage, links, the hardware file")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time limit; later phases are reported as not run (30)"
    )
    parser.add_argument("--timeout-s", type=int, default=120, help="timeout of a child run's collectives (120)")
    parser.add_argument(
        "--hardware-base",
        help="a file in configs/hardware for values that are not measured (default: that of the device)",
    )
    parser.add_argument("--own-ranks", type=int, default=1, help="number of ranks that all ranks are compared with for "
                        "your own configuration (1)")  # fmt: skip
    parser.add_argument(
        "--config-dir", type=path_argument, help="a folder of further YAML files, which take precedence, for overrides"
    )
    parser.add_argument("--anonymous", action="store_true", help="remove host names and paths from the report")
    parser.add_argument(
        "--table", type=path_argument, nargs="+", help="only print a Markdown table of these reports or folders"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_intermixed_args(arguments)
    if options.out is None and not options.table:
        parser.error("--out has no value; give a new folder on a file system that all nodes share")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
