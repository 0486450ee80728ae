"""Tests of `python -m train.plan`: output, files, exit codes, and the origin of the sample lengths."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from data_recipes.mixture.mixture import Mixture
from llava_next.config import ViewsConfig
from llava_next.model.build import read_backbone
from tests.train.cases import with_stage
from tests.train.plan.test_hours import hardware
from train.config.schema import PackingConfig, RunConfig
from train.data.length_table import find_table, open_table, table_folders
from train.data.loader import build_processor
from train.observability.run_folder import Run
from train.plan.__main__ import main
from train.plan.advice import advise
from train.plan.estimate import StagePlanner
from train.plan.execution_settings import read_settings
from train.plan.hardware import Hardware
from train.plan.model_facts import count_model, read_architecture
from train.plan.sample_lengths import Population, load_population
from train.plan.simulated_steps import draw_steps, largest_row
from train.report.curves import predicted_gib

QUICKSTART = ["experiment=quickstart", "hardware=cpu", "--samples", "1000"]


def test_both_stages_and_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without weights, data or GPU: text, JSON and chart agree, and the exit code is 0 since it fits."""
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    assert main([*QUICKSTART, "--out", str(out), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    values = json.loads(out.read_text())
    assert [stage["stage"] for stage in values["stages"]] == ["align", "finetune"]
    for stage in values["stages"]:
        asked = stage["asked"]
        assert asked["memory_total_gib"] == pytest.approx(sum(asked["memory_gib"].values()))
        run = Run(tmp_path, "", {"stage": {"name": stage["stage"]}}, "", [], plan=values)
        assert predicted_gib(run) == asked["memory_total_gib"]  # what a report draws
        assert asked["step_total_s"] == pytest.approx(sum(asked["step_s"].values()))
        assert asked["hours"] == pytest.approx(asked["step_total_s"] * asked["steps"] / 3600)
        assert set(stage["zero"]) == {"zero0", "zero1", "zero2 *", "zero3"}
        assert stage["best"]["hours"] <= asked["hours"] * 1.05
    assert values["hours"] == pytest.approx(sum(stage["asked"]["hours"] for stage in values["stages"]))
    assert "both stages:" in printed
    drawing = ElementTree.fromstring(picture.read_text())
    titles = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "h"]
    assert titles == [
        "align: GiB per rank",
        "align: seconds per step",
        "finetune: GiB per rank",
        "finetune: seconds per step",
    ]


def test_several_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A faster network takes no larger share; every engine is planned, one copy of the weights per node among them; a
    checkpoint and everything that is kept have a size."""
    out = tmp_path / "plan.json"
    main([*QUICKSTART, "stage=finetune", "nodes=2", "engine=zero3_node", "--out", str(out)])
    printed = capsys.readouterr().out
    (stage,) = json.loads(out.read_text())["stages"]
    assert list(stage["zero"]) == ["zero0", "zero1", "zero2", "zero3", "zero3_node *"]
    assert [each["network_gb_s"] for each in stage["networks"]] == [12.5, 25, 50, 200]
    for key in ("share", "share_without_overlap", "hours", "hours_without_overlap"):
        values = [each[key] for each in stage["networks"]]
        assert values == sorted(values, reverse=True)
    asked = stage["asked"]
    assert asked["communication"]["across_bytes_a_node"] > 0
    assert asked["save"]["bytes"] == 12 * sum(stage["trained"].values())
    assert "GB/s per node" in printed


def test_configuration_that_does_not_fit_gets_a_change_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, the numbers, and a change with which it fits."""
    out = tmp_path / "plan.json"
    small = [*QUICKSTART, "stage=finetune", "hardware.memory_gib=2.6", "--out", str(out)]
    assert main(small) == 1
    printed = capsys.readouterr().out
    assert "does not fit: " in printed
    (stage,) = json.loads(out.read_text())["stages"]
    change = stage["nearest"]["change"]
    assert change
    assert f"fits with the fewest changes: {' '.join(change)}" in printed
    assert main([*small, *change]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=quickstart"], r"hardware has no value; give one of a100_40g, .*cpu"),
        (["experiment=quickstart", "hardware=abacus"], "hardware=abacus: there is no such choice; the choices are"),
        (["experiment=quickstart", "hardware=cpu", "nodes=0"], "nodes must be an integer of at least 1, got 0"),
        (["experiment=quickstart", "hardware=cpu", "packing.max_tokens=1"], "packing.max_tokens=1 is smaller than"),
        (["experiment=quickstart", "hardware=cpu", "stage=align", "data.store_root=nowhere"], "--samples N"),
        (["experiment=quickstart", "hardware=cpu", "model.language_model.name=mine"], "config.json is sufficient"),
        (["quickstart", "hardware=cpu"], "'quickstart' is no override KEY=VALUE"),
    ],
)
def test_invalid_arguments_are_one_sentence(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Exit code 2, as for a run."""
    import re

    monkeypatch.setenv("LLAVA_NEXT_CACHE", str(tmp_path))
    assert main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)


def planner_of(config: RunConfig, node: Hardware, population: Population) -> StagePlanner:
    """Returns a planner of a run whose directories exist."""
    return StagePlanner(config, count_model(read_architecture(config.model), config), population, node)


def test_lengths_are_the_runs_own_once_it_has_counted(tiny_parts: RunConfig, tmp_path: Path) -> None:
    """Without a length table the published lengths are used, and the plan says so; the number of samples is that of the
    prepared mixture."""
    store_root = tmp_path / "stores"
    store_root.symlink_to(tiny_parts.data.store_root)
    config = replace(tiny_parts, data=replace(tiny_parts.data, store_root=str(tmp_path / "nowhere")))
    architecture = read_architecture(config.model)
    drawn = load_population(config, architecture, num_samples=500)
    assert (drawn.num_samples, drawn.origin) == (500, "lengths estimated for the published 779K mixture")
    assert drawn.tokens.max() <= config.stage.max_length
    backbone = read_backbone(tiny_parts.model)
    mixture = Mixture.open(tiny_parts.mixture, store_root)
    empty = tmp_path / "no_table"  # the stores without the tables of other tests
    shutil.copytree(store_root.resolve(), empty, ignore=shutil.ignore_patterns(".lengths"))
    prepared = load_population(replace(tiny_parts, data=replace(tiny_parts.data, store_root=str(empty))), backbone)
    assert (prepared.num_samples, prepared.origin) == (mixture.num_samples, drawn.origin)
    processor = build_processor(backbone, tiny_parts.stage)
    table = open_table(mixture, processor, store_root / ".lengths", is_writer=True, num_workers=1, show_progress=False)
    counted = load_population(tiny_parts, backbone)
    assert counted.origin.startswith("lengths counted")
    assert counted.tokens.tolist() == table.rows["tokens"].tolist()
    assert counted.num_samples == len(table)


def test_published_lengths_follow_the_views(tiny_parts: RunConfig) -> None:
    """A reduced feature map has fewer tokens in as many tiles; an image with one view has one tile."""
    architecture = read_architecture(tiny_parts.model)
    plain, reduced, single, closed = (
        load_population(with_stage(tiny_parts, max_length=4096, views=views), architecture, num_samples=500)
        for views in (
            ViewsConfig("anyres"),
            ViewsConfig("anyres_max_1", "pad"),
            ViewsConfig("pad", "anyres"),
            ViewsConfig("pad", closing_newline=True),
        )
    )
    np.testing.assert_array_equal(reduced.tiles, plain.tiles)
    assert (reduced.tokens <= plain.tokens).all()
    assert reduced.tokens.sum() < plain.tokens.sum()
    assert single.tiles.max() == 1
    np.testing.assert_array_equal(closed.tokens - single.tokens, single.tiles)


def test_lengths_of_the_runs_own_folder(run_config: RunConfig, tmp_path: Path) -> None:
    """A run keeps its length table in its own folder where the stores belong to another user; its plan finds it there,
    and the plan of another run does not."""
    stores = tmp_path / "stores"
    shutil.copytree(run_config.data.store_root, stores, ignore=shutil.ignore_patterns(".lengths"))
    config = replace(run_config, data=replace(run_config.data, store_root=str(stores)))
    backbone = read_backbone(config.model)
    mixture, processor = Mixture.open(config.mixture, stores), build_processor(backbone, config.stage)
    own = config.run_dir / "lengths"
    table = open_table(mixture, processor, own, is_writer=True, num_workers=1, show_progress=False)
    counted = load_population(config, backbone)
    assert counted.origin.startswith("lengths counted")
    assert counted.tokens.tolist() == table.rows["tokens"].tolist()
    assert find_table(mixture, processor, table_folders(replace(config, name="other"))) is None


def test_rows_are_those_of_the_run(tiny_parts: RunConfig) -> None:
    """Every sample of the drawn steps is in one row, and the largest row is within the budgets."""
    tokens = np.array([300, 20, 40, 500, 60, 30, 200, 90] * 10)
    population = Population(tokens, tokens // 10, tokens // 100, 80, "made up")
    budgets = PackingConfig(640, 24)
    costs = count_model(read_architecture(tiny_parts.model), tiny_parts).costs
    steps = draw_steps(population, budgets, costs, num_ranks=2, batch_size=8, seed=0, count=10)
    assert sum(step.sums[..., 0].sum() for step in steps) == tokens.sum()
    assert all(step.samples.sum() == 8 for step in steps)
    row = largest_row(steps, population, budgets)
    assert 500 <= row.tokens <= 640


def test_advice_fits_and_is_not_slower(tiny_parts: RunConfig) -> None:
    """On a card with too little memory, the nearest settings have the fewest changes and fit; the best ones are not
    slower."""
    population = load_population(tiny_parts, read_architecture(tiny_parts.model), num_samples=10_000)
    node = replace(hardware("rtx4090_24g"), reserved_gib=0.0)
    roomy = planner_of(tiny_parts, node, population)
    asked = roomy.estimate(read_settings(tiny_parts, 1))
    assert asked.fits
    assert advise(roomy, asked).nearest is not None
    tight = planner_of(tiny_parts, replace(node, memory_gib=asked.memory.total / 2**30 * 0.8), population)
    asked = tight.estimate(read_settings(tiny_parts, 1))
    advice = advise(tight, asked)
    assert not asked.fits
    assert advice.best is not None
    assert advice.nearest is not None
    assert advice.best.fits
    assert advice.nearest.fits
    assert (
        0
        < len(advice.nearest.settings.list_overrides(asked.settings))
        <= len(advice.best.settings.list_overrides(asked.settings))
    )
    assert advice.best.hours <= advice.nearest.hours * 1.05
    hopeless = planner_of(tiny_parts, replace(node, memory_gib=1e-6), population)
    assert advise(hopeless, hopeless.estimate(read_settings(tiny_parts, 1))).nearest is None
