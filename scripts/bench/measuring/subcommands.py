"""Programs with subcommands, each of which is a module that is imported only when it is asked for."""

import importlib
import sys
from collections.abc import Mapping, Sequence


def run_subcommand(usage: str, modules: Mapping[str, str], arguments: Sequence[str] | None) -> int:
    """Calls `main(arguments)` of the subcommand's module and returns its exit code; 2 for an unknown subcommand.

    Args:
        usage: printed for --help.
        modules: subcommand -> module.
        arguments: the subcommand and its arguments; None for those of the command line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in modules:
        code: int = importlib.import_module(modules[words[0]]).main(words[1:])
        return code
    if words and words[0] in ("-h", "--help"):
        print(usage.strip())
        return 0
    print(f"error: the first argument must be one of {', '.join(modules)}; see --help", file=sys.stderr)
    return 2
