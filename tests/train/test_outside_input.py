"""What reaches the programs from outside - arguments, variables, folders, streams - ends in the right thing or in one
sentence with exit code 2.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_recipes.schema.console import EXIT_BROKEN_PIPE, run_program
from llava_next.config import ANYRES
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from tests.tiny import tiny_mixture, tiny_model
from tests.train.cases import tiny_run
from tests.train.launch import Program
from train.__main__ import compose
from train.config.compose import load, load_yaml, to_yaml, with_absolute_paths
from train.config.schema import ConfigError, RunConfig

ROOT = Path(__file__).resolve().parents[2]
RUN, EXPORT, STORE = "outputs/run/finetune", "outputs/run/finetune/export", "data/stores/tiny_pictures"
LONG = "x" * 300
ODD_FOLDER = "a b,=['ü]"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export, stores, raw files, and files and folders of the wrong kind."""
    folder = tmp_path_factory.mktemp("places")
    model_config = tiny_model(folder / "models")
    mixture, store_root = tiny_mixture(folder / "data", 16, holdout=6)
    config = tiny_run(model_config, mixture, store_root, folder / "outputs")
    Program(config, folder)  # configs/, with the tiny parts
    backbone = read_backbone(model_config)
    processor = backbone.processor(template=None, views=ANYRES, max_length=config.stage.max_length)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, folder / EXPORT)
    with chdir(folder):
        (folder / RUN / "config.yaml").write_text(to_yaml(with_absolute_paths(load(overrides(), "configs"))))
    (folder / RUN / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    files = {
        "file": "text",
        "connector/contract.json": "{}",
        "broken_json/config.json": "{",
        "list_json/config.json": "[]",
        "broken_run/config.yaml": "a: [\n",
        "list_run/config.yaml": "- a\n",
        "empty_run/config.yaml": "\n",
        "broken_store/manifest.json": "{",
        "configs/source/talk.yaml": yaml.safe_dump(
            {"reader": "llava_json", "root": "llava", "options": {"annotations": "mix.json", "image_root": "."}}
        ),
        "configs/source/broken.yaml": "[",
        "configs/source/list.yaml": "[]",
        "configs/mixture/broken.yaml": "name: broken\nsources: [\n",
        "raw/llava/mix.json": json.dumps(
            [{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}]
        ),
        "raw/other.txt": "",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for group in ("source", "mixture"):
        (folder / "configs" / group / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (folder / ODD_FOLDER).symlink_to(folder / "configs", target_is_directory=True)
    return folder


@pytest.fixture(autouse=True)
def in_places(places: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts in that folder, without variables of this project."""
    monkeypatch.chdir(places)
    for name in ("LLAVA_NEXT_STORES", "LLAVA_NEXT_MODELS"):
        monkeypatch.delenv(name, raising=False)
    before = {path.relative_to(places) for path in places.rglob("*.partial*")}
    yield
    assert {path.relative_to(places) for path in places.rglob("*.partial*")} == before


def overrides(*more: str) -> list[str]:
    """The tiny run on the command line, with relative folders."""
    tiny = ["model/language_model=tiny", "model/vision_tower=tiny", "mixture=tiny", "packing.max_tokens=640"]
    folders = ["root=outputs", "data.store_root=data/stores", "stage.init_from=null"]
    return [*tiny, *folders, "name=run", "stage.max_length=512", "packing.max_tiles=24", "device=cpu", *more]


def composed(monkeypatch: pytest.MonkeyPatch, *words: str, config_dir: str = "configs") -> RunConfig:
    """The configuration of `python -m train` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train", "--config-dir", config_dir, *overrides(), *words])
    config = compose()
    assert config is not None
    return config


ACCEPTED: dict[str, tuple[list[str], Callable[[RunConfig], Any], Any]] = {
    "space in a name": (["name=a b"], lambda c: c.name, "a b"),
    "folder in a name": (["name=a/b"], lambda c: str(c.run_dir), "outputs/a/b/finetune"),
    "quoted =": (["name='a=b'"], lambda c: c.name, "a=b"),
    "quoted unicode": (["name='ü'"], lambda c: c.name, "ü"),
    "quoted quote": (["name='it\\'s'"], lambda c: c.name, "it's"),
    "quoted number": (["name='007'"], lambda c: c.name, "007"),
    "dollar": (["name=a$HOME"], lambda c: c.name, "a$HOME"),
    "integer as float": (["seed=1e3"], lambda c: c.seed, 1000),
    "home": (["root='~/x'"], lambda c: c.root, str(Path("~/x").expanduser())),
    "interpolation": (
        ["data.store_root=${root}/../data/stores"],
        lambda c: c.data.store_root,
        "outputs/../data/stores",
    ),
    "space in a folder": (["root=a b/c"], lambda c: c.root, "a b/c"),
}


@pytest.mark.parametrize(("words", "read", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_values_that_are_taken(
    words: list[str], read: Callable[[RunConfig], Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd characters reach the configuration as they were written."""
    assert read(composed(monkeypatch, *words)) == expected


REFUSED: dict[str, tuple[list[str], str]] = {
    "empty name": (["name="], "name=''"),
    "name above root": (["name=.."], "name='..'"),
    "name with ..": (["name=a/../b"], "name='a/../b'"),
    "absolute name": (["name=/a"], "name='/a'"),
    "line break in a name": (["name='a\nb'"], "cannot be printed"),
    "long name": ([f"name={LONG}"], "longer than"),
    "stage's name": (["stage.name=../x"], "stage.name='../x'"),
    "empty stage's name": (["stage.name="], "stage.name=''"),
    "= in a name": (["name=a=b"], "\"name='a=b'\""),
    "quote in a name": (["name=it's"], "cannot be parsed"),
    "unicode name": (["name=ü"], "\"name='ü'\""),
    "not UTF-8": (["name=a\udcff"], "cannot be parsed"),
    "number as name": (["name=1"], "\"name='1'\""),
    "list as name": (["name=a,b"], "name=a,b"),
    "reference to nothing": (["name=${x}"], "name refers to x"),
    "no value": (["name"], "'name' is no override"),
    "empty argument": ([""], "an argument is empty"),
    "unknown option": (["-x"], "unrecognized arguments: -x"),
    "option of Hydra": (["--resolve"], "--resolve"),
    "wrong option": (["--cfg=x"], "invalid choice: 'x'"),
    "no folder of options": (["--config-dir=/none"], "/none"),
    "empty root": (["root="], "root is empty"),
    "root is a file": (["root=file"], "file is a file"),
    "root inside a file": (["root=file/x"], "file is a file"),
    "unknown home": (["root='~nobody_here/x'"], "no home folder"),
    "unquoted home": (["root=~/x"], "cannot be parsed"),
    "empty stores": (["data.store_root="], "data.store_root is empty"),
    "stores are a file": (["data.store_root=file"], "data.store_root"),
    "stores of another kind": (["data.store_root=outputs"], "no prepared source in outputs"),
    "long path": ([f"data.store_root={LONG}"], "File name too long"),
    "empty init_from": (["stage.init_from="], "set it to null"),
    "init_from is a file": (["stage.init_from=file"], "is a file"),
    "no init_from": (["stage.init_from=none"], "no folder"),
    "empty local_dir": (["data.local_dir="], "set it to null"),
    "local_dir is a file": (["data.local_dir=file"], "no folder file"),
    "empty model": (["model.language_model.path="], "model.language_model.path is empty"),
    "model is a file": (["model.vision_tower.path=file"], "file is a file"),
    "empty choice": (["mixture="], "mixture=: there is no such choice"),
    "no choice": (["mixture=null"], "mixture=null"),
    "choice with a folder": (["stage=a/b"], "stage=a/b: there is no such choice"),
    "no group": (["stage=null"], "stage=null"),
    "removed key": (["~name"], "name has no value"),
    "empty seed": (["seed="], "seed"),
    "fraction": (["seed=1.5"], "seed"),
    "large seed": ([f"seed={10**30}"], "seed must be at most"),
    "large timeout": ([f"timeout_s={10**12}"], "timeout_s must be at most"),
    "NaN": (["stage.epochs=nan"], "stage.epochs"),
    "infinity": (["max_steps=inf"], "max_steps"),
    "broken YAML": (["mixture=broken"], "broken.yaml"),
    "binary YAML": (["mixture=binary"], "utf-8"),
}


@pytest.mark.parametrize(("words", "part"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_are_refused(words: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one sentence that names the key, or shows how the value is quoted."""
    with pytest.raises(ConfigError) as refused:
        composed(monkeypatch, *words)
    text = str(refused.value)
    assert part in text
    assert len(text) < 700
    assert not any(word in text for word in ("Traceback", "HYDRA_FULL_ERROR", "hydra.cc", "usage: "))


@pytest.mark.parametrize("case", ["unicode name", "reference to nothing", "no choice", "empty choice", "broken YAML"])
def test_the_sentences_do_not_depend_on_hydras_variable(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HYDRA_FULL_ERROR=1 Hydra raises its errors, where it prints them otherwise."""
    words, part = REFUSED[case]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError) as refused:
        composed(monkeypatch, *words)
    assert part in str(refused.value)


def test_folders_of_yaml_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with characters that Hydra's own syntax uses, on both command lines; an empty or missing one is refused."""
    assert composed(monkeypatch, config_dir=ODD_FOLDER).name == "run"
    assert load(overrides(), ODD_FOLDER).name == "run"
    for name in ("", "none", "file"):
        with pytest.raises(ConfigError, match="--config-dir: there is no folder"):
            load(overrides(), name)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is as good as none; a relative folder and ~ are taken."""
    words = [word for word in overrides() if "store_root" not in word]
    for value, expected in (("", "data/stores"), ("data/../data/stores", "data/../data/stores")):
        monkeypatch.setenv("LLAVA_NEXT_STORES", value)
        assert load(words, "configs").data.store_root == expected
    words = [word for word in words if "language_model" not in word]
    Path("models/vicuna-7b-v1.5").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for value, expected in (("", "models"), ("./models", "models"), ("~/models", f"{Path.cwd()}/models")):
        monkeypatch.setenv("LLAVA_NEXT_MODELS", value)
        assert load(words, "configs", folders=False).model.language_model.path == f"{expected}/vicuna-7b-v1.5"


def test_a_run_is_read_from_another_folder(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml, made from relative folders, has absolute ones: stores and models are found from elsewhere."""
    config = load_yaml(places / RUN / "config.yaml")
    assert config.data.store_root == str(places / "data/stores")
    relative = replace(config, stage=replace(config.stage, init_from="outputs/a"), root="outputs")
    absolute = with_absolute_paths(relative)
    assert (absolute.stage.init_from, absolute.root) == (str(places / "outputs/a"), "outputs")
    monkeypatch.chdir(tmp_path)
    few = ["--num-samples", "2", "--limit", "1", "--generate", "0"]
    assert run("train.evaluate.__main__", str(places / RUN), *few) == 0
    assert run("train.inspect.__main__", str(places / STORE), "--like", str(places / RUN), "--num", "1") == 0
    assert run("train.export.__main__", str(places / RUN), "--out", "exported") == 0
    assert run("train.report.__main__", str(places / RUN), "--out", "report.html") == 0
    assert capsys.readouterr().out.count("wrote ") == 4


def run(module: str, *words: str) -> int:
    """Runs a program's `main` in this process; returns its exit code."""
    program = importlib.import_module(module)
    return run_program(lambda: program.main(list(words)))


QUICK = ("experiment=quickstart", "hardware=cpu", "stage=align")
PREPARE = ("--source", "talk", "--raw", "raw", "--stores", "prepared", "--configs", "configs", "--workers", "1")
COLLECT = ("collect", "--logs", "raw", "--out", "collected", "--model", "m")
WRONG: list[tuple[str, tuple[str, ...], str]] = [
    *(
        ("train.report.__main__", words, part)
        for words, part in [
            (("",), "empty"),
            (("none",), "none does not exist"),
            (("file",), "file is a file"),
            ((EXPORT,), "not the folder of a stage"),
            ((STORE,), "not the folder of a stage"),
            ((LONG,), "File name too long"),
            (("a\nb",), "a b does not exist"),
            ((RUN, "--samples", "-1"), "at least 0"),
            ((RUN, "--out", ""), "empty"),
            ((RUN, "--out", "outputs"), "is a folder"),
            ((RUN, "--out", "file/x.html"), "file is a file"),
            ((RUN, "--out", LONG), "File name too long"),
            ((RUN, "--out", "/proc/none/x.html"), "/proc/none"),
        ]
    ),
    *(
        ("train.plan.__main__", words, part)
        for words, part in [
            ((), "hardware has no value"),
            (("hardware=",), "hardware="),
            (("hardware=null",), "hardware=null"),
            ((*QUICK, "~hardware"), "~hardware"),
            ((*QUICK, "nodes="), "nodes"),
            ((*QUICK, "nodes=0"), "nodes"),
            ((*QUICK, "x"), "'x' is no override"),
            ((*QUICK, "name=ü"), "\"name='ü'\""),
            ((*QUICK, "--samples", "0"), "at least 1"),
            ((*QUICK, "--samples", "-1"), "at least 1"),
            ((*QUICK, "--samples", "x"), "not a whole number"),
            ((*QUICK, "--out", "outputs"), "is a folder"),
            ((*QUICK, "--picture", "file/x.svg"), "file is a file"),
            ((*QUICK, "--config-dir", ""), "no folder"),
            ((*QUICK, "--config-dir", "file"), "there is no folder"),
        ]
    ),
    *(
        ("train.export.__main__", words, part)
        for words, part in [
            (("",), "empty"),
            (("none",), "none is neither a run folder"),
            (("file",), "file is neither a run folder"),
            (("connector",), "stage.init_from=connector"),
            ((STORE,), "neither a run folder"),
            (("broken_json",), "damaged"),
            (("list_json",), "holds no keys"),
            (("models/clip",), "not a Hugging Face llava"),
            (("broken_run",), "neither an export/ nor a checkpoint"),
            ((LONG,), "File name too long"),
            ((RUN, "--out", ""), "empty"),
            ((RUN, "--out", "file"), "file is a file"),
            ((RUN, "--out", "file/x"), "file is a file"),
            ((RUN, "--out", "/proc/none"), "/proc/none"),
            ((RUN, "--out", "data"), "not a model directory"),
            ((RUN, "--out", RUN), "contains the exported source"),
            ((RUN, "--shard-gb", "0"), "above 0"),
            ((RUN, "--shard-gb", "nan"), "above 0"),
            ((RUN, "--format", "original", "--vision-tower", ""), "empty"),
        ]
    ),
    *(
        ("train.evaluate.__main__", words, part)
        for words, part in [
            (("",), "empty"),
            (("none",), "none is not a run folder"),
            (("file",), "file"),
            (("connector",), "not a run folder"),
            (("broken_run",), "broken_run/config.yaml cannot be read"),
            (("list_run",), "holds no keys"),
            (("empty_run",), "root has no value"),
            ((STORE,), "not a run folder"),
            ((EXPORT,), "--store"),
            ((EXPORT, "--store", ""), "empty"),
            ((EXPORT, "--store", "none"), "no complete store at none"),
            ((EXPORT, "--store", "broken_store"), "no complete store"),
            ((EXPORT, "--store", RUN), "no complete store"),
            (("broken_json", "--store", STORE), "not a model directory"),
            (("list_json", "--store", STORE), "not a model directory"),
            ((EXPORT, "--store", STORE, "--metric", "x"), "SOURCE=METRIC"),
            ((EXPORT, "--store", STORE, "--metric", "x=y"), "unknown source"),
            ((EXPORT, "--store", STORE, "--seed", "-1"), "at least 0"),
            ((EXPORT, "--store", STORE, "--max-new-tokens", "0"), "at least 1"),
            ((EXPORT, "--store", STORE, "--out", ""), "empty"),
            ((EXPORT, "--store", STORE, "--out", "data"), "is a folder"),
            ((EXPORT, "--store", STORE, "--out", "file/x"), "file is a file"),
        ]
    ),
    *(
        ("train.inspect.__main__", words, part)
        for words, part in [
            (("",), "empty"),
            (("none",), "neither a prepared source"),
            (("file",), "neither a prepared source"),
            ((EXPORT,), "neither a prepared source"),
            (("broken_run",), "broken_run/config.yaml cannot be read"),
            (("broken_store", "--like", RUN), "no complete store"),
            ((STORE, "x"), "'x' is no override"),
            ((STORE, "--like", ""), "empty"),
            ((STORE, "--like", STORE), "not a run folder"),
            ((STORE, "--config-dir", "", "name=x"), "no folder"),
            ((STORE, "--like", RUN, "--ids", ""), "--ids"),
            ((STORE, "--like", RUN, "--seed", "-1"), "at least 0"),
            ((STORE, "--like", RUN, "--out", ""), "empty"),
            ((STORE, "--like", RUN, "--out", "data"), "is a folder"),
            ((LONG,), "File name too long"),
        ]
    ),
    *(
        ("train.chat", words, part)
        for words, part in [
            (("",), "empty"),
            (("none",), "contains no config.json"),
            (("connector",), "contains no config.json"),
            (("broken_json",), "could not be loaded"),
            (("list_json",), "could not be loaded"),
            ((EXPORT, ""), "empty"),
            ((EXPORT, "none.png"), "none.png cannot be read"),
            ((EXPORT, "file"), "its format is unknown"),
            ((EXPORT, "data"), "Is a directory"),
            ((EXPORT, "--temperature", "nan"), "finite"),
            ((EXPORT, "--max-new-tokens", "0"), "at least 1"),
        ]
    ),
    *(
        ("train.accept", words, part)
        for words, part in [
            (("--out", ""), "empty"),
            (("--out", "new", "--config-dir", ""), "empty"),
            (("--table", ""), "empty"),
            (("--table", "none"), "not a report"),
            (("--table", "list_json"), "not a report"),
            (("--table", "outputs"), "no reports"),
        ]
    ),
    *(
        ("data_recipes.prepare.__main__", words, part)
        for words, part in [
            (("--source", "", *PREPARE[2:]), "no source ''"),
            (("--source", "..", *PREPARE[2:]), "no source '..'"),
            (("--source", "talk\n", *PREPARE[2:]), "no source 'talk\\n'"),
            (("--source", "broken", *PREPARE[2:]), "not valid YAML"),
            (("--source", "binary", *PREPARE[2:]), "not valid YAML"),
            (("--source", "list", *PREPARE[2:]), "mapping"),
            (("--mixture", "", *PREPARE[2:]), "empty"),
            (("--mixture", "../source/talk", *PREPARE[2:]), "no mixture"),
            (("--mixture", "binary", *PREPARE[2:]), "not valid YAML"),
            ((*PREPARE, "--raw", ""), "empty"),
            ((*PREPARE, "--raw", "none"), "missing raw folder"),
            ((*PREPARE, "--raw", "file"), "missing raw folder"),
            ((*PREPARE, "--raw", RUN), "missing raw folder"),
            ((*PREPARE, "--stores", ""), "empty"),
            ((*PREPARE, "--stores", "file"), "file is a file"),
            ((*PREPARE, "--stores", "file/x"), "file is a file"),
            ((*PREPARE, "--stores", RUN), "the folder of a run"),
            ((*PREPARE, "--stores", STORE), "a store itself"),
            ((*PREPARE, "--configs", ""), "empty"),
            ((*PREPARE, "--configs", "file"), "no folder file"),
            ((*PREPARE, "--slice", ""), "not a slice"),
            ((*PREPARE, "--max-rejects", "nan"), "between 0 and 1"),
        ]
    ),
    *(
        ("data_recipes.demo_requests.__main__", words, part)
        for words, part in [
            ((*COLLECT, "--model", ""), "empty"),
            ((*COLLECT, "--out", ""), "empty"),
            ((*COLLECT, "--limit", "-1"), "at least 1"),
            ((*COLLECT, "--max-requests", "0"), "at least 1"),
            ((*COLLECT, "--logs", "file"), "-conv.json"),
            (("answer", "--out", "none", "--answers", "x"), "no such file"),
        ]
    ),
    *(
        ("llava_next.__main__", words, part)
        for words, part in [
            (("",), "no such command"),
            (("../x",), "no such command"),
            (("train", "--nproc", ""), "whole number"),
            (("train", "--nproc=²"), "whole number"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("module", "words", "part"),
    WRONG,
    ids=[f"{module.removesuffix('.__main__')} {words}" for module, words, _ in WRONG],
)
def test_wrong_arguments_of_the_programs(
    module: str, words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty values, odd characters, files for folders, folders of another kind and places that cannot be written."""
    assert run(module, *words) == 2
    shown = capsys.readouterr()
    assert part in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


@contextmanager
def as_another_user() -> Iterator[None]:
    """Takes this process's permissions away, which root's files do not grant to others."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: run as root")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train.report.__main__", (RUN,)),
        ("train.export.__main__", (RUN,)),
        ("train.evaluate.__main__", (RUN,)),
        ("train.inspect.__main__", (RUN,)),
        ("train.chat", (EXPORT,)),
        ("data_recipes.prepare.__main__", PREPARE),
    ],
    ids=["report", "export", "evaluate", "inspect", "chat", "prepare"],
)
def test_folders_of_another_user(
    module: str, words: tuple[str, ...], places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read, or written into, is named together with the reason."""
    importlib.import_module(module)
    tmp_path.chmod(0o700)
    folders = {RUN, EXPORT, "raw", "prepared", "configs"}
    words = tuple(str(places / word) if word in folders else word for word in words)
    with as_another_user():
        assert run(module, *words) == 2
    shown = capsys.readouterr().err
    assert "ermission denied" in shown or "cannot be written by this user" in shown
    assert "Traceback" not in shown


def test_root_of_another_user(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that could not write its folder is refused before it starts."""
    monkeypatch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
    with pytest.raises(ConfigError, match=r"^root: .* cannot be written by this user"):
        composed(monkeypatch)


def shell(command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs a shell command; `$python` is this interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "python": sys.executable, **env}
    script = f"set -o pipefail; {command}"
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        ("$python -m train.report outputs/run/finetune | true", EXIT_BROKEN_PIPE, ""),
        ("$python -m train --cfg job experiment=quickstart | true", EXIT_BROKEN_PIPE, ""),
        ("$python -m llava_next report outputs/run/finetune | true", EXIT_BROKEN_PIPE, ""),
        ("$python -m llava_next --help | true", 0, ""),
        ("$python -m train.report outputs/run/finetune >&-", 0, ""),
        ("$python -m train.report outputs/run/finetune <&- >&- 2>&-", 0, ""),
        ("$python -m train.report outputs/run/finetune >/dev/full", 1, "error: No space left on device\n"),
        ("PYTHONIOENCODING=ascii $python -m train.report ü", 2, "error: \\xfc does not exist"),
    ],
    ids=["pipe", "pipe of Hydra", "pipe of the command", "pipe of help", "closed", "all closed", "full", "ascii"],
)
def test_standard_output(command: str, code: int, part: str) -> None:
    """A reader that has ended and a closed stream end a program silently; a full disk and an encoding that lacks
    characters without a traceback."""
    ended = shell(command)
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False), ended.stderr
    assert part in ended.stderr if part else ended.stderr == ""


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends a program in one word, with a shell's exit code."""

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_program(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
