"""`python -m train.accept --out DIR`: whether this framework's promises hold on the machines that it is started on.

    torchrun --standalone --nproc-per-node 8 -m train.accept --out DIR
    deepspeed --no_local_rank --module train.accept --out DIR
    sbatch -N 2 scripts/slurm/accept.sbatch --out DIR
    torchrun --standalone --nproc-per-node 8 -m train.accept --out DIR experiment=mine
    python -m train.accept --table docs/verified

Trains small generated models by the real program, on one and on all ranks, and compares losses and weights at ZeRO 1 to
3; kills a run and resumes it on half of the ranks; exports; measures links, saving and speed. DIR is on a file system
that all nodes share. It gets report.json, the logs, and a hardware file for the planner. Overrides of `python -m train`
add a check of one's own configuration. The exit code is 0 where every check has passed, 1 where one has not or was not
run, and 2 for a mistake in the command line.
"""

import argparse
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from train.accept.outcome import Check, passed, report_files, verdict, verified_table, write_report
from train.config.exit_codes import EXIT_FAILED, EXIT_USAGE, report_mistake
from train.config.schema import ConfigError

if TYPE_CHECKING:
    from train.accept.ranks import Ranks

_SHARED_S = 20.0
"""How long a new folder may take to show on the other hosts of a network file system."""
_MARGIN_S = 900.0
"""How much longer than the whole time the ranks wait for each other: whoever is late then is gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code, the same on every rank."""
    options = _parse(arguments)
    if options.table:
        try:
            print(verified_table(report_files(options.table)))
        except ValueError as error:
            return report_mistake(error)
        return 0
    import torch

    from train.accept.ranks import PhaseError, join, launcher_name, leave
    from train.distributed.quiet_libraries import quiet_libraries

    started_s, launcher = time.monotonic(), launcher_name()
    quiet_libraries(on_cpu=not torch.cuda.is_available())  # child runs inherit what it sets
    ranks = join(60 * options.minutes + _MARGIN_S)
    try:
        return _accept(options, ranks, launcher, started_s)
    except (PhaseError, ConfigError) as error:
        if ranks.is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    finally:
        leave()


def _accept(options: argparse.Namespace, ranks: "Ranks", launcher: str, started_s: float) -> int:
    """Checks the command line on rank 0, runs the phases, writes the report.

    Raises:
        ConfigError: a mistake in the command line.
        PhaseError: a rank cannot ask for its device.
    """
    from train.accept.bench import Bench, find_device
    from train.accept.measured_hardware import base_hardware
    from train.accept.phases import phases, run_phases

    out = options.out.resolve()
    own = [*(["--config-dir", str(options.config_dir.resolve())] if options.config_dir else []), *options.overrides]
    ranks.on_main(lambda: _check_usage(options, out, ranks.size))
    _check_shared(out, ranks)
    device = find_device(ranks, out)
    base = ""
    if ranks.size > 1:
        base = ranks.on_main(lambda: base_hardware(options.hardware_base, device.name, device.memory_gib))
    bench = Bench(ranks, device, out, options.timeout_s, started_s + 60 * options.minutes)
    facts = ranks.gather((socket.gethostname(), device.name, _versions()))
    own = own if options.overrides else []
    chosen = phases(ranks.size, quick=options.quick, base=base, own=own, own_ranks=options.own_ranks)
    checks: list[Check] = []
    for check in run_phases(bench, chosen):
        checks.append(check)
        if ranks.is_main:
            print(check.line, flush=True)
            for line in check.reason.splitlines()[1:]:
                print(f"    {line}")
    if ranks.is_main:
        report = out / "report.json"
        devices = Counter(name for _, name, _ in facts)
        sentence = verdict(checks, devices, ranks.num_nodes, quick=options.quick)
        about = {
            "verdict": sentence,
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
        write_report(report, checks, about, _hidden(out, ranks.hosts) if options.anonymous else {})
        print(f"wrote {report}\n{sentence}", flush=True)
    return 0 if passed(checks) else EXIT_FAILED


def _check_usage(options: argparse.Namespace, out: Path, num_ranks: int) -> None:
    """Makes the folder. Raises ConfigError for what is wrong about the command line."""
    from train.accept.measured_hardware import base_hardware
    from train.config.compose import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} must be a new or an empty folder; name another one")
    if not 1 <= options.own_ranks <= num_ranks:
        raise ConfigError(f"--own-ranks is from 1 to the {num_ranks} ranks of this start, got {options.own_ranks}")
    if options.minutes <= 0 or options.timeout_s < 1:
        raise ConfigError(f"--minutes and --timeout-s must be above 0, got {options.minutes} and {options.timeout_s}")
    if options.hardware_base is not None:
        base_hardware(options.hardware_base, "", 0.0)
    if options.overrides:
        load(["name=own", *options.overrides], str(options.config_dir) if options.config_dir else None)
    out.mkdir(parents=True, exist_ok=True)


def _check_shared(out: Path, ranks: "Ranks") -> None:
    """Raises ConfigError on every rank where a host does not see the folder that rank 0 has made."""
    deadline_s = time.monotonic() + _SHARED_S
    while not out.is_dir() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    missing = sorted(
        {host for host, is_there in zip(ranks.hosts, ranks.gather(out.is_dir()), strict=True) if not is_there}
    )
    if missing:
        raise ConfigError(
            f"--out {out} is not there on {', '.join(missing)}; name a folder on a file system that all nodes share"
        )


def _versions() -> dict[str, str]:
    """Versions, the commit and the hash of this checkout's Python files."""
    import torch

    from train.distributed.versions import versions
    from train.supervision.preflight import code_hash

    return versions() | {"code_hash": code_hash(), "cuda": str(torch.version.cuda)}


def _hidden(out: Path, hosts: Sequence[str]) -> dict[str, str]:
    """What --anonymous replaces: host names, and the paths of the folder, the checkout and the home folder."""
    names = {host: f"host{number}" for number, host in enumerate(dict.fromkeys(hosts))}
    checkout = Path(__file__).resolve().parents[2]
    folders = {str(out): "DIR", str(checkout): "CHECKOUT", sys.prefix: "PYTHON", str(Path.home()): "HOME"}
    return names | folders


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m train.accept", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of python -m train: one's own configuration is checked too")
    parser.add_argument("--out", type=Path, help="a new folder on a file system that all nodes share")
    parser.add_argument("--quick", action="store_true", help="fewer checks: one ZeRO stage, links, the hardware file")
    parser.add_argument("--minutes", type=float, default=30.0, help="what does not fit is reported as not run (30)")
    parser.add_argument("--timeout-s", type=int, default=120, help="of a child run's collectives (120)")
    parser.add_argument("--hardware-base", help="a file of configs/hardware for what is not measured (the device's)")
    parser.add_argument("--own-ranks", type=int, default=1, help="ranks that all ranks are compared with in one's own "
                        "configuration (1)")  # fmt: skip
    parser.add_argument("--config-dir", type=Path, help="a folder of further YAML files, for the overrides")
    parser.add_argument("--anonymous", action="store_true", help="the report names neither hosts nor folders")
    parser.add_argument("--table", type=Path, nargs="+", help="only print a Markdown table of these reports or folders")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_intermixed_args(arguments)
    if options.out is None and not options.table:
        parser.error("--out has no value; name a new folder on a file system that all nodes share")
    return options


if __name__ == "__main__":
    sys.exit(main())
