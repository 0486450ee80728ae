"""Tests of resuming: a resumed run ends where an uninterrupted one does, bit for bit on the same ranks and with the
same losses on others, and a checkpoint of another configuration is rejected.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data_recipes.schema.mixture_config import SourceShare
from llava_next.config import ViewsConfig
from tests.ranks import RankError
from tests.train import cases, faults
from tests.train.cases import aligning, with_stage, zero
from tests.train.conftest import StartRanks
from train.checkpoint import resume
from train.checkpoint import saver as checkpoint
from train.checkpoint.resume import check_same_run
from train.checkpoint.saver import RunState
from train.config.compose import to_yaml
from train.config.schema import ConfigError, RunConfig
from train.distributed.world import World

ALONE = World(0, 0, 1, torch.device("cpu"), torch.float32, None)
SAVED = RunState(1, "f" * 64, {"num_ranks": 1, "zero_stage": 2}, "float32", [], 1, {}, {})


@pytest.mark.parametrize(
    ("kind", "size", "stage"),
    [
        ("finetune", 2, 2),
        ("align", 2, 3),
        pytest.param("sets", 2, 3, marks=pytest.mark.full),
        pytest.param("sets", 1, 2, marks=pytest.mark.full),
        *(
            pytest.param(kind, size, stage, marks=pytest.mark.full)
            for kind in ("finetune", "align")
            for size in (1, 2)
            for stage in (0, 1, 2, 3)
            if (kind, size, stage) not in (("finetune", 2, 2), ("align", 2, 3))
        ),
    ],
)
def test_resumed_is_uninterrupted(
    start_ranks: StartRanks, run_config: RunConfig, kind: str, size: int, stage: int
) -> None:
    """Stopped after two steps and resumed with new engines, a run trains on the remaining samples, has the same losses,
    and ends with bit-identical weights; metrics.jsonl has every step once."""
    sets = with_stage(run_config, views=ViewsConfig("anyres_max_2", "pad", closing_newline=True))
    config = replace({"finetune": run_config, "align": aligning(run_config), "sets": sets}[kind], engine=zero(stage))
    ranks = start_ranks(size)
    whole = ranks.run(cases.train, replace(config, name="whole"))[0]
    ranks.run(cases.train_up_to, config, 2)
    # Another seed's trained parts: whatever the checkpoint does not bring back would show.
    resumed = ranks.run(cases.resume_elsewhere, config)[0]
    assert resumed.first_step == 2
    assert resumed.samples == whole.samples[2:]
    assert resumed.losses == whole.losses[2:]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed.after[name], weight, err_msg=name)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["train/loss"] for line in lines] == pytest.approx(whole.losses, rel=1e-6)
    samples = np.cumsum([len(samples) for samples in whole.samples])
    assert [line["seen/samples"] for line in lines] == samples.tolist()
    for kind, each in (("tokens", "train/input_tokens"), ("tiles", "train/tiles")):
        assert [line[f"seen/{kind}"] for line in lines] == np.cumsum([line[each] for line in lines]).tolist()


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ((1, 2), (1, 2), "loss"),
        ((1, 3), (1, 2), "gradient"),
        *(
            pytest.param((2, stage), after, fault, marks=pytest.mark.full)
            for stage in (0, 1, 2, 3)
            for after in ((2, stage), (1, 3))
            for fault in ("loss", "gradient")
        ),
    ],
)
def test_resume_after_a_first_step_that_was_not_applied(
    start_ranks: StartRanks, run_config: RunConfig, before: tuple[int, int], after: tuple[int, int], fault: str
) -> None:
    """If the first step is not finite and the run then saves, the optimizer has no state yet: on the same ranks or on
    others, the resumed run ends as an uninterrupted one does."""
    config = replace(run_config, engine=zero(before[1]), skip_non_finite=1)
    ranks = start_ranks(before[0])
    whole = ranks.run(faults.train_with_faulty_first_step, replace(config, name="whole"), fault)[0]
    ranks.run(faults.train_with_faulty_first_step, config, fault, 1)
    resumed = start_ranks(after[0]).run(cases.resume_elsewhere, replace(config, engine=zero(after[1])))[0]
    assert resumed.first_step == 1
    assert resumed.losses == pytest.approx(whole.losses[1:], rel=0 if before == after else 1e-5)
    assert cases.relative_difference(resumed.after, whole.after) <= (0 if before == after else 1e-5)
    newest = checkpoint.find_newest(run_config.run_dir / "checkpoints")
    assert newest is None or checkpoint.read_state(newest).updates == 0


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_are_resumed(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """With the optimizer on the host, the result is the same bit for bit after a stop, and the losses are those without
    offloading."""
    engine = zero(stage)
    engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config, ranks = replace(run_config, engine=engine), start_ranks(2)
    plain = ranks.run(cases.train, replace(run_config, name="plain", engine=zero(stage)))[0]
    whole = ranks.run(cases.train, replace(config, name="whole"))[0]
    ranks.run(cases.train_up_to, config, 2)
    resumed = ranks.run(cases.resume_elsewhere, config)[0]
    assert resumed.losses == whole.losses[2:]
    for name, weight in whole.after.items():
        np.testing.assert_array_equal(resumed.after[name], weight, err_msg=name)
    assert whole.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 3), (1, 2)),
        ((1, 0), (2, 3)),
        *(
            pytest.param(before, after, marks=pytest.mark.full)
            for before in ((1, 0), (2, 0), (1, 1), (3, 1), (2, 2), (2, 3), (3, 3))
            for after in ((1, 0), (2, 1), (3, 2), (1, 3), (2, 3))
            if before != after and (before, after) not in (((2, 3), (1, 2)), ((1, 0), (2, 3)))
        ),
    ],
)
def test_resume_on_other_ranks_and_stages(
    start_ranks: StartRanks, run_config: RunConfig, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """From one (ranks, ZeRO stage) to another: the same samples in each step, the same losses, the same weights up to
    rounding, each group with its own rate, and no files of the conversion left."""
    whole = start_ranks(1).run(cases.train, replace(run_config, name="whole", engine=zero(2)))[0]
    start_ranks(before[0]).run(cases.train_up_to, replace(run_config, engine=zero(before[1])), 2)
    resumed = start_ranks(after[0]).run(cases.resume_elsewhere, replace(run_config, engine=zero(after[1])))[0]
    assert resumed.first_step == 2
    assert f"converted: saved by {before[0]} rank(s) at ZeRO {before[1]}" in resumed.origin
    assert resumed.samples == whole.samples[2:]
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert cases.relative_difference(resumed.after, whole.after) < 1e-5
    assert [(row.part, row.peak_rate) for row in resumed.table] == [(row.part, row.peak_rate) for row in whole.table]
    folder = run_config.run_dir / "checkpoints"
    assert [path.name for path in folder.iterdir() if not path.name.startswith("step_000")] == []
    assert not list(folder.glob("*.universal*"))


@pytest.mark.full
def test_run_changes_ranks_and_stages_repeatedly(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """1 -> 2 -> 3 -> 1 ranks and ZeRO 1 -> 3 -> 2 -> 0 in a run of either stage: the same samples in each step, and
    losses within 1e-4 of the uninterrupted run (1e-5 in practice)."""
    for config in (run_config, replace(aligning(run_config), name="aligned")):
        whole = start_ranks(1).run(cases.train, replace(config, name="whole_" + config.name))[0]
        losses, samples = [], []
        for step, (size, stage) in enumerate(((1, 1), (2, 3), (3, 2), (1, 0)), start=1):
            elsewhere = replace(config, engine=zero(stage))
            case = cases.train_up_to_and_see if step < 4 else cases.train
            seen = start_ranks(size).run(case, elsewhere, *([step] if step < 4 else []))[0]
            assert seen.first_step == step - 1
            losses += seen.losses
            samples += seen.samples
        assert samples == whole.samples
        assert losses == pytest.approx(whole.losses, rel=1e-5)


def test_frozen_parts_are_compared(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A run with other frozen parameters is rejected, with their names. A checkpoint does not contain them, since it
    would otherwise hold a language model for each connector."""
    config = aligning(run_config)
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, config, 1)
    with pytest.raises(RankError, match="frozen parameters of image_newline, language_model, vision_tower differ"):
        ranks.run(cases.resume_elsewhere, config, True)
    step_folder = checkpoint.find_newest(config.run_dir / "checkpoints")
    assert step_folder is not None
    state = checkpoint.read_state(step_folder)
    assert set(state.frozen) == {"vision_tower", "image_newline", "language_model"}
    size = sum(path.stat().st_size for path in (step_folder / "engine").iterdir())
    assert size < 200_000, "the connector, its master copy and two moments"


def test_another_run_is_refused_key_by_key(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The error has every differing key with both values and the fixes, and no key that may differ."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, run_config, 1)
    other = with_stage(
        replace(run_config, seed=5, save=replace(run_config.save, keep=7), timeout_s=77),
        batch_size=7,
        learning_rates={**run_config.stage.learning_rates, "projector": 2.0e-3},
    )
    with pytest.raises(RankError) as refused:
        ranks.run(cases.train, other)
    message = str(refused.value)
    for text in (
        "step_000001 is of a run with other settings: seed was 3, is 5; stage.batch_size was 13, is 7; "
        "stage.learning_rates.projector was 0.001, is 0.002",
        "resume_allow=[seed,stage.batch_size,stage.learning_rates.projector]",
        "start a new run with another name=",
        str(run_config.run_dir / "checkpoints"),
    ):
        assert text in message, message
    for free in ("save.keep", "timeout_s"):
        assert free not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 4),
        *((f"model.{key}", value) for key, value in (("projector", "linear"), ("grids", [[1, 2]]))),
        ("model.vision_tower.feature_layer", -1),
        ("lora", {"language_model": {"rank": 4}}),
        *(
            (f"stage.{key}", value)
            for key, value in (
                ("batch_size", 12),
                ("epochs", 2.0),
                ("max_length", 511),
                ("learning_rates.projector", 2.0e-3),
                ("template", "plain"),
                ("views.single", "crop"),
                ("unmask_special_tokens", True),
                ("schedule", "constant"),
                ("warmup_ratio", 0.5),
                ("weight_decay", 0.1),
                ("clip_norm", 2.0),
                ("loss_weighting", "sample"),
            )
        ),
    ],
)
def test_a_setting_that_changes_what_is_learned_is_refused(
    run_config: RunConfig, tmp_path: Path, key: str, value: object
) -> None:
    """Each by itself; and the same settings are accepted."""
    step_folder = tmp_path / "step_000001"
    step_folder.mkdir()
    config_file = checkpoint.config_path(step_folder)
    saved = OmegaConf.create(to_yaml(run_config))
    config_file.write_text(OmegaConf.to_yaml(saved))
    check_same_run(step_folder, SAVED, SAVED.data_fingerprint, run_config, ALONE)
    OmegaConf.update(saved, key, value)
    config_file.write_text(OmegaConf.to_yaml(saved))
    with pytest.raises(ConfigError, match=re.escape(key)):
        check_same_run(step_folder, SAVED, SAVED.data_fingerprint, run_config, ALONE)


def test_another_type_or_other_data_are_refused(run_config: RunConfig, tmp_path: Path) -> None:
    """What the configuration does not hold: the type of the weights, and the fingerprint of the data."""
    step_folder = tmp_path / "step_000001"
    step_folder.mkdir()
    checkpoint.config_path(step_folder).write_text(to_yaml(run_config))
    with pytest.raises(ConfigError, match="dtype was float32, is bfloat16"):
        check_same_run(step_folder, SAVED, SAVED.data_fingerprint, run_config, replace(ALONE, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"data_fingerprint was f+, is other"):
        check_same_run(step_folder, SAVED, "other", run_config, ALONE)


def test_steps_that_were_left_out_count_after_a_restart(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A run that has left out a step remembers it: one more than `skip_non_finite` allows ends it, whenever it was."""
    config = replace(run_config, skip_non_finite=1, save=replace(run_config.save, every=4))
    ranks = start_ranks(1)
    assert ranks.run(faults.run_with_faulty_step, config, "gradient")[0].applied == [True, False, True, True]
    assert ranks.run(faults.start_again, config) == [(4, 1)]


def test_what_is_allowed_may_differ(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A key in resume_allow may differ; the run continues with the new value."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, run_config, 1)
    rates = {**run_config.stage.learning_rates, "projector": 2.0e-3}
    other = with_stage(replace(run_config, resume_allow=("stage.learning_rates",)), learning_rates=rates)
    seen = ranks.run(cases.train, other, 2)[0]
    assert seen.first_step == 1
    assert {row.part: row.peak_rate for row in seen.table}["projector"] == 2.0e-3


def test_other_data_is_refused_with_what_differs(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Another mixture is rejected with the fingerprints and the keys that differ."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, run_config, 1)
    fewer = replace(run_config.mixture, sources={**run_config.mixture.sources, "tiny_chats": SourceShare(count=8)})
    other = replace(run_config, mixture=fewer)
    message = r"data_fingerprint was \w+, is \w+; mixture.sources.tiny_chats.count was None, is 8"
    with pytest.raises(RankError, match=message):
        ranks.run(cases.train, other)


def test_conversion_without_disk_space_is_an_error(
    start_ranks: StartRanks, run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion without enough disk space is not started; the error has the needed and the free space, and the
    fix."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, run_config, 1)
    with pytest.raises(
        RankError, match=r"converting it takes 0\.\d+ GiB in .*, where 0\.00 GiB are free; free some space, or"
    ):
        ranks.run(cases.resume_without_room, replace(run_config, engine=zero(3)))
    assert not list((run_config.run_dir / "checkpoints").glob("*universal*"))


def test_a_checkpoint_runs_no_code(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A file that names anything but DeepSpeed's own few types is rejected before DeepSpeed unpickles it."""
    ranks = start_ranks(1)
    ranks.run(cases.train_up_to, run_config, 1)
    with pytest.raises(RankError, match=r"optim_states.pt names builtins\.eval, which no checkpoint needs"):
        ranks.run(cases.resume_hostile, run_config)


def test_state_is_what_a_run_needs(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The state has step, data, layout, groups, frozen parts and the versions that it was written with."""
    start_ranks(1).run(cases.train_up_to, run_config, 1)
    step_folder = checkpoint.find_newest(run_config.run_dir / "checkpoints")
    assert step_folder is not None
    state = checkpoint.read_state(step_folder)
    assert (state.step, state.updates, state.dtype) == (1, 1, "float32")
    assert state.layout == {"num_ranks": 1, "zero_stage": 2}
    assert {group["part"] for group in state.groups} == {"vision_tower", "projector", "image_newline", "language_model"}
    assert set(state.versions) == {"python", "torch", "deepspeed", "transformers", "code"}
    assert Path(checkpoint.config_path(step_folder)).read_text().startswith("root:")


def test_frozen_parts_are_hashed_on_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread per core that this process may use (affinity), not per core of the machine."""
    numbers: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(resume, "all_gather_objects", lambda _, value: [value])

    def record(_: object, *, num_threads: int) -> dict[str, str]:
        numbers.append(num_threads)
        return {}

    monkeypatch.setattr(resume, "hash_tensors", record)
    assert resume.hash_frozen_parts(torch.nn.Linear(1, 1), ALONE) == {}  # type: ignore[arg-type]
    assert numbers == [2]


def test_only_the_first_rank_reads_the_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has one or two files for each rank: the other ranks open none of them before they load their own."""
    monkeypatch.setattr(resume, "broadcast_from_main", lambda *_: (replace(SAVED, layout={"answer": "of rank 0"}), "t"))
    monkeypatch.setattr(resume, "get_layout", lambda *_: {"answer": "of rank 0"})
    other = replace(ALONE, rank=1, local_rank=1, size=2)
    path = tmp_path / "not_there"  # any read would fail
    with resume.open_checkpoint(path, None, SAVED.data_fingerprint, None, other) as resumption:  # type: ignore[arg-type]
        assert resumption is not None
        assert resumption.states is None


def test_deterministic_algorithms_are_used(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """With deterministic=true torch's deterministic algorithms are on, no operation fails, and on a CPU the losses are
    the same."""
    losses, was_told = start_ranks(1).run(cases.train_deterministically, run_config)[0]
    assert was_told
    assert losses == start_ranks(1).run(cases.train, replace(run_config, name="plain"))[0].losses
