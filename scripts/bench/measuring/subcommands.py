"""Programs with subcommands, each of which is a module that is imported only when it is asked for."""

import importlib
import sys
from collections.abc import Mapping, Sequence


def run_subcommand(usage: str, modules: Mapping[str, str], arguments: Sequence[str] | None) -> int:
    """Calls `main(arguments)` of the subcommand's module and returns its exit code; 2 for an unknown subcommand.

    Args:
        usage: printed for --help and after a mistake.
        modules: subcommand -> module.
        arguments: the subcommand and its arguments; None for those of the command line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in modules:
        code: int = importlib.import_module(modules[words[0]]).main(words[1:])
        return code
    is_help = bool(words) and words[0] in ("-h", "--help")
    print(usage.strip(), file=sys.stdout if is_help else sys.stderr)
    if not is_help:
        print(f"\nerror: the first argument must be one of: {', '.join(modules)}", file=sys.stderr)
    return 0 if is_help else 2
