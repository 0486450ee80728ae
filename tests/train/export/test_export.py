"""Tests of exports from files: they equal the run's own result at any ZeRO stage, and they say what was verified."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from llava_next.config import ANYRES, ImageMode, LoraConfig, ProjectorKind, ViewsConfig
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from llava_next.model.parts import set_trained_parts
from tests.llava_next.models import pretrained
from tests.ranks import Ranks
from tests.tiny import HostilePickle, TowerName, tiny_model
from tests.train import cases
from train.checkpoint import atomic_folder
from train.checkpoint.saver import RunState, config_path
from train.checkpoint.trained_weights import trained_weights
from train.config.compose import to_yaml
from train.config.schema import RunConfig, SaveConfig
from train.distributed.free_memory import available_bytes
from train.export.__main__ import main
from train.export.exported_model import open_model
from train.observability.suite_results import weights_fingerprint

Start = Callable[[int], Ranks]
ABOUT = {
    "data_fingerprint": "d" * 64,
    "mixture_fingerprint": "m" * 64,
    "mixture": [
        {"source": "tiny_pictures", "used": 30, "licence": "CC BY | 4.0"},
        {"source": "tiny_chats", "used": 6},
        {"source": "lcs_558k", "used": 4},
    ],
    "num_samples": 40,
    "num_supervised": 1234,
    "num_tiles": 99,
}


def _trained(start_ranks: Start, config: RunConfig, num_ranks: int, zero_stage: int) -> tuple[RunConfig, Path]:
    """Returns a run that has written its result, and its checkpoint of the same step."""
    config = replace(config, engine=cases.zero(zero_stage), save=SaveConfig(every=2, keep=2))
    start_ranks(num_ranks).run(cases.train_and_write, config)
    saved = config.run_dir / "checkpoints" / "step_000004"
    assert saved.is_dir()
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    (config.run_dir / "data.json").write_text(json.dumps(ABOUT))
    return config, saved


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage"),
    [pytest.param(1, 0, marks=pytest.mark.full), pytest.param(2, 2, marks=pytest.mark.full), (2, 3)],
)
def test_export_from_a_checkpoint_equals_the_runs_result(
    start_ranks: Start,
    run_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    num_ranks: int,
    zero_stage: int,
) -> None:
    """Every file of the run's result is equal byte for byte; there are also a card and what was verified."""
    config, saved = _trained(start_ranks, run_config, num_ranks, zero_stage)
    assert main([str(saved)]) == 0, capsys.readouterr().err
    out, result = config.run_dir / "exports" / "step_000004_hf", config.run_dir / "export"
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in result.iterdir()} | {
        "README.md",
        "data.json",
    }
    for path in result.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "tensors are equal, byte for byte" in printed
    (difference,) = re.findall(r"largest difference (\S+) of their norm", printed)
    assert float(difference) <= 1e-5
    card = (out / "README.md").read_text()
    for fact in (f"{num_ranks} rank(s), ZeRO {zero_stage}", "m" * 64, "CC BY \\| 4.0", "not stated", "vLLM: yes"):
        assert fact in card
    assert re.search(r"learning rate of vision_tower +\| 0\.0001 ", card)


@pytest.mark.full
def test_a_squashing_siglip_exports_and_reloads(
    start_ranks: Start, run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on squashed images with a SigLIP tower and exported from the checkpoint: the verification with stock
    transformers passes, and the directory without its run still exports as squashing."""
    model = tiny_model(tmp_path / "parts", "siglip")
    config = cases.with_stage(replace(run_config, model=model), views=ViewsConfig("squash", "squash"))
    config, saved = _trained(start_ranks, config, 1, 0)
    assert main([str(saved)]) == 0, capsys.readouterr().err
    assert "gives the same logits" in capsys.readouterr().out
    card = (config.run_dir / "exports" / "step_000004_hf" / "README.md").read_text()
    assert re.search(r"views +\| \{single: squash, several: squash\} ", card)
    shutil.copytree(config.run_dir / "export", tmp_path / "alone")
    source = open_model(tmp_path / "alone", None)
    assert (source.config, source.views) == (None, ViewsConfig("squash", "squash"))


@pytest.mark.full
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_onevision_views_export_and_reload(
    start_ranks: Start, run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: TowerName
) -> None:
    """Trained on OneVision's views under ZeRO-3 and exported from the checkpoint: the verification with stock
    transformers, which includes a set, passes; the export alone is written again in both layouts."""
    model = tiny_model(tmp_path / "parts", tower)
    views = ViewsConfig("anyres_max_2", "pad", closing_newline=True)
    config, saved = _trained(start_ranks, cases.with_stage(replace(run_config, model=model), views=views), 2, 3)
    assert main([str(saved)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "gives the same logits" in printed
    assert " and " in printed[printed.index("images of") :].splitlines()[0]
    assert "vLLM cuts each of several images" in printed
    shutil.copytree(config.run_dir / "export", tmp_path / "alone")
    source = open_model(tmp_path / "alone", None)
    assert (source.config, source.views) == (None, views)
    for layout, more in (("hf", []), ("original", ["--vision-tower", "some/siglip"])):
        out = tmp_path / layout
        assert main([str(tmp_path / "alone"), "--format", layout, "--out", str(out), *more]) == 0
        written = json.loads((out / "config.json").read_text())
        if layout == "hf":
            assert written["vision_aspect_ratio"] == "anyres_max_2"
        else:
            assert written["image_aspect_ratio"] == "anyres_max_2"
            assert written["mm_patch_merge_type"] == "spatial_unpad"
            assert written["image_grid_pinpoints"]


@pytest.mark.parametrize("mode", get_args(ImageMode))
def test_a_directory_without_its_run_keeps_its_image_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: ImageMode
) -> None:
    """The mode is read from the directory's image processor; the authors' layout has their value, and the card says
    that their code cannot squash for a CLIP tower."""
    backbone = read_backbone(tiny_model(tmp_path / "parts"))
    processor = backbone.processor(template=None, views=ViewsConfig(mode, mode), max_length=4096)
    export, out = tmp_path / "export", tmp_path / "original"
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, export)
    assert open_model(export, None).views == ViewsConfig(mode, mode)
    command = [str(export), "--format", "original", "--out", str(out), "--vision-tower", "some/clip"]
    assert main(command) == 0, capsys.readouterr().err
    value = json.loads((out / "config.json").read_text())["image_aspect_ratio"]
    assert value == ("square" if mode in ("crop", "squash") else mode)
    authors = "no, it crops the centre" if mode == "squash" else "yes"
    assert f"the authors' code (llava): {authors}" in (out / "README.md").read_text()


def test_a_checkpoint_whose_views_no_class_has_is_refused(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2 and one sentence, before weights are read."""
    views = ViewsConfig("anyres", "pad")
    config = cases.with_stage(run_config, views=views, result="connector")
    (tmp_path / "run_state.json").write_text("{}")
    config_path(tmp_path).write_text(to_yaml(config))
    assert main([str(tmp_path), "--no-verify"]) == 2
    error = capsys.readouterr().err
    assert "stage.views={single: anyres, several: pad} cannot be exported" in error


@pytest.mark.full
def test_fp32_copies_are_read_from_the_partitions(start_ranks: Start, run_config: RunConfig) -> None:
    """At ZeRO 1 and 2 the optimizer's fp32 copies, partitioned over two ranks and three groups, equal the weights if
    these are fp32."""
    for zero_stage in (1, 2):
        config = replace(run_config, name=f"zero{zero_stage}")
        _, saved = _trained(start_ranks, config, 2, zero_stage)
        model = build_model(read_backbone(config.model), dtype=torch.float32, seed=0)
        set_trained_parts(model, config.stage.rates)
        weights, masters = trained_weights(model, saved), trained_weights(model, saved, masters=True)
        assert set(weights) == set(masters)
        for name, tensor in weights.items():
            assert masters[name].shape == tensor.shape
            assert torch.equal(masters[name].value(), tensor.value()), name


@pytest.mark.full
def test_frozen_parts_come_from_where_the_run_had_them(
    start_ranks: Start, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of a trained connector contains only that; the rest comes from an export and is compared by
    sha256."""
    first, saved = _trained(start_ranks, run_config, 1, 0)
    config = cases.with_stage(
        run_config, name="again", learning_rates={"projector": 1.0e-3}, init_from=str(first.run_dir / "export")
    )
    config, saved = _trained(start_ranks, config, 1, 0)
    assert main([str(saved), "--dtype", "bf16"]) == 0, capsys.readouterr().err
    exported = load_file(config.run_dir / "exports" / "step_000004_hf" / "model.safetensors")
    trained = load_file(config.run_dir / "export" / "model.safetensors")
    before = load_file(first.run_dir / "export" / "model.safetensors")
    assert {name: tensor.bfloat16() for name, tensor in trained.items()}.keys() == exported.keys()
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor.bfloat16()), name
        assert torch.equal(tensor, before[name]) != name.startswith(("multi_modal_projector", "image_newline")), name
    capsys.readouterr()

    other = (config_path(saved)).read_text().replace(str(first.run_dir / "export"), "null").replace("'null'", "null")
    (config_path(saved)).write_text(other)
    assert main([str(saved)]) == 2
    assert re.search(r"config.yaml has .* bytes, .*--no-verify", capsys.readouterr().err)
    assert main([str(saved), "--no-verify"]) == 2
    assert re.search(
        r"frozen parameters of language_model, vision_tower differ from those of the run", capsys.readouterr().err
    )


@pytest.mark.full
def test_frozen_model_is_streamed(start_ranks: Start, run_config: RunConfig, tmp_path: Path) -> None:
    """A language model of 1 GB with adapters is merged and written to files of 0.1 GB, within the memory of three such
    files and the program."""
    pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")
    folder = tmp_path / "parts"
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 15,
        "num_attention_heads": 8,
    }
    model = pretrained(folder, **sizes, num_key_value_heads=8)
    weights = Path(model.language_model.path) / "model.safetensors"
    assert weights.stat().st_size > 1e9
    adapters = {"language_model": LoraConfig(4, 8.0, ("q_proj", "down_proj"))}
    rates: dict[str, float | None] = {"projector": 1.0e-3, "language_model": 1.0e-4}
    config = cases.with_stage(replace(run_config, model=model, lora=adapters), learning_rates=rates)
    start_ranks(1).run(cases.save_untrained, config, timeout_s=300)
    saved = config.run_dir / "checkpoints" / "step_000000"
    assert sum(path.stat().st_size for path in saved.rglob("*")) < 1e8
    out = tmp_path / "out"
    command = [str(saved), "--no-verify", "--shard-gb", "0.1", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown_gb = int(done.stdout.splitlines()[-1]) * 1024 / 1e9
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) > 1e9
    shutil.rmtree(folder)
    shutil.rmtree(out)
    assert grown_gb < 0.35


_MEASURED = """
import sys
from pathlib import Path
from typing import Any
from train.export import __main__ as program


def high_water_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


before = high_water_kib()
code = program.main(sys.argv[1:])
print(high_water_kib() - before)
sys.exit(code)
"""
"""Exports, and prints by how much the most that was ever resident has grown, in KiB."""


def _write_results_table(run_dir: Path) -> None:
    """As `train.evaluate --suite` writes it."""
    values = {"state": "done", "values": [85.0], "published": [86.5], "num_questions": 8910, "note": "a note"}
    header = {"title": "LLaVA-NeXT", "lmms_eval": "0.7.3", "compared_with": "Vicuna-7B", "source": "a page"}
    header["weights"] = weights_fingerprint(run_dir / "export")
    column = {"title": "POPE", "task": "pope", "metrics": ["pope_f1_score"], **values}
    table = {**header, "columns": {"pope": column, "gqa": {"title": "GQA", "task": "gqa", "state": "skipped"}}}
    (run_dir / "suite_llava_next.json").write_text(json.dumps(table))


def test_a_run_is_its_result_and_a_directory_is_itself(
    start_ranks: Start, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports the folder of a finished run in another dtype and small shards, and then that directory without its
    run."""
    config, _ = _trained(start_ranks, run_config, 1, 0)
    out = config.run_dir.parent / "bf16"
    assert main([str(config.run_dir), "--dtype", "bf16", "--out", str(out), "--shard-gb", "0.00003"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 3
    assert "gives the same logits" in capsys.readouterr().out
    trained = load_file(config.run_dir / "export" / "model.safetensors")
    stock = LlavaNextForConditionalGeneration.from_pretrained(out)
    assert stock.dtype == torch.bfloat16
    described = json.loads((out / "config.json").read_text())
    assert (
        {described[part]["dtype"] for part in ("text_config", "vision_config")} == {described["dtype"]} == {"bfloat16"}
    )
    assert torch.equal(stock.model.image_newline, trained["image_newline"].bfloat16())
    assert "## Results" not in (out / "README.md").read_text()
    _write_results_table(config.run_dir)
    original = out.with_name("original")
    assert main([str(config.run_dir), "--format", "original", "--out", str(original)]) == 0, capsys.readouterr().err
    content = capsys.readouterr().out
    assert "byte for byte" in content
    assert "logits NOT compared: this needs the authors' code" in content
    config_json = json.loads((original / "config.json").read_text())
    assert config_json["mm_vision_tower"] == config.model.vision_tower.path
    assert config_json["mm_projector_lr"] == config.stage.rates["projector"]
    assert config_json["image_grid_pinpoints"][0] == [28, 56]
    actual = load_file(original / "model.safetensors")
    assert torch.equal(actual["model.mm_projector.2.bias"], trained["multi_modal_projector.linear_2.bias"])
    card = (original / "README.md").read_text()
    assert "Measured with lmms-eval 0.7.3, compared with Vicuna-7B, as published in a page." in card
    assert re.search(r"\| POPE +\| 85\.0 +\| 86\.5 +\| -1\.5 +\| 8,910 +\| a note", card)
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["datasets"] == ["liuhaotian/LLaVA-Pretrain"]
    (result,) = metadata["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["metrics"]) == ("POPE", [{"type": "pope_f1_score", "value": 85.0}])
    again = out.with_name("again")
    assert main([str(out), "--out", str(again)]) == 0
    assert "logits NOT compared: without a run" in capsys.readouterr().out
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    assert main([str(out), "--format", "original", "--out", str(again.with_name("original"))]) == 2
    assert "--vision-tower" in capsys.readouterr().err


def test_what_cannot_be_exported_is_an_error(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run, a run without weights, an output that would replace something else: each is an error with the fix."""
    run_dir = run_config.run_dir
    run_dir.mkdir(parents=True)
    for source, rule in (
        (tmp_path / "nothing", "is neither a run folder"),
        (run_dir, "neither an export/ nor a checkpoint"),
    ):
        if source == run_dir:
            (run_dir / "config.yaml").write_text(to_yaml(run_config))
        assert main([str(source)]) == 2
        assert rule in capsys.readouterr().err
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    assert main([str(tmp_path / "llm")]) == 2
    assert (
        "is not a Hugging Face llava, llava_next or llava_onevision directory (model_type llama"
        in capsys.readouterr().err
    )


def test_a_checkpoint_that_would_run_code_is_refused(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the name in it are reported before anything is unpickled."""
    saved = run_config.run_dir / "checkpoints" / "step_000002"
    (saved / "engine").mkdir(parents=True)
    (saved / "config.yaml").write_text(to_yaml(run_config))
    state = RunState(2, "d", {"num_ranks": 1, "zero_stage": 0}, "float32", [], 2, {}, {})
    (saved / "run_state.json").write_text(json.dumps(asdict(state)))
    torch.save({"module": HostilePickle(tmp_path / "ran")}, saved / "engine" / "mp_rank_00_model_states.pt")
    files = [path for path in saved.rglob("*") if path.is_file()]
    sums = {
        path.relative_to(saved).as_posix(): atomic_folder.file_sum(path) for path in files
    }  # a stranger gives his own
    (saved / "sums.json").write_text(json.dumps(sums))
    assert main([str(saved)]) == 2
    assert re.search(r"mp_rank_00_model_states.pt names \w+.system, which no checkpoint needs", capsys.readouterr().err)
    assert not (tmp_path / "ran").exists()
    assert not (run_config.run_dir / "exports").exists()


def test_a_damaged_checkpoint_is_refused_by_the_files_name(
    start_ranks: Start, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte, a missing file and missing hashes are reported, with another checkpoint, before anything is
    written. `--no-verify` exports anyway and says so, also on the card."""
    config = replace(run_config, engine=cases.zero(0))
    start_ranks(1).run(cases.save_often, config, SaveConfig(every=1, keep=2))
    before, saved = (config.run_dir / "checkpoints" / f"step_00000{step}" for step in (3, 4))
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    weights = saved / "engine" / "mp_rank_00_model_states.pt"
    sound = bytearray(weights.read_bytes())
    weights.write_bytes(sound[: len(sound) // 2] + bytes([sound[len(sound) // 2] ^ 1]) + sound[len(sound) // 2 + 1 :])
    content = rf"{saved} is damaged: engine/{weights.name} has other bytes than were written.*export another .*{before}"
    for source in (saved, config.run_dir):
        assert main([str(source)]) == 2
        assert re.search(content, capsys.readouterr().err)
    assert not (config.run_dir / "exports").exists()
    assert main([str(saved), "--no-verify"]) == 0
    assert "NOT verified (--no-verify): neither the source's files nor" in capsys.readouterr().out
    assert "NOT verified" in (config.run_dir / "exports" / "step_000004_hf" / "README.md").read_text()
    weights.unlink()
    assert main([str(saved)]) == 2
    assert f"engine/{weights.name} is missing" in capsys.readouterr().err
    assert main([str(before)]) == 0
    assert "the checkpoint's files match their sha256" in capsys.readouterr().out
    shutil.rmtree(saved)
    (before / "sums.json").unlink()
    assert main([str(before)]) == 2
    assert re.search(r"sums.json.*there is none in .*checkpoints", capsys.readouterr().err)


def test_file_that_the_kernel_cannot_map_is_reported(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is larger than memory and swap is not reported as damaged; the message has the setting that allows
    mapping it."""

    def refused(*_: object) -> None:
        raise RuntimeError("unable to mmap 64424509440 bytes from file <weights>: Cannot allocate memory (12)")

    monkeypatch.setattr("train.export.exported_model._open_folder", refused)
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "vm.overcommit_memory=1" in capsys.readouterr().err


def test_logits_are_not_compared_without_memory(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free memory is that of the host or of a control group around this process, of either version."""
    backbone = read_backbone(run_config.model)
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, tmp_path / "model")
    proc = tmp_path / "root" / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_bytes(tmp_path / "root") == 8000 * 1024
    for version, groups, names in (
        ("", "1:cpu:/other\n0::/job/step\n", ("memory.max", "memory.current", "inactive_file")),
        ("memory", "4:memory:/job/step\n", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        (proc / "self" / "cgroup").write_text(groups)
        limit, used, cached = names
        top = tmp_path / "root" / "sys" / "fs" / "cgroup" / version
        for folder, allowed in ((top / "job", "100000"), (top / "job" / "step", "max" if version == "" else "1" * 19)):
            folder.mkdir(parents=True)
            (folder / limit).write_text(allowed)
            (folder / used).write_text("70000")
            (folder / "memory.stat").write_text(f"anon 5\n{cached} 20000\n")
        assert available_bytes(tmp_path / "root") == 50000
    monkeypatch.setattr("train.export.verify.available_bytes", lambda: available_bytes(tmp_path / "root"))
    assert main([str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "logits NOT compared: loading it in fp32 takes 0.0 GiB, 0.0 GiB are free" in printed
    assert "byte for byte" in printed


def test_an_output_that_is_something_else_is_left_alone(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with other files, and the source itself, are not replaced."""
    source = tmp_path / "model"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    backbone = read_backbone(run_config.model)
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, source)
    for out, rule in ((tmp_path / "mine", "is not a model directory"), (source, "is or contains the exported source")):
        assert main([str(source), "--out", str(out)]) == 2
        assert rule in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").is_file()


@pytest.mark.parametrize(
    ("tower", "projector", "vllm", "sglang"),
    [
        (
            "clip",
            "mlp2x_gelu",
            "vLLM: yes; --mm-processor-kwargs",
            "SGLang: yes; it reads the tower's config from `mm_vision_tower`",
        ),
        (
            "siglip",
            "mlp2x_gelu",
            "vLLM: yes; --mm-processor-kwargs",
            "SGLang: yes; it reads the tower's config from `mm_vision_tower`",
        ),
        (
            "dinov2",
            "mlp2x_gelu",
            "vLLM: no, its LLaVA supports CLIP, SigLIP and Pixtral towers, and this model has a dinov2",
            "SGLang: no, it supports CLIP and SigLIP towers, and this model has a dinov2",
        ),
        (
            "clip",
            "linear",
            "vLLM: no, it does not support linear projectors",
            "SGLang: no, it supports two-layer projectors only",
        ),
    ],
)
def test_export_names_the_supported_software(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tower: TowerName,
    projector: ProjectorKind,
    vllm: str,
    sglang: str,
) -> None:
    """The output and the card name the supported software: transformers with any tower, the servers by tower, and the
    purpose of the other layout."""
    backbone = read_backbone(replace(tiny_model(tmp_path / "parts", tower), projector=projector))
    processor = backbone.processor(template=None, views=ANYRES, max_length=4096)
    export = tmp_path / "export"
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, export)
    other = {"hf": "SGLang and the authors' code: no, use --format original",
             "original": "transformers and vLLM: no, use --format hf"}  # fmt: skip
    for layout, sentences in (("hf", ("transformers: yes", vllm)), ("original", (sglang,))):
        out = tmp_path / layout
        command = [str(export), "--format", layout, "--out", str(out), "--vision-tower", f"some/{tower}"]
        assert main(command) == 0, capsys.readouterr().err
        printed, card = capsys.readouterr().out, (out / "README.md").read_text()
        for sentence in (*sentences, other[layout]):
            assert sentence in printed
            assert f"- {sentence}" in card
