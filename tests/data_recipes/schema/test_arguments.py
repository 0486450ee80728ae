"""The parser of the programs reports a mistake as one sentence."""

import pytest

from data_recipes.schema.arguments import ArgumentParser, positive_argument


def make_parser() -> ArgumentParser:
    """A program with a subcommand."""
    parser = ArgumentParser(prog="python -m program")
    step = parser.add_subparsers(dest="step", required=True).add_parser("collect")
    step.add_argument("--limit", type=positive_argument)
    step.add_argument("--model", choices=("a", "b"))
    return parser


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "error: the following arguments are required: step; see `python -m program --help`\n"),
        (
            ["collect", "--limit", "0"],
            "error: argument --limit: 0 must be at least 1; see `python -m program collect --help`\n",
        ),
        (
            ["collect", "--x\ny"],
            "error: unrecognized arguments: --x y; see `python -m program --help`\n",
        ),
    ],
)
def test_mistake_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, nothing on standard output, and no usage; line breaks of a value are not kept."""
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(words)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", sentence)


def test_help_has_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """What the sentence refers to."""
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["collect", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m program collect")
