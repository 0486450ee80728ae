"""Tests of runs with adapters: only the adapters of a part change, ranks and ZeRO change nothing, a resumed run equals
an uninterrupted one, and the export equals the live model.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from data_recipes.mixture.mixture import Mixture
from llava_next.config import LoraConfig
from llava_next.formats.hugging_face import read_hf
from llava_next.model.build import read_backbone
from llava_next.model.parts import is_adapter
from tests.ranks import RankError
from tests.train import cases
from tests.train.cases import with_stage, zero
from tests.train.conftest import StartRanks
from train.checkpoint import saver as checkpoint
from train.config.compose import check, compose_overrides, to_yaml
from train.config.schema import ConfigError, RunConfig, SaveConfig
from train.data.loader import build_processor
from train.export.__main__ import main
from train.plan.model_facts import count_model

pytest.importorskip("peft", reason="peft is not installed: ./scripts/setup.sh --extras lora")

LORA = {
    "vision_tower": LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj")),
    "language_model": LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")),
}
full = pytest.mark.full


@pytest.fixture
def lora_config(run_config: RunConfig) -> RunConfig:
    """The tiny run with adapters in the tower and the language model, and the full projector."""
    return replace(run_config, lora=LORA)


def test_adapters_alone_move(start_ranks: StartRanks, run_config: RunConfig, lora_config: RunConfig) -> None:
    """The first loss is that of the base, bit for bit. After the run every adapter and the projector have changed and
    nothing else; the table and the planner have the same counts."""
    ranks = start_ranks(1)
    # One sample a step: a step with adapters has other costs, so several samples may be in other rows.
    stage = replace(run_config.stage, batch_size=1)
    first, adapted = (
        ranks.run(cases.train, replace(config, name=name, stage=stage), 1)[0].losses[0]
        for name, config in (("base", run_config), ("adapted", lora_config))
    )
    assert adapted == first
    record = ranks.run(cases.train, lora_config)[0]
    for name, before in record.before.items():
        moves = is_adapter(name) or record.parts[name] in ("projector", "image_newline")
        assert np.array_equal(record.after[name], before) != moves, name
    trained = {row.part: row.num_trained for row in record.table}
    layers, width, mlp = 2, 32, 48
    assert trained["language_model"] == layers * 4 * ((width + width) + (width + width // 2) + (mlp + width))
    facts = count_model(read_backbone(lora_config.model), lora_config)
    assert facts.trained == trained
    assert facts.parameters == {row.part: row.num_parameters for row in record.table}
    assert not facts.trains_head


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 3), *(pytest.param(size, stage, marks=full) for size, stage in ((1, 0), (1, 3), (2, 0), (2, 1), (2, 2)))],
)
def test_ranks_and_zero_change_nothing(start_ranks: StartRanks, lora_config: RunConfig, size: int, stage: int) -> None:
    """The losses and weights, adapters included, are those of one rank at ZeRO 2."""
    alone = start_ranks(1).run(cases.train, replace(lora_config, name="alone", engine=zero(2)))[0]
    ours = start_ranks(size).run(cases.train, replace(lora_config, engine=zero(stage)))[0]
    assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
    assert cases.relative_difference(ours.after, alone.after) < 1e-5
    adapters = [{name: run.after[name] for name in run.after if is_adapter(name)} for run in (ours, alone)]
    assert cases.relative_difference(*adapters) < 1e-4


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 2), *(pytest.param(size, stage, marks=full) for size, stage in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 3)))],
)
def test_resumed_is_uninterrupted(start_ranks: StartRanks, lora_config: RunConfig, size: int, stage: int) -> None:
    """Stopped after two steps and resumed, the run has the same losses and ends with bit-identical weights; its
    checkpoint does not contain the base."""
    config = replace(lora_config, engine=zero(stage))
    ranks = start_ranks(size)
    whole = ranks.run(cases.train, replace(config, name="whole"))[0]
    ranks.run(cases.train_up_to, config, 2)
    resumed = ranks.run(cases.train, config)[0]
    assert resumed.first_step == 2
    assert resumed.losses == whole.losses[2:]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed.after[name], weight, err_msg=name)
    saved = checkpoint.find_newest(config.run_dir / "checkpoints")
    assert saved is not None
    assert set(checkpoint.read_state(saved).frozen) == {"vision_tower", "language_model"}
    assert sum(path.stat().st_size for path in (saved / "engine").iterdir()) < 400_000


@full
@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 2)), ((1, 0), (2, 3)), ((2, 2), (3, 3))])
def test_resume_on_other_ranks_and_stages(
    start_ranks: StartRanks, lora_config: RunConfig, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """From one (ranks, ZeRO stage) to another: the same losses, and the same weights up to rounding."""
    whole = start_ranks(1).run(cases.train, replace(lora_config, name="whole"))[0]
    start_ranks(before[0]).run(cases.train_up_to, replace(lora_config, engine=zero(before[1])), 2)
    resumed = start_ranks(after[0]).run(cases.train, replace(lora_config, engine=zero(after[1])))[0]
    assert resumed.first_step == 2
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert cases.relative_difference(resumed.after, whole.after) < 1e-5


@pytest.mark.parametrize(("size", "stage"), [(2, 3), pytest.param(1, 0, marks=full), pytest.param(2, 2, marks=full)])
def test_an_export_is_merged(
    start_ranks: StartRanks,
    run_config: RunConfig,
    lora_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    size: int,
    stage: int,
) -> None:
    """The run's own result equals the export of its last checkpoint byte for byte: the base's names, with only the
    targets and the projector changed. Its losses are the live model's, and its logits in stock transformers are those
    of the packed model (1e-5)."""
    ranks = start_ranks(size)
    base = replace(run_config, name="base")
    ranks.run(cases.write_untrained, base)
    config = with_stage(
        replace(lora_config, engine=zero(stage), save=SaveConfig(every=4)), init_from=str(base.run_dir / "export")
    )
    live = ranks.run(cases.train_write_and_look, config, 8)[0]
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    saved = config.run_dir / "checkpoints" / "step_000004"
    assert main([str(saved)]) == 0, capsys.readouterr().err
    (difference,) = re.findall(r"largest difference (\S+) of their norm", capsys.readouterr().out)
    assert float(difference) <= 1e-5
    out, result = config.run_dir / "exports" / "step_000004_hf", config.run_dir / "export"
    for path in result.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "rank 4, alpha 8, in q_proj, v_proj, down_proj" in (out / "README.md").read_text()
    mixture = Mixture.open(config.mixture, Path(config.data.store_root))
    backbone, written = read_hf(result, config.model)
    with torch.no_grad():
        losses = [
            float(written(batch)[0]) for batch in cases.alone(mixture, build_processor(backbone, config.stage), 8)
        ]
    assert losses == pytest.approx(live, rel=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base.run_dir / "export", result))
    assert before.keys() == after.keys()
    targets = re.compile(
        r"vision_tower\..*layers\.[01]\..*\.(q|v)_proj\.weight|language_model\..*\.(q|v|down)_proj\.weight"
        r"|multi_modal_projector\..*|image_newline"
    )
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed == {name for name in after if targets.fullmatch(name)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora.language_model.rank", 0, r"lora.language_model.rank must be at least 1, got 0"),
        ("lora.projector", {"rank": 1, "alpha": 1, "targets": ["linear_1"]}, r"lora.projector: adapters are supported"),
        (
            "lora.language_model.dropout",
            0.1,
            r"dropout: there is no such key; the keys of a part's adapters are rank, alpha",
        ),
        (
            "stage.learning_rates",
            {"projector": 1.0e-3},
            r"lora.vision_tower: its adapters train at stage.learning_rates.vision_tower, which has no value",
        ),
        ("stage.result", "connector", r"the adapters would be lost; set stage.result=export, or lora=null"),
    ],
)
def test_invalid_arguments_are_errors(lora_config: RunConfig, key: str, value: object, message: str) -> None:
    """The error has the key, the rule and the fix."""
    composed = OmegaConf.create(to_yaml(lora_config))
    assert isinstance(composed, DictConfig)
    OmegaConf.update(composed, key, value, merge=False)
    with pytest.raises(ConfigError, match=message):
        check(composed, folders=False)


def test_missing_package_is_reported_at_the_start(lora_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start is rejected with the configuration; a run folder can be read without peft."""
    composed = OmegaConf.create(to_yaml(lora_config))
    assert isinstance(composed, DictConfig)
    monkeypatch.setattr("llava_next.config.importlib.util.find_spec", lambda name: None)
    assert check(composed, folders=False) == lora_config
    with pytest.raises(ConfigError, match=r"peft is not installed; run `\./scripts/setup\.sh --extras lora`"):
        check(composed)


def test_incomplete_adapter_settings_are_an_error() -> None:
    """On the command line, where adapters are null by default, the error has all required keys."""
    with pytest.raises(ConfigError, match=r"no adapters; set all of rank, alpha, targets, each as \+lora.PART"):
        compose_overrides(["name=x", "lora.language_model.rank=8"])


def test_a_run_with_other_adapters_is_refused(start_ranks: StartRanks, lora_config: RunConfig) -> None:
    """A checkpoint with adapters of another rank is one of another run."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, lora_config, 1)
    other = {**LORA, "language_model": replace(LORA["language_model"], rank=8)}
    with pytest.raises(RankError, match=r"lora.language_model.rank was 4, is 8"):
        ranks.run(cases.train, replace(lora_config, lora=other))
