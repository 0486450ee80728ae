"""Applies listed one-line changes to a copy of the tree, one at a time, and runs the tests that must fail then.

    python -m tests.mutations [--list] [--only NAME ...] [--subject SUBJECT ...] [--limit-s SECONDS]

The exit status is 0 if at least 95 % of the changes are caught, 1 if fewer are, and 2 if the list is outdated, or if
the tests do not pass or cannot be run without a change.
"""

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutations.changes import ROOT, Change, OutdatedChange, Tier, copy_tree, read_changes

NEEDED_SHARE = 0.95
MARKS: dict[Tier, str] = {"quick": "not full", "full": ""}
_BASELINE_LIMIT_S = 3600.0
_IMPORTED_ONCE = ("train.run", "tests.train.cases", "tests.llava_next.models", "tests.tiny")
"""Imported before the processes of the tests are forked, for what they import in their turn: seconds that each process
would spend anew. The modules of this tree are then imported again, from the copy."""
_CANNOT_RUN = 70
"""Exit status where the process failed before pytest had one: an uncaught exception would look like a failed test."""
_OWN_PACKAGES = {"llava_next", "data_recipes", "train", "tests", "scripts"}


def run_tests(tree: Path, tests: Sequence[str], tier: Tier, log: Path, limit_s: float) -> int | None:
    """pytest's exit status over the tests of a copy of the tree, in a process of its own; None after the time limit."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, tests, MARKS[tier], log))
    process.start()
    process.join(limit_s)
    if process.exitcode is not None:
        return process.exitcode
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return None


def _pytest(tree: Path, tests: Sequence[str], marks: str, log: Path) -> None:
    os.setsid()  # a group of its own, so that a time limit ends the processes of the tests, too
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status: int = _CANNOT_RUN
    try:
        os.chdir(tree)
        # Two versions of a file may have one size and one time, by which Python knows whether its bytecode is current.
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in _OWN_PACKAGES]:
            del sys.modules[name]
        # A plugin that is imported already keeps its plain assertions, of which pytest warns.
        options = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", marks]
        status = pytest.main(["-x", "-q", "--tb=short", *options, *tests])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def baseline_passes(tree: Path, changes: Sequence[Change], log: Path) -> bool:
    """Whether the tests of these changes pass in the unchanged copy, so that a failure later is the change's."""
    for tier in MARKS:
        tests = sorted({test for change in changes if change.tier == tier for test in change.tests})
        if tests and run_tests(tree, tests, tier, log, _BASELINE_LIMIT_S) != pytest.ExitCode.OK:
            return False
    return True


def outcome_of(change: Change, tree: Path, log: Path, limit_s: float) -> tuple[str, str]:
    """`caught`, `survived`, or `error` where pytest could not run the tests (its output is in the log); and the test
    that failed."""
    path = tree / change.file
    source = path.read_text(encoding="utf-8")
    path.write_text(change.apply(source), encoding="utf-8")
    try:
        status = run_tests(tree, change.tests, change.tier, log, limit_s)
    finally:
        path.write_text(source, encoding="utf-8")
    if status is None:  # a run that never ends is noticed
        return "caught", "time limit"
    if status == pytest.ExitCode.TESTS_FAILED:
        return "caught", _failed_test(log)
    return "survived" if status == pytest.ExitCode.OK else "error", ""


def _failed_test(log: Path) -> str:
    """The first test of pytest's summary."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.partition("::")[2].partition(" - ")[0]
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these changes alone")
    parser.add_argument("--subject", nargs="+", metavar="SUBJECT", help="the changes of these subjects alone")
    parser.add_argument("--limit-s", type=float, default=600.0, help="time limit for the tests of one change")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a change first")
    options = parser.parse_args(arguments)
    changes = read_changes()
    for key, chosen in (("name", options.only), ("subject", options.subject)):
        unknown = set(chosen or ()) - {getattr(change, key) for change in changes}
        if unknown:
            parser.error(f"no change has the {key} {', '.join(sorted(unknown))}")
        changes = [change for change in changes if not chosen or getattr(change, key) in chosen]
    outdated = _outdated(changes)
    for text in outdated:
        print(f"outdated  {text}")
    if outdated:
        return 2
    if options.list:
        for change in changes:
            print(
                f"{change.tier:<6}{change.subject:<12}{change.name:<36}{change.file}: {change.old!r} -> {change.new!r}"
            )
        return 0
    return _run(changes, options.limit_s, baseline=not options.no_baseline)


def _outdated(changes: Sequence[Change]) -> list[str]:
    errors = []
    for change in changes:
        try:
            change.apply((ROOT / change.file).read_text(encoding="utf-8"))
        except (OutdatedChange, OSError) as error:
            errors.append(str(error))
    return errors


def _run(changes: Sequence[Change], limit_s: float, *, baseline: bool) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutations_") as scratch:
        tree, log = Path(scratch, "tree"), Path(scratch, "pytest.log")
        copy_tree(tree)
        if baseline and not baseline_passes(tree, changes, log):
            print(f"{log.read_text(errors='replace')}\nthe tests do not pass without a change")
            return 2
        outcomes = Counter[str]()
        for change in changes:
            started = time.monotonic()
            outcome, test = outcome_of(change, tree, log, limit_s)
            outcomes[outcome] += 1
            seconds = time.monotonic() - started
            columns = f"{outcome:<10}{change.tier:<7}{change.subject:<12}{change.name:<40}{seconds:6.1f} s  {test}"
            print(columns.rstrip(), flush=True)
            if outcome == "error":
                print(f"{log.read_text(errors='replace')}\nthe tests of {change.name} cannot be run")
                return 2
    share = outcomes["caught"] / len(changes)
    print(f"{outcomes['caught']} of {len(changes)} caught ({share:.1%}; {NEEDED_SHARE:.0%} are needed)")
    return 0 if share >= NEEDED_SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
