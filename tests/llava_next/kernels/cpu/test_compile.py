"""C++ that is compiled where it runs: once, whole or not at all, and with the reason where it cannot be."""

import shutil
import stat
from pathlib import Path

import pytest

from llava_next.kernels.cpu import compile as native
from llava_next.kernels.cpu.compile import CompileError, cache_root, load


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with one function."""
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return 42; }')
    return file


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if not any(map(shutil.which, native._COMPILERS)):
        pytest.skip("there is no C++ compiler")


def made(cache: Path) -> list[Path]:
    """Everything in the cache."""
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_it_is_compiled_once(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time no compiler is asked for; another source is another file."""
    assert load(source, "DEFAULT").answer() == 42
    (first,) = made(cache)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(source, "DEFAULT").answer() == 42
    assert made(cache) == [first]
    monkeypatch.delenv("CXX")
    source.write_text('extern "C" int answer() { return 43; }')
    assert load(source, "DEFAULT").answer() == 43
    assert len(made(cache)) == 2


def test_headers_are_part_of_it(cache: Path, source: Path) -> None:
    """A file that includes another is compiled again when that has changed."""
    header = source.with_name("number.h")
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }')
    for number in (44, 45):
        header.write_text(f"#define NUMBER {number}")
        assert load(source, "DEFAULT").answer() == number
    assert len(made(cache)) == 2


def test_each_kind_of_processor_has_its_own(cache: Path, source: Path) -> None:
    """Nodes of a cluster may share the cache and not the instructions."""
    load(source, "DEFAULT")
    options = native.INSTRUCTIONS["AVX2"]
    try:
        load(source, "AVX2")
    except CompileError as error:  # not an x86
        assert options[0] in str(error)  # noqa: PT017
    else:
        assert len(made(cache)) == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo it is broken >&2; exit 1", r"did not compile answer\.cpp:\nit is broken"),
        ("sleep 20", r"did not compile answer\.cpp within 1 s"),
        ('for last; do :; done; echo half > "$last"', "could not be loaded, and was removed"),
    ],
    ids=["fails", "hangs", "writes rubbish"],
)
def test_a_compiler_that_does_not_do_it(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """Its last words, and nothing half-made that a later start would load as if it were whole."""
    compiler = source.parent / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "_TIMEOUT_S", 1)
    with pytest.raises(CompileError, match=words):
        load(source, "DEFAULT")
    assert made(cache) == []


def test_without_a_compiler(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked for, and what could be set."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(CompileError, match=r"none of c\+\+, g\+\+, clang\+\+ is on the PATH, and CXX is not set"):
        load(source, "DEFAULT")
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(CompileError, match="no-such-compiler"):
        load(source, "DEFAULT")


def test_a_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(source))
    with pytest.raises(CompileError, match="cannot be written"):
        load(source, "DEFAULT")


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """$LLAVA_NEXT_CACHE, or llava_next in the user's own cache."""
    monkeypatch.setenv("LLAVA_NEXT_CACHE", "/some/where")
    assert cache_root() == Path("/some/where")
    monkeypatch.delenv("LLAVA_NEXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/llava_next")
