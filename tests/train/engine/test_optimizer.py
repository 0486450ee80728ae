"""Parameter groups and learning rates: the schedule is that of transformers, and the table that of the optimizer."""

from typing import Any

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from llava_next.config import PARTS
from llava_next.model.build import build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import part_of, set_trained_parts
from tests.train.cases import RATES, with_stage
from train.config.schema import RunConfig, StageConfig
from train.engine.optimizer import adamw, format_part_table, parameter_groups, part_table, schedule_factor, set_rates


def stage(**changes: Any) -> StageConfig:
    """A stage with arbitrary values and these changes."""
    values: dict[str, Any] = {"name": "s", "learning_rates": RATES, "batch_size": 1, "max_length": 8, **changes}
    return StageConfig(**values)


@pytest.fixture(scope="module")
def model(tiny_parts: RunConfig) -> LlavaNext:
    """A tiny model with random weights."""
    return build_model(read_backbone(tiny_parts.model), dtype=torch.float32, seed=0)


@pytest.mark.parametrize(("num_steps", "ratio"), [(1, 0.0), (7, 0.0), (10, 0.03), (101, 0.1), (40, 0.5)])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule_is_transformers_own(schedule: Any, num_steps: int, ratio: float) -> None:
    """At every step the rate is that of transformers' scheduler of the same name."""
    warmup = -int(-num_steps * ratio // 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if schedule == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    for step in range(num_steps):
        ours = schedule_factor(step, num_steps, stage(schedule=schedule, warmup_ratio=ratio))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_groups_are_by_part_and_decay(model: LlavaNext, tiny_parts: RunConfig) -> None:
    """Every trained parameter is in one group of its part; matrices decay, biases and vectors do not."""
    chosen = with_stage(tiny_parts, learning_rates={**RATES, "image_newline": 2.0e-3}, weight_decay=0.1).stage
    set_trained_parts(model, chosen.rates)
    groups = parameter_groups(model, chosen)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_groups: list[str] = []
    for group in groups:
        for parameter in group["params"]:
            assert part_of(names[id(parameter)]) == group["part"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
            assert group["peak_lr"] == chosen.rates[group["part"]]
            in_groups.append(names[id(parameter)])
    assert sorted(in_groups) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert [group["name"] for group in groups] == [
        "vision_tower.decay",
        "vision_tower.no_decay",
        "projector.decay",
        "projector.no_decay",
        "image_newline.no_decay",
        "language_model.decay",
        "language_model.no_decay",
    ]
    assert {name for name in in_groups if name.endswith("bias") or "norm" in name} <= {
        names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]
    }


def test_newline_follows_the_projector_unless_named() -> None:
    """image_newline has the projector's rate by default, its own rate if it is named, and none without a projector."""
    assert stage().rates["image_newline"] == RATES["projector"]
    assert stage(learning_rates={**RATES, "image_newline": 1.0e-5}).rates["image_newline"] == 1.0e-5
    assert stage(learning_rates={"language_model": 1.0e-5}).rates == {"language_model": 1.0e-5}


def test_set_rates_writes_the_live_groups(model: LlavaNext, tiny_parts: RunConfig) -> None:
    """The factor scales each part's peak rate in all its groups, and the rates are returned by part."""
    set_trained_parts(model, tiny_parts.stage.rates)
    optimizer = torch.optim.AdamW(parameter_groups(model, tiny_parts.stage))
    rates = set_rates(optimizer.param_groups, 0.25)
    assert rates == {part: pytest.approx(rate / 4) for part, rate in tiny_parts.stage.rates.items()}
    for group in optimizer.param_groups:
        assert group["lr"] == rates[group["part"]]


@pytest.mark.parametrize("trained", [("projector",), ("projector", "language_model"), PARTS])
def test_part_table_shows_the_live_optimizer(model: LlavaNext, trained: tuple[str, ...]) -> None:
    """Every part has its parameters and its rate in the optimizer; a part without a group is frozen."""
    chosen = stage(learning_rates=dict.fromkeys(trained, 0.0001))
    set_trained_parts(model, chosen.rates)
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen))
    rows = part_table(model, optimizer)
    assert [row.part for row in rows] == list(PARTS)
    assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.num_trained for row in rows) == sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    for row, line in zip(rows, format_part_table(rows).splitlines()[1:], strict=True):
        assert (row.peak_rate is None) == ("frozen" in line) == (row.part not in chosen.rates)
        assert (row.num_trained == 0) == (row.part not in chosen.rates)
    for group in optimizer.param_groups:
        group["peak_lr"] = 7.0
    assert {row.peak_rate for row in part_table(model, optimizer)} <= {7.0, None}


def test_betas_and_eps_are_the_stages(model: LlavaNext, tiny_parts: RunConfig) -> None:
    """AdamW gets the configuration's values, and torch's defaults without them."""
    set_trained_parts(model, tiny_parts.stage.rates)
    optimizer = adamw(model, with_stage(tiny_parts, betas=(0.8, 0.95), eps=1e-6).stage)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.95), 1e-6)}
    optimizer = adamw(model, tiny_parts.stage)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
