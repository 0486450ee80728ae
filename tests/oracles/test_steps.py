"""Twenty optimizer steps of the tiny model, ours against the authors' program: losses, norms, rates, final weights.

Three runs: stage 1 with square images, stage 1 with AnyRes and image_newline frozen, stage 2 with image_newline at the
language model's rate and the tower frozen. The fixture is made by ./scripts/oracles.sh, which runs the authors' program
in a separate environment; ours runs here, from prepared stores to DeepSpeed's engine.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from llava_next.formats.tensor_names import published_name
from llava_next.model.parts import set_trained_parts
from tests.oracles import our_model, our_steps, tiny_model, tiny_runs
from tests.oracles.inputs import GENERATOR, inputs_sha256
from tests.oracles.our_steps import OurSide
from tests.oracles.save_fixture import PLOT
from tests.oracles.tiny_runs import NUM_STEPS, RUNS, Run
from tests.ranks import Ranks
from tests.train import cases
from train.config.compose import load
from train.config.schema import StageConfig
from train.engine.optimizer import parameter_groups

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"
README = FOLDER.parents[1] / "README.md"
HINT = "make the fixtures again: ./scripts/oracles.sh"
TOLERANCE = 1e-4
"""Of the losses, absolute; they are between 2 and 6, so it is the stricter reading."""

runs = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


def _fixture(name: str) -> dict[str, Any]:
    fixture: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(tiny_runs.inputs(RUNS))}, HINT
    return fixture


@pytest.fixture(scope="module")
def authors() -> dict[str, Any]:
    """The record of the authors' program."""
    return _fixture("steps")


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> OurSide:
    """Raw folders, YAML files and first weights of all runs."""
    return OurSide(tmp_path_factory.mktemp("steps") / "side")


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One rank for all runs."""
    ranks = Ranks(1, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@runs
def test_twenty_steps_are_the_authors(rank: Ranks, side: OurSide, authors: dict[str, Any], run: Run) -> None:
    """Every step's loss to 1e-4, its gradient norm to a relative 1e-4, the rates of the parts, and the trained tensors
    at the end to 1e-4 of what training changed; everything else is as it was."""
    side.prepare(run)
    config = load(side.overrides(run), config_dir=str(side.configs))
    record = rank.run(cases.train, config, timeout_s=300)[0]
    known = authors[run.name]
    assert len(record.losses) == len(known["losses"]) == NUM_STEPS
    np.testing.assert_allclose(record.losses, known["losses"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(record.grad_norms, known["grad_norms"], rtol=1e-4)
    for part, rates in known["rates"].items():
        np.testing.assert_allclose([step[f"lr/{part}"] for step in side.metrics(run)], rates, rtol=1e-7)

    final = load_file(FIXTURES / "steps.safetensors")
    compared = set()
    for live, after in record.after.items():
        name = published_name(live, "clip_vision_model")
        start = tiny_model.weight(name, after.shape)
        np.testing.assert_array_equal(record.before[live], start, err_msg=name)
        expected = final.get(f"{run.name}/{name}")
        if expected is None:
            np.testing.assert_array_equal(after, start, err_msg=name)
        else:
            compared.add(f"{run.name}/{name}")
            change = float(np.linalg.norm(expected.numpy() - start))
            assert change > 0, name
            assert float(np.linalg.norm(after - expected.numpy())) <= 1e-4 * change, name
    assert compared == {name for name in final if name.startswith(f"{run.name}/")}


@runs
def test_the_runs_would_show_a_difference(authors: dict[str, Any], run: Run) -> None:
    """The loss moves by far more than the tolerance, clipping acts, the rate warms up and falls, and parts that differ
    in their rate are there: equal curves say something."""
    known = authors[run.name]
    assert max(known["losses"]) - min(known["losses"]) > 1000 * TOLERANCE
    assert max(known["grad_norms"]) > tiny_runs.CLIP_NORM
    assert set(known["rates"]) == set(run.rates)
    for part, rates in known["rates"].items():
        assert max(rates) == run.rates[part] == rates[2]
        assert rates[0] == 0 < rates[1] < rates[2] > rates[-1] > 0


def test_only_the_newlines_decay_would_differ(side: OurSide, authors: dict[str, Any]) -> None:
    """The recipe has no weight decay. Had it one, the same tensors would decay as with the authors, but for
    image_newline: a vector, which does not decay here."""
    run = RUNS[-1]
    _, model = our_model.build(side.model_config)
    set_trained_parts(model, run.rates)
    decaying = StageConfig("finetune", dict(run.rates), batch_size=1, max_length=1, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        published_name(names[id(parameter)], "clip_vision_model")
        for group in parameter_groups(model, decaying)
        if group["weight_decay"] == 0
        for parameter in group["params"]
    }
    assert ours == {*authors[run.name]["undecayed"], "image_newline"}


@pytest.mark.full
@runs
def test_kept_losses_are_the_programs(side: OurSide, run: Run) -> None:
    """The plotted losses are those of `python -m train` in a process of its own."""
    losses = our_steps.train(side, run)
    np.testing.assert_allclose(losses, _fixture("steps_ours")[run.name]["losses"], rtol=0, atol=TOLERANCE)


def test_plot_and_readme_show_these_numbers(authors: dict[str, Any]) -> None:
    """The plot is of the two files, and README.md names the largest difference between them."""
    ours = _fixture("steps_ours")
    largest = max(
        abs(a - b) for run in RUNS for a, b in zip(ours[run.name]["losses"], authors[run.name]["losses"], strict=True)
    )
    assert largest < TOLERANCE
    facts = re.search(r"largest difference (?:is|was) (\d\.\de-\d+)", README.read_text(encoding="utf-8"))
    assert facts is not None
    assert facts[1] == f"{largest:.1e}"
    drawn = PLOT.read_text(encoding="utf-8")
    for name in ("steps", "steps_ours"):
        assert hashlib.sha256((FIXTURES / f"{name}.json").read_bytes()).hexdigest() in drawn, HINT
