"""Bad input is reported as one sentence with the key, the rule, the value and the fix, with exit code 2, within seconds
and before torch is imported; and every rule that needs neither data nor weights is checked.
"""

import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
from omegaconf import OmegaConf

from llava_next.config import TemplateConfig, ViewsConfig
from tests.train.cases import RATES, tiny_run
from train.config.compose import check, load, load_yaml, to_yaml
from train.config.schema import ConfigError, RunConfig

ROOT = Path(__file__).resolve().parents[3]
_WATCH = """
import atexit, os, sys
@atexit.register
def tell():
    with open(os.environ["LOADED_MODULES"], "w") as file:
        print(*[name for name in ("torch", "transformers", "deepspeed") if name in sys.modules], file=file)
"""


def _processor_seconds() -> float:
    """CPU seconds of all child processes that have ended; unlike wall time they hardly depend on other load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class ProgramResult:
    """Output, exit code and CPU time of `python -m train` with these arguments."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        (folder / "sitecustomize.py").write_text(_WATCH)
        loaded = folder / "loaded"
        hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID")
        environ = {key: value for key, value in os.environ.items() if key not in hidden}
        search = os.pathsep.join(filter(None, [str(folder), environ.get("PYTHONPATH", "")]))
        before = _processor_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "train", *arguments],
            cwd=ROOT,
            env={**environ, "PYTHONPATH": search, "LOADED_MODULES": str(loaded), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.processor_s = _processor_seconds() - before
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
        self.loaded = loaded.read_text().split()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["packing.max_token=1"], ["packing.max_token", "did you mean packing.max_tokens", "--cfg job"]),
        (["seed=abc"], ["seed", "valid integer", "'abc'"]),
        (["model/language_model=none_such"], ["model/language_model=none_such", "smollm2_135m"]),
        (["stage=none_such"], ["stage=none_such", "align", "finetune"]),
        (["packing.max_tokens=100"], ["packing.max_tokens=100", "stage.max_length", "at least 1024"]),
        (["model.vision_tower.path=/none/such"], ["model.vision_tower.path", "/none/such", "Hugging Face directory"]),
        (["data.store_root=/none/such"], ["data.store_root", "/none/such", "python -m data_recipes.prepare"]),
    ],
    ids=["key", "type", "model", "stage", "budget", "folder", "stores"],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    """Exit code 2 within five CPU seconds, one line on standard error with the key, the rule, the value and the fix,
    nothing on standard output, no new file, and torch was not imported."""
    folders = [f"model.{part}.path={tmp_path}" for part in ("language_model", "vision_tower")]
    for name, text in (("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", "-")):
        (tmp_path / name).write_text(text)
    result = ProgramResult(tmp_path, ["experiment=quickstart", f"root={tmp_path / 'outputs'}", *folders, *arguments])
    assert result.code == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert [part for part in parts if part not in result.stderr] == []
    assert result.loaded == []
    assert not (tmp_path / "outputs").exists()
    assert result.processor_s < 5


@pytest.mark.full
def test_only_rank_0_reports(tmp_path: Path) -> None:
    """Other ranks of its host print nothing; where no launcher ends them meanwhile, they print their rank."""
    task = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    result = ProgramResult(tmp_path, ["experiment=quickstart", "seed=abc"], task)
    assert (result.code, result.stdout, result.stderr) == (2, "", "")
    result = ProgramResult(tmp_path, ["experiment=quickstart", "seed=abc"], {"RANK": "1", "WORLD_SIZE": "2"})
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: rank 1 ({socket.gethostname()}): seed")


def test_the_launchers_argument_is_removed(tmp_path: Path) -> None:
    """The deepspeed launcher's --local_rank does not reach Hydra."""
    result = ProgramResult(tmp_path, ["--local_rank=0", "experiment=quickstart", "seed=abc"])
    assert result.stderr.startswith("error: seed:")


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["experiment=quickstart", "--cfg", "job"]])
def test_hydra_still_helps(tmp_path: Path, arguments: list[str]) -> None:
    """`--help` and `--cfg job` work, and exit with 0 before torch is imported."""
    result = ProgramResult(tmp_path, arguments)
    assert result.code == 0
    assert "max_tokens" in result.stdout
    assert result.loaded == []


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, as Hydra composes it."""
    values: dict[str, Any] = pydantic.TypeAdapter(RunConfig).dump_python(config, mode="json")
    return values


def checked(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration with values replaced by their full keys, checked."""
    values = plain(config)
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    return check(OmegaConf.create(values))


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown part": ({"stage.learning_rates": {"projektor": 1e-3}}, ["stage.learning_rates.projektor", "projector"]),
    "no part": ({"stage.learning_rates": {}}, ["stage.learning_rates", "names no part to train"]),
    "zero rate": ({"stage.learning_rates.projector": 0.0}, ["learning_rates.projector", "0.0", "leave it out"]),
    "negative rate": ({"stage.learning_rates.projector": -1.0}, ["learning_rates.projector", "-1.0"]),
    "batch": ({"stage.batch_size": 0}, ["stage.batch_size", "at least 1", "0"]),
    "length": ({"stage.max_length": 1}, ["stage.max_length", "at least 2"]),
    "epochs": ({"stage.epochs": 0.0}, ["stage.epochs", "above 0"]),
    "warm-up": ({"stage.warmup_ratio": 1.0}, ["stage.warmup_ratio", "share", "1.0"]),
    "template": ({"stage.template": "chatmel"}, ["stage.template", "'chatmel'", "chatml", "tokenizer"]),
    "model's template": (
        {"model.language_model.template": "nope"},
        ["model.language_model.template", "'nope'", "vicuna_v1"],
    ),
    "view": ({"stage.views.single": "round"}, ["stage.views.single", "anyres, crop, pad, squash", "_max_N", "'round'"]),
    "reduction to nothing": ({"stage.views.several": "anyres_max_0"}, ["stage.views.several", "'anyres_max_0'"]),
    "newline of no image": ({"stage.views.closing_newline": True}, ["stage.views.closing_newline=true", "no effect"]),
    "export of OneVision's views": (
        {"stage.views.single": "anyres_max_9"},
        ["stage.views={single: anyres_max_9, several: anyres}", "cannot be exported", "stage.result=connector"],
    ),
    "projector": ({"model.projector": "mlp3x_gelu"}, ["model.projector", "'mlp2x_gelu' or 'linear'", "'mlp3x_gelu'"]),
    "schedule": ({"stage.schedule": "linear"}, ["stage.schedule", "'linear'"]),
    "no grids": ({"model.grids": []}, ["model.grids", "at least one"]),
    "grid twice": ({"model.grids": [[1, 2], [1, 2]]}, ["model.grids", "[1, 2]"]),
    "grid of nothing": ({"model.grids": [[0, 2]]}, ["model.grids", "at least 1", "[0, 2]"]),
    "row tokens": ({"packing.max_tokens": 511}, ["packing.max_tokens=511", "stage.max_length=512", "at least 512"]),
    "profiled steps": ({"profile.steps": [12, 10]}, ["profile.steps", "first <= last", "[12, 10]"]),
    "two kernels": (
        {"liger": True, "compile": ("vision_tower", "language_model")},
        ["liger=true and compile=[language_model]", "set one of them"],
    ),
    "row tiles": ({"packing.max_tiles": 4}, ["packing.max_tiles=4", "5 tiles", "model.grids", "at least 5"]),
    "workers": ({"data.workers": -1}, ["data.workers", "at least 0", "-1"]),
    "prefetch": ({"data.prefetch": 0}, ["data.prefetch", "at least 1"]),
    "save": ({"save.every": -1}, ["save.every", "at least 0"]),
    "keep": ({"save.keep": 0}, ["save.keep", "at least 1"]),
    "timeout": ({"timeout_s": 0}, ["timeout_s", "at least 1"]),
    "ZeRO": ({"engine.zero_optimization.stage": 4}, ["engine.zero_optimization.stage", "0, 1, 2 or 3", "4"]),
    "type": ({"stage.epochs": "many"}, ["stage.epochs", "valid number", "'many'"]),
    "count": ({"mixture.sources.tiny_chats.count": 0}, ["mixture.sources.tiny_chats", "count: 0"]),
    "no sources": ({"mixture.sources": {}}, ["mixture", "`sources` is empty"]),
    "source key": (
        {"mixture.sources.tiny_chats.coumt": 3},
        ["tiny_chats.coumt", "no such key", "has count, holdout, share", "mean mixture.sources.tiny_chats.count?"],
    ),
    "no such source": ({"mixture.sources.nobody": {}}, ["mixture.sources.nobody", "data_recipes.prepare"]),
    "excluded source": ({"mixture.exclude": ["nobody"]}, ["mixture.exclude", "nobody", "data_recipes.prepare"]),
    "start": ({"stage.init_from": "/none/such"}, ["stage.init_from", "/none/such", "stage=align", "init_from=null"]),
    "seed": ({"seed": -1}, ["seed", "at least 0", "-1"]),
    "counting": ({"data.length_workers": -1}, ["data.length_workers", "at least 0"]),
    "log": ({"log.every": 0}, ["log.every", "at least 1"]),
    "no steps": ({"max_steps": 0}, ["max_steps", "at least 1", "0"]),
    "endless": ({"stage.epochs": float("inf")}, ["stage.epochs", "finite"]),
    "no number": ({"stage.learning_rates.projector": float("nan")}, ["learning_rates.projector", "nan"]),
    "clipping": ({"stage.clip_norm": 0.0}, ["stage.clip_norm", "above 0", "null"]),
    "decay": ({"stage.weight_decay": -0.1}, ["stage.weight_decay", "0 or more"]),
    "beta": ({"stage.betas": [0.9, 1.0]}, ["stage.betas", "0 to below 1", "[0.9, 1.0]", "[0.9, 0.999]"]),
    "one beta": ({"stage.betas": [0.9]}, ["stage.betas", "two numbers", "[0.9]", "[0.9, 0.999]"]),
    "eps": ({"stage.eps": 0.0}, ["stage.eps", "above 0", "0.0", "1.0e-8"]),
    "no ZeRO": ({"engine.zero_optimization": None}, ["engine.zero_optimization", "dictionary", "None"]),
    "tokenizer": ({"model.language_model.tokenizer": "/none"}, ["model.language_model.tokenizer", "/none"]),
    "local disk": ({"data.local_dir": "/none/such"}, ["data.local_dir", "/none/such", "null"]),
    "retries": ({"data.read_retries": -1}, ["data.read_retries", "at least 0", "-1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_each_rule_names_key_and_fix(tiny_parts: RunConfig, name: str) -> None:
    """Every message has the full key and a valid value."""
    changes, parts = BAD[name]
    with pytest.raises(ConfigError) as caught:
        checked(tiny_parts, changes)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_stage_starts_from_a_folder_or_the_authors_file(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """A folder, and a file as the authors' mm_projector.bin; another file is refused with the folder to name."""
    for name in ("mm_projector.bin", "checkpoint-100.bin", "connector.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for start in ("", "mm_projector.bin", "checkpoint-100.bin"):
        assert checked(tiny_parts, {"stage.init_from": str(tmp_path / start)}).stage.init_from == str(tmp_path / start)
    with pytest.raises(ConfigError, match=rf"connector\.safetensors is a file.*name its folder, {tmp_path}$"):
        checked(tiny_parts, {"stage.init_from": str(tmp_path / "connector.safetensors")})
    with pytest.raises(ConfigError, match=r"no folder and no mm_projector\.bin .*none\.bin; run stage=align"):
        checked(tiny_parts, {"stage.init_from": str(tmp_path / "none.bin")})


@pytest.mark.parametrize(
    "key",
    [
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "data_types",
        "managed_gradient_accumulation",
    ],
)
def test_derived_engine_keys_are_refused(tiny_parts: RunConfig, key: str) -> None:
    """A key of DeepSpeed's that the program derives is refused, and the message names the key that sets it."""
    with pytest.raises(ConfigError, match=rf"engine\.{key} is derived, it is set by .*; remove it"):
        checked(tiny_parts, {f"engine.{key}": {}})


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_single_views_need_one_tile(tiny_parts: RunConfig, mode: str) -> None:
    """If images are single views, a row of one tile is enough, and there is no newline to train."""
    config = checked(tiny_parts, {"packing.max_tiles": 1, "stage.views": {"single": mode, "several": mode}})
    assert config.packing.max_tiles == 1
    assert set(config.stage.rates) == {"vision_tower", "projector", "language_model"}


def test_views_that_no_export_has_end_with_a_connector(tiny_parts: RunConfig) -> None:
    """A newline that closes single views is trained with the projector. OneVision's views can be exported, and need the
    tiles of the largest grid. Samples with one image alone can be exported."""
    onevision = {"single": "anyres_max_9", "several": "pad", "closing_newline": True}
    config = checked(tiny_parts, {"stage.views": onevision})
    assert config.stage.views == ViewsConfig("anyres_max_9", "pad", closing_newline=True)
    with pytest.raises(ConfigError, match=r"packing\.max_tiles=4 "):
        checked(tiny_parts, {"stage.views": onevision, "packing.max_tiles": 4})
    closed = {"single": "pad", "several": "pad", "closing_newline": True}
    config = checked(tiny_parts, {"stage.views": closed, "stage.result": "connector", "packing.max_tiles": 1})
    assert config.stage.rates["image_newline"] == config.stage.rates["projector"]
    with pytest.raises(ConfigError, match="cannot be exported"):
        checked(tiny_parts, {"stage.views": closed})
    assert checked(tiny_parts, {"stage.views": {"single": "anyres"}}).stage.views == ViewsConfig("anyres", None)


def test_a_template_can_be_written_in_the_configuration(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """It is the same after the YAML of the run; a mistake names its key."""
    text = {"question_format": "Q: {text}\n", "header": "A:", "end": "</s>", "bos": True}
    changed = checked(tiny_parts, {"model.language_model.template": text})
    assert changed.model.language_model.template == TemplateConfig("Q: {text}\n", "A:", "</s>", bos=True)
    (tmp_path / "config.yaml").write_text(to_yaml(changed))
    assert load_yaml(tmp_path / "config.yaml") == changed
    for mistake, words in (
        ({"headr": "A:"}, ["stage.template.headr", "did you mean stage.template.header"]),
        ({"bos": "perhaps"}, ["stage.template.bos", "boolean"]),
        ({"end": ""}, ["stage.template: end", "empty"]),
    ):
        with pytest.raises(ConfigError) as caught:
            checked(tiny_parts, {"stage.template": text | mistake})
        assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(ConfigError, match=r"stage\.template\.header has no value"):
        checked(tiny_parts, {"stage.template": {"question_format": "{text}", "end": "</s>"}})


def test_the_tokenizers_own_template_is_a_name(tiny_parts: RunConfig) -> None:
    """`tokenizer` is accepted in the stage and in the model; the tokenizer's template is read later."""
    changed = checked(tiny_parts, {"stage.template": "tokenizer", "model.language_model.template": "tokenizer"})
    assert (changed.stage.template, changed.model.language_model.template) == ("tokenizer", "tokenizer")


def test_written_configuration_is_read_back(run_config: RunConfig) -> None:
    """config.yaml of a run folder is read as the same value, also if its stores no longer exist."""
    moved = replace(run_config, data=replace(run_config.data, store_root="/none/such"))
    run_config.run_dir.mkdir(parents=True)
    path = run_config.run_dir / "config.yaml"
    path.write_text(to_yaml(moved))
    assert load_yaml(path) == moved
    with pytest.raises(ConfigError, match="is not a run folder"):
        load_yaml(path.with_name("other.yaml"))


def test_small_rates_survive_yaml(run_config: RunConfig, tmp_path: Path) -> None:
    """A rate such as 2e-06 is read as a number, although plain YAML reads a string."""
    tuned = replace(run_config, stage=replace(run_config.stage, learning_rates={"projector": 2e-6}))
    (tmp_path / "config.yaml").write_text(to_yaml(tuned))
    assert load_yaml(tmp_path / "config.yaml").stage.learning_rates == {"projector": 2e-6}


def test_load_composes_as_the_command_line(tiny_parts: RunConfig) -> None:
    """`load` composes as the command line does, and reports mistakes with the same messages."""
    model = tiny_parts.model
    overrides = [
        "experiment=quickstart",
        f"model.language_model.path={model.language_model.path}",
        f"model.vision_tower.path={model.vision_tower.path}",
        "model.language_model.weights=random",
        "model.vision_tower.weights=random",
        f"data.store_root={tiny_parts.data.store_root}",
        "stage.batch_size=3",
    ]
    with pytest.raises(ConfigError, match=r"mixture\.sources\..*no prepared source"):
        load(overrides)
    with pytest.raises(ConfigError, match=r"quickstart\.sh draws the raw files and prepares them; .*, run `python -m"):
        load(overrides)
    with pytest.raises(ConfigError, match="stage=none_such: there is no such choice"):
        load([*overrides, "stage=none_such"])


def test_run_folder_follows_name_and_stage(tmp_path: Path, tiny_parts: RunConfig) -> None:
    """Both stages of a run share a folder, and no file."""
    config = tiny_run(tiny_parts.model, tiny_parts.mixture, Path(tiny_parts.data.store_root), tmp_path)
    assert config.run_dir == tmp_path / "tiny" / "finetune"
    assert config.stage.rates == {**RATES, "image_newline": RATES["projector"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.learning_rates.projecter=1.0e-3", "projecter: there is no such part; the parts are vision_tower"),
        ("stage.learning_rates.image_newline=1.0e-3", "write +stage.learning_rates.image_newline=RATE"),
        ("mixture.holdout_seed=1", "mixture.holdout_seed: there is no such key"),
        ("mixture.sources.quickstart_captions.cuont=1", "did you mean mixture.sources.quickstart_captions.count?"),
        ("+mixture.sources.quickstart_captions.cuont=1", "a source of a mixture has count, holdout, share"),
        (
            "mixture.sources.captions.count=1",
            "correct the name, or write +mixture.sources.captions.count=VALUE",
        ),
    ],
)
def test_a_key_that_the_yaml_lacks_is_told_apart_from_an_unknown_one(override: str, message: str) -> None:
    """A key that can be added is shown with `+`; for an unknown key the known ones are listed."""
    with pytest.raises(ConfigError) as caught:
        load(["experiment=quickstart", override], folders=False)
    assert message in str(caught.value)


def test_a_short_mixture_is_read_alike_by_both_programs(tmp_path: Path) -> None:
    """Without a seed, and with a bare name for a whole source, as `data_recipes.prepare` reads the same file."""
    from data_recipes.mixture.mixture import read_mixture

    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "short.yaml").write_text("name: short\nsources:\n  mine:\n")
    ours = load(["experiment=quickstart", "mixture=short"], config_dir=str(tmp_path), folders=False).mixture
    assert ours == read_mixture(tmp_path, "short")
