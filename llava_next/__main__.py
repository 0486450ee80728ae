"""The command `llava-next VERB ...`, or `python -m llava_next VERB ...`: one name for the programs of this project.

`llava-next train ...` does what `python -m train ...` does; `--nproc N` before the program's own arguments starts N
ranks by torchrun. This module imports none of the programs, so that it can report a foreign package that hides one.
"""

import importlib.util
import os
import runpy
import site
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

_DISTRIBUTION = "llava-next-train"
_ROOT = Path(__file__).resolve().parents[1]
_EXIT_USAGE = 2
_PROGRAMS = {
    "train": ("train", "train one stage of a model"),
    "plan": ("train.plan", "memory, time and limits of a run before its launch"),
    "fetch": (
        "train.fetch",
        "models from the hub; with --mixture or --source and --raw: raw files from their publishers",
    ),
    "guess": ("data_recipes.guess", "which reader and options fit a folder or file of raw data"),
    "prepare": ("data_recipes.prepare", "raw files to prepared sources and a mixture's manifest"),
    "inspect": ("train.inspect", "samples as the model sees them, and their losses"),
    "report": ("train.report", "runs on one page"),
    "evaluate": ("train.evaluate", "held-out losses and scores of answers"),
    "export": ("train.export", "a run or checkpoint to a directory that others load"),
    "chat": ("train.chat", "a conversation with an export in the terminal"),
    "accept": ("train.accept", "checks and measurements on your own machines"),
    "demo-requests": ("data_recipes.demo_requests", "logs of a demo to training data"),
}
_RANKED = ("train", "evaluate", "accept")
_DATA_OPTIONS = ("--mixture", "--source", "--raw")
"""Options with which `fetch` fetches data: models have names only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a program in this process, or several ranks of it in place of this process. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        _show(_usage())
        return 0 if given else _EXIT_USAGE
    if given[0] == "--version":
        _show(_version())
        return 0
    verb, *rest = given
    if verb not in _PROGRAMS:
        return _refuse(f"llava-next {verb}: there is no such command; the commands are {', '.join(_PROGRAMS)}")
    module = _PROGRAMS[verb][0]
    if verb == "fetch" and any(word.partition("=")[0] in _DATA_OPTIONS for word in rest):
        module = "data_recipes.fetch"
    foreign = _foreign_origin(module.split(".")[0])
    if foreign is not None:
        package = module.split(".")[0]
        return _refuse(
            f"the Python package {package} is {foreign}, not {_ROOT / package}: another module of that name comes "
            "first on Python's path; start from another folder, or remove it from PYTHONPATH"
        )
    if rest and rest[0].partition("=")[0] == "--nproc":
        value, program = (rest[0].partition("=")[2], rest[1:]) if "=" in rest[0] else ("".join(rest[1:2]), rest[2:])
        if not value.isdecimal() or int(value) < 1:
            return _refuse(f"--nproc {value or '(nothing)'}: the number of ranks is a whole number of at least 1")
        if verb not in _RANKED:
            return _refuse(f"--nproc {value}: {verb} runs in one process; only {', '.join(_RANKED)} have ranks")
        _start_ranks(int(value), [verb, *program])
    # The folder of the user, last: readers of one's own are found there, and nothing there hides an installed package.
    sys.path.append(str(Path.cwd()))
    sys.argv = [f"llava-next {verb}", *rest]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def _start_ranks(num_ranks: int, arguments: list[str]) -> NoReturn:
    """Replaces this process by torchrun, which runs this command in `num_ranks` processes."""
    os.environ["PYTHONSAFEPATH"] = "1"  # with -m, Python would put the user's folder first on its path
    if str(_ROOT) not in (*site.getsitepackages(), site.getusersitepackages()):  # a checkout
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "llava_next", *arguments])


def _foreign_origin(package: str) -> str | None:
    """Where Python would take `package` from, if that is not this project's own; None where it is."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "missing"
    origin = Path(spec.origin or (list(spec.submodule_search_locations or [""]) or [""])[0]).resolve()
    return None if origin.is_relative_to(_ROOT / package) else str(origin)


def _usage() -> str:
    width = max(map(len, _PROGRAMS))
    lines = [f"  {verb:{width}}  {what}" for verb, (_, what) in _PROGRAMS.items()]
    return "\n".join(
        [
            "usage: llava-next COMMAND [--nproc N] [ARGUMENT ...]",
            "",
            *lines,
            "",
            "llava-next COMMAND --help describes a command's arguments. --nproc N starts N ranks of "
            f"{', '.join(_RANKED)}.",
        ]
    )


def _show(text: str) -> None:
    """Prints a text; a reader that has ended, as with `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:
        return "not installed"


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return _EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
