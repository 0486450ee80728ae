"""Tests of training: ranks, ZeRO and row budgets change nothing that is learned, and the table of learning rates
describes what is trained and how fast.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_next.config import ANYRES, ViewsConfig
from tests.ranks import Ranks
from tests.tiny import tiny_mixture, tiny_model
from tests.train import cases
from tests.train.cases import Record, aligning, relative_difference, with_stage, zero
from train.config.schema import PackingConfig, RunConfig

StartRanks = Callable[[int], Ranks]
BUDGETS = {
    "narrow": PackingConfig(max_tokens=640, max_tiles=24),
    "few_tiles": PackingConfig(max_tokens=4096, max_tiles=12),
    "wide": PackingConfig(max_tokens=4096, max_tiles=96),
}
QUICK = [
    *((1, stage, "narrow") for stage in (0, 3)),
    *((2, stage, "narrow") for stage in (0, 1, 2, 3)),
    (1, 2, "wide"),
    (2, 3, "wide"),
    (3, 3, "few_tiles"),
    (4, 2, "narrow"),
]
ALL = [(size, stage, budget) for size in (1, 2, 3, 4) for stage in (0, 1, 2, 3) for budget in BUDGETS]
ALONE = (1, 2, "narrow")
_FINISHED: dict[tuple[int, int, str], Record] = {}


def finished(start_ranks: StartRanks, config: RunConfig, size: int, stage: int, budget: str = "narrow") -> Record:
    """Returns rank 0's record of the run on `size` ranks; each run is trained once and used by every test."""
    key = (size, stage, budget)
    if key not in _FINISHED:
        chosen = replace(config, engine=zero(stage), packing=BUDGETS[budget])
        records = start_ranks(size).run(cases.train, chosen)
        for record in records[1:]:
            assert (record.losses, record.samples) == (records[0].losses, records[0].samples)
            assert [len(rows) for rows in record.rows] == [len(rows) for rows in records[0].rows]
        taken = np.array([[sum(rows) for rows in record.rows] for record in records]).sum(axis=0)
        assert taken.tolist() == [len(samples) for samples in records[0].samples]
        _FINISHED[key] = replace(records[0])
    return _FINISHED[key]


def assert_same_training(actual: Record, expected: Record) -> None:
    """The samples of each step (exact), the loss of each (relative 1e-5), and the final weights (1e-4, one norm)."""
    assert actual.samples == expected.samples
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(actual.by_source, expected.by_source, rtol=1e-5)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert relative_difference(actual.after, expected.after) < 1e-4
    # The same bound on what training changed, which is far less than the weights themselves. Key biases have no true
    # gradient: Adam moves them by the sign of rounding.
    moved = [
        {name: run.after[name] - run.before[name] for name in run.after if not name.endswith("k_proj.bias")}
        for run in (actual, expected)
    ]
    assert relative_difference(*moved) < 1e-2


@pytest.mark.parametrize(
    ("size", "stage", "budget"),
    [*QUICK, *(pytest.param(*run, marks=pytest.mark.full) for run in ALL if run not in (*QUICK, ALONE))],
)
def test_ranks_zero_and_budgets_change_nothing(
    start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int, budget: str
) -> None:
    """Any number of ranks, ZeRO stage and row budget gives the same samples, losses and final weights, with every part
    trained, text-only samples among the others, and a last step in which only one rank has a row."""
    alone = finished(start_ranks, run_config, *ALONE)
    assert [len(samples) for samples in alone.samples] == [13, 13, 13, 1]
    assert_same_training(finished(start_ranks, run_config, size, stage, budget), alone)


@pytest.mark.full
@pytest.mark.parametrize(("size", "stage", "budget"), [(2, 3, "narrow"), (3, 2, "wide"), (2, 0, "few_tiles")])
def test_sets_are_trained_alike_on_any_ranks(
    start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int, budget: str
) -> None:
    """With OneVision's views, where single images, sets and text-only samples differ in views and newlines."""
    config = with_stage(run_config, views=ViewsConfig("anyres_max_2", "pad", closing_newline=True))
    alone = start_ranks(1).run(cases.train, replace(config, name="alone", engine=zero(2), packing=BUDGETS["narrow"]))[0]
    plain = finished(start_ranks, run_config, *ALONE)
    assert alone.samples == plain.samples
    assert alone.losses != plain.losses
    other = start_ranks(size).run(cases.train, replace(config, engine=zero(stage), packing=BUDGETS[budget]))[0]
    assert_same_training(other, alone)


def test_budgets_and_ranks_change_the_rows(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The runs that are compared above have different rows."""
    runs = [ALONE, (1, 2, "wide"), (2, 3, "narrow"), (2, 3, "wide"), (3, 3, "few_tiles")]
    rows = [finished(start_ranks, run_config, *run).rows for run in runs]
    micro_steps = dict(zip(runs, (len(of_run[0]) for of_run in rows), strict=True))
    assert micro_steps[ALONE] > micro_steps[1, 2, "wide"]
    assert micro_steps[2, 3, "narrow"] > micro_steps[2, 3, "wide"]
    assert len({str(of_run) for of_run in rows}) == len(runs)


def test_gradient_norm_is_that_of_the_whole_step(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The logged norm is that of the whole step's gradient, for any number of ranks."""
    alone = finished(start_ranks, run_config, *ALONE)
    for size, stage in ((2, 1), (2, 2), (2, 3)):
        np.testing.assert_allclose(
            finished(start_ranks, run_config, size, stage).grad_norms, alone.grad_norms, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("size", "stage"),
    [(1, 0), (1, 2), *((2, stage) for stage in (0, 1, 2, 3)), pytest.param(3, 3, marks=pytest.mark.full)],
)
def test_norms_of_parts_make_the_gradients_norm(
    start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int
) -> None:
    """In every step, before clipping: the root of the sum of squares over the parts is the gradient's norm, and a
    part's norm is the same on any ranks and at any ZeRO stage."""
    alone, run = finished(start_ranks, run_config, *ALONE), finished(start_ranks, run_config, size, stage)
    assert max(run.grad_norms) > run_config.stage.clip_norm  # type: ignore[operator]
    for norm, parts, expected in zip(run.grad_norms, run.norms_by_part, alone.norms_by_part, strict=True):
        assert parts.keys() == run_config.stage.rates.keys()
        assert np.sqrt(sum(part**2 for part in parts.values())) == pytest.approx(norm, rel=1e-5)
        assert parts == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_norms_of_parts_are_those_of_the_gradient(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """Adam's first moment after one step without clipping is a tenth of the gradient; so are the logged norms with
    clipping and with offloading."""
    free = with_stage(replace(run_config, engine=zero(0)), clip_norm=None)
    moments = start_ranks(1).run(cases.train, free, 1)[0].moments_by_part
    expected = {part: 10 * moment for part, moment in moments.items()}
    assert expected.keys() == run_config.stage.rates.keys()
    assert finished(start_ranks, run_config, *ALONE).norms_by_part[0] == pytest.approx(expected, rel=1e-4)
    engine = zero(stage)
    engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    offloaded = start_ranks(2).run(cases.train, replace(run_config, engine=engine), 1)[0]
    assert offloaded.norms_by_part[0] == pytest.approx(expected, rel=1e-4)


def test_metrics_add_up(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """Every step is once in metrics.jsonl, as strict JSON; the sources' losses, weighted by their tokens, give the
    step's loss; the rate of each part is scaled by the schedule."""
    record = start_ranks(1).run(cases.train, run_config)[0]
    lines = [json.loads(line) for line in (run_config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line, loss in zip(lines, record.losses, strict=True):
        assert line["train/loss"] == pytest.approx(loss, rel=1e-6)
        assert {key for key in line if key.startswith("train/grad_norm/")} == {
            f"train/grad_norm/{part}" for part in run_config.stage.rates
        }
        names = [key.removeprefix("train/tokens/") for key in line if key.startswith("train/tokens/")]
        tokens = sum(line[f"train/tokens/{name}"] for name in names)
        assert tokens == line["train/supervised_tokens"]
        total = sum(line[f"train/loss/{name}"] * line[f"train/tokens/{name}"] for name in names)
        assert total / tokens == pytest.approx(line["train/loss"], rel=1e-6)
        assert line["lr/projector"] == line["lr/image_newline"]
        assert line["lr/projector"] / line["lr/vision_tower"] == pytest.approx(10.0)
    assert {name for line in lines for name in line if name.startswith("train/loss/")} == {
        "train/loss/tiny_chats",
        "train/loss/tiny_pictures",
    }
    assert 0 < lines[0]["perf/balance"] <= 1


def test_slow_rank_is_named(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A rank that is slow in its forward passes is in the metrics, although in backward passes the others wait for
    it."""
    start_ranks(2).run(cases.train_with_slow_rank, run_config, 1, 0.05)
    lines = [json.loads(line) for line in (run_config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["perf/slowest_rank"] for line in lines] == [1] * 4
    assert all(line["perf/slowest_excess"] > 0.1 for line in lines)


def test_a_run_that_ends_early_has_the_rates_of_the_whole_run(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """The schedule depends on the stage's steps, not on the step after which this run ends (`max_steps`)."""
    start_ranks(1).run(cases.train, run_config, 2)
    lines = [json.loads(line) for line in (run_config.run_dir / "metrics.jsonl").read_text().splitlines()]
    peak = run_config.stage.rates["projector"]
    assert [line["lr/projector"] for line in lines] == pytest.approx([peak, peak * (1 + np.cos(np.pi / 4)) / 2])


@pytest.mark.parametrize(
    ("size", "stage"), [(2, 2), (2, 3), *(pytest.param(1, s, marks=pytest.mark.full) for s in (0, 1, 2, 3))]
)
def test_align_trains_the_connector_alone(
    start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int
) -> None:
    """Stage 1 changes every tensor of projector and newline; the frozen parts are bit-equal."""
    config = replace(aligning(run_config, views=ANYRES), engine=zero(stage))
    record = start_ranks(size).run(cases.train, config)[0]
    for name, part in record.parts.items():
        same = np.array_equal(record.before[name], record.after[name])
        assert same != (part in ("projector", "image_newline")), name
    rows = {row.part: row for row in record.table}
    assert rows["projector"].num_trained == rows["projector"].num_parameters > 0
    assert rows["image_newline"].peak_rate == rows["projector"].peak_rate == 1.0e-3
    for part in ("vision_tower", "language_model"):
        assert (rows[part].num_trained, rows[part].peak_rate) == (0, None)
        assert rows[part].num_parameters == sum(
            record.before[name].size for name, of in record.parts.items() if of == part
        )


@pytest.mark.parametrize("frozen", [None, "vision_tower", pytest.param("language_model", marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_part_moves_at_its_rate(
    start_ranks: StartRanks, run_config: RunConfig, stage: int, frozen: str | None
) -> None:
    """Adam's first update equals the rate wherever there is a gradient: after one step the largest change in each part
    is that part's rate, in every decay group and at every ZeRO stage. A frozen part is bit-equal, and so is what no
    forward pass reads."""
    rates = {**cases.RATES, "image_newline": 3.0e-3}
    config = with_stage(
        run_config,
        learning_rates={part: rate for part, rate in rates.items() if part != frozen},
        schedule="constant",
        weight_decay=0.0,
    )
    record = start_ranks(2).run(cases.train, replace(config, engine=zero(stage)), 1)[0]
    assert {row.part: row.peak_rate for row in record.table} == {**rates, **({frozen: None} if frozen else {})}
    for part, rate in config.stage.rates.items():
        for vectors in (True, False):
            moved = [
                np.abs(record.after[name] - record.before[name]).max()
                for name, of in record.parts.items()
                if of == part and (record.before[name].ndim == 1) == vectors
            ]
            assert not moved or max(moved) == pytest.approx(rate, rel=2e-2), (part, vectors)
    still = [name for name, part in record.parts.items() if part == frozen or "post_layernorm" in name]
    assert len(still) > 1
    for name in still:
        assert np.array_equal(record.after[name], record.before[name]), name


@pytest.mark.parametrize("stage", [0, 2, pytest.param(1, marks=pytest.mark.full), 3])
def test_gradients_are_clipped(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """Adam's first moment after one step is a tenth of the applied gradient: its norm is `clip_norm` if the gradient
    was larger, and the gradient's norm without clipping."""
    config = replace(run_config, engine=zero(stage))
    clipped = start_ranks(1).run(cases.train, with_stage(config, clip_norm=0.5), 1)[0]
    free = start_ranks(1).run(cases.train, with_stage(config, clip_norm=None), 1)[0]
    norm = finished(start_ranks, run_config, *ALONE).grad_norms[0]
    assert norm > 0.5
    assert np.sqrt(free.moment_square) * 10 == pytest.approx(norm, rel=1e-3)
    assert np.sqrt(clipped.moment_square) * 10 == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_loss_weighting(start_ranks: StartRanks, run_config: RunConfig, weighting: str) -> None:
    """`token`: the mean over the step's supervised tokens. `sample`: the mean over samples of each sample's mean."""
    config = with_stage(run_config, loss_weighting=weighting)
    for size in (1, 2):
        seen, expected = start_ranks(size).run(cases.first_loss, config)[0]
        assert seen == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_connector_goes_from_align_to_finetune(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """The second stage starts from exactly the projector and newline that the first one wrote."""
    aligned = replace(aligning(run_config), engine=zero(stage))
    written = start_ranks(2).run(cases.train_and_write, aligned)[0]
    tuned = with_stage(replace(run_config, engine=zero(stage)), init_from=str(aligned.run_dir / "connector"))
    record = start_ranks(2).run(cases.train, tuned, 1)[0]
    connector = [name for name, part in record.parts.items() if part in ("projector", "image_newline")]
    assert len(connector) == 5
    for name in connector:
        np.testing.assert_array_equal(record.before[name], written.after[name])
        # Square pictures have no newline token, so stage 1 leaves that vector as it was.
        moved = not np.array_equal(record.before[name], written.before[name])
        assert moved == (record.parts[name] == "projector")


def test_a_linear_connector_and_padded_views_go_through_both_stages(
    start_ranks: StartRanks, run_config: RunConfig
) -> None:
    """LLaVA's connector and LLaVA-1.5's views at ZeRO-3: the second stage starts from the single layer of the first,
    and writes a stock LLaVA with the final layer."""
    from transformers import AutoModelForImageTextToText

    config = replace(run_config, engine=zero(3), model=replace(run_config.model, projector="linear"))
    aligned = aligning(config)
    written = start_ranks(2).run(cases.train_and_write, aligned)[0]
    tuned = with_stage(config, init_from=str(aligned.run_dir / "connector"), views=ViewsConfig("pad", "pad"))
    record = start_ranks(2).run(cases.train_and_write, tuned)[0]
    connector = [name for name, part in record.parts.items() if part == "projector"]
    assert [name.rpartition(".")[2] for name in connector] == ["weight", "bias"]
    stock, result = AutoModelForImageTextToText.from_pretrained(tuned.run_dir / "export", output_loading_info=True)
    assert [problem for problem in result.values() if problem] == []
    for name in connector:
        np.testing.assert_array_equal(record.before[name], written.after[name])
        assert not np.array_equal(record.after[name], record.before[name])
        layer = stock.get_parameter(name.removeprefix("hf.").replace("projector.", "projector.linear_1."))
        np.testing.assert_array_equal(layer.detach().numpy(), record.after[name])


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.full), 3])
def test_a_shared_head_stays_shared(start_ranks: StartRanks, run_config: RunConfig, tmp_path: Path, stage: int) -> None:
    """A head that is tied to the embedding is one tensor on the receiving ranks too: two ranks learn what one does."""
    config = replace(run_config, model=tiny_model(tmp_path, tied=True), engine=zero(stage))
    one = start_ranks(1).run(cases.train, replace(config, name="one"))[0]
    two = start_ranks(2).run(cases.train, replace(config, name="two"))[0]
    assert "hf.lm_head.weight" not in two.after
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert relative_difference(two.after, one.after) < 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_builds_the_model_for_all(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """Before the engine only rank 0 has the weights; with it each rank has all, at ZeRO-3 its share only."""
    (first, whole), (second, other) = start_ranks(2).run(
        cases.held_at_the_start, replace(run_config, engine=zero(stage))
    )
    assert first > 0 == second
    share = 0.5 if stage == 3 else 1.0
    assert whole == pytest.approx(share * first, rel=0.1)  # vectors under ZeRO-3's threshold stay whole
    assert other == pytest.approx(share * first, rel=0.1)


@pytest.mark.parametrize(
    ("size", "stage"),
    [(2, 1), (2, 2), (2, 3), *(pytest.param(*world, marks=pytest.mark.full) for world in ((2, 0), (3, 3), (4, 3)))],
)
def test_unequal_ranks_stay_in_step(start_ranks: StartRanks, run_config: RunConfig, size: int, stage: int) -> None:
    """Ranks with only text, only images, or no sample finish a micro-step together: all issue the same collectives in
    the same order, with the same kinds, shapes and dtypes."""
    first, *others = start_ranks(size).run(cases.unequal_step, replace(run_config, engine=zero(stage)))
    assert first.kinds == ["text", "pictures", "nothing"]
    if stage == 0:  # the agreement, and all gradients in one message: each rank knows their norm then
        # Loss sums and counts of two sources, two flags, and two times of each rank.
        assert [one.sizes[0] for one in first.collectives] == [(2 * 2 + 2 + 2 * size,), (first.num_trained,)]
    else:
        assert len(first.collectives) >= 3
    for other in others:
        assert other.kinds != first.kinds or size > 3
        assert other.collectives == first.collectives
        assert first.loss == other.loss > 0


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_recompute_stays_in_step_with_blank_rows(
    start_ranks: StartRanks, tiny_parts: RunConfig, tmp_path: Path, size: int
) -> None:
    """Nine samples in steps of eight: in the last step only one rank has a row. ZeRO-3 with recompute finishes it, and
    learns what ZeRO-2 does without recompute."""
    mixture, store_root = tiny_mixture(tmp_path / "data", 9)
    data = replace(tiny_parts.data, store_root=str(store_root))
    config = with_stage(replace(tiny_parts, root=str(tmp_path / "outputs"), mixture=mixture, data=data), batch_size=8)
    expected = start_ranks(1).run(cases.train, replace(config, name="plain"))[0]
    recomputed = replace(config, engine=zero(3), recompute=("language_model", "vision_tower"))
    records = start_ranks(size).run(cases.train, recomputed, timeout_s=30)  # where it hangs, it hangs for ever
    assert sorted(rank.rows[1] for rank in records) == [[0]] * (size - 1) + [[1]]
    assert_same_training(records[0], expected)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_collectives_do_not_depend_on_the_row(start_ranks: StartRanks, run_config: RunConfig, stage: int) -> None:
    """A row with images, a text-only row and an empty one issue the same collectives; without the blank tile of the
    latter two, this test fails."""
    config = replace(run_config, engine=zero(stage))
    records = start_ranks(2).run(cases.collectives_by_kind, config, False)
    for rank in records:
        assert rank["text"] == rank["pictures"] == rank["nothing"] == records[0]["text"]
    stock = start_ranks(2).run(cases.collectives_by_kind, config, True)
    for rank in stock:
        assert rank["pictures"] == records[0]["pictures"]
        assert rank["text"] != rank["pictures"]


def test_another_order_of_collectives_is_seen(start_ranks: StartRanks) -> None:
    """Two ranks that issue the same collectives in different orders are not reported as equal."""
    first, second = start_ranks(2).run(cases.all_reduces, [[0, 1], [0, 1]])
    assert first == second
    assert [(entry.kind, entry.sizes, entry.dtypes) for entry in first] == [
        ("gloo:all_reduce", ((3 + number,), (3 + number,)), ("Float", "Float")) for number in (0, 1)
    ]
    first, second = start_ranks(2).run(cases.all_reduces, [[0, 1], [1, 0]])
    assert first != second


def test_wrong_count_stops_the_step(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """If the number of supervised tokens differs from the table's, every rank stops before the step is applied."""
    for message, changed in start_ranks(2).run(cases.wrong_count, run_config):
        assert "step 0" in message
        assert "the length table counts" in message
        assert not changed


def test_non_finite_loss_stops_the_step(start_ranks: StartRanks, run_config: RunConfig) -> None:
    """A non-finite loss on one rank stops all of them, with source and samples; nothing is applied."""
    for message, changed in start_ranks(2).run(cases.poisoned_step, run_config):
        assert "not finite" in message
        assert re.search(r"Its samples: tiny_\w+ '\d{6}'", message)
        assert not changed


@pytest.mark.parametrize("all_of_them", [False, True])
def test_silent_source_stops_the_step(start_ranks: StartRanks, run_config: RunConfig, all_of_them: bool) -> None:
    """A source without a supervised token in the step, or a step without one, stops every rank with the ids of those
    samples; nothing is applied."""
    for message, changed, ids in start_ranks(2).run(cases.silent_source, run_config, all_of_them):
        assert "step 0" in message
        assert "step 0 has no supervised token" in message or "had no supervised token" in message
        assert len(ids) > 1
        assert [name for name in ids if repr(name) not in message] == []
        assert not changed


@pytest.mark.full
def test_stuck_rank_is_named(run_config: RunConfig, tmp_path: Path) -> None:
    """The test harness names a rank that never reaches its collective, with its stack."""
    ranks = Ranks(2, tmp_path)
    try:
        with pytest.raises(AssertionError, match=r"(?s)rank 1 is stuck.*sleep_for_ever"):
            ranks.run(cases.sleep_for_ever, 1, timeout_s=3)
        assert ranks.run(cases.sum_of_ranks) == [1.0, 1.0]  # the next case gets new ranks
    finally:
        ranks.close()
