"""AdamW with a parameter group per part and weight decay, and the learning rate as a function of the step.

`stage.learning_rates` has the peak rate of each part; one schedule scales all of them. The trainer writes the rates
into the groups before each step, so DeepSpeed has no scheduler and a checkpoint no scheduler state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from llava_next.config import PARTS
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import num_parameters, part_of
from train.config.schema import StageConfig


@dataclass(frozen=True)
class PartRow:
    """One line of the start-up table. Rate and decay are None for a frozen part."""

    part: str
    num_parameters: int
    num_trained: int
    peak_rate: float | None
    weight_decay: float | None


def parameter_groups(model: LlavaNext, stage: StageConfig) -> list[dict[str, Any]]:
    """One group per trained part and weight decay; biases and vectors (norms, newline) have no weight decay.

    Each group has the keys `part` and `peak_lr` in addition to torch's.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        decays = getattr(parameter, "ds_shape", parameter.shape).numel() > 0 and (
            len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        )
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "part": part,
                "name": f"{part}.{'decay' if decays else 'no_decay'}",
                "lr": 0.0,
                "peak_lr": stage.rates[part],
                "weight_decay": stage.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (PARTS.index(key[0]), not key[1]))]


def adamw(model: LlavaNext, stage: StageConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over the trained parameters, with the stage's rates, weight decay, betas and eps."""
    beta_1, beta_2 = stage.betas
    return torch.optim.AdamW(parameter_groups(model, stage), betas=(beta_1, beta_2), eps=stage.eps, fused=True)


def schedule_factor(step: int, num_steps: int, stage: StageConfig) -> float:
    """The factor of every peak rate at this step (from 0): linear warm-up from 0, then cosine to 0 (or constant).

    As transformers' `get_cosine_schedule_with_warmup`, which the authors' trainer uses. The number of warm-up steps is
    `num_steps * stage.warmup_ratio`, rounded up.
    """
    warmup = math.ceil(num_steps * stage.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_rates(groups: Iterable[dict[str, Any]], factor: float) -> dict[str, float]:
    """Writes the step's rates into the groups; returns the rate of each part."""
    rates = {}
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates


def part_table(model: LlavaNext, optimizer: torch.optim.Optimizer) -> list[PartRow]:
    """Every part with its parameters, its peak rate and its weight decay, read from the optimizer's groups."""
    groups = {group["part"]: group for group in reversed(optimizer.param_groups)}
    rows = []
    for part in PARTS:
        group = groups.get(part)
        rows.append(
            PartRow(
                part=part,
                num_parameters=num_parameters(model, part),
                num_trained=num_parameters(model, part, trained=True),
                peak_rate=group["peak_lr"] if group else None,
                weight_decay=group["weight_decay"] if group else None,
            )
        )
    return rows


def format_part_table(rows: Iterable[PartRow]) -> str:
    """The start-up table as text."""
    head = ("part", "parameters", "trained", "peak rate", "decay")
    cells = []
    for row in rows:
        rate = "frozen" if row.peak_rate is None else f"{row.peak_rate:.1e}"
        decay = "" if row.weight_decay is None else f"{row.weight_decay:g}"
        cells.append((row.part, f"{row.num_parameters:,}", f"{row.num_trained:,}", rate, decay))
    return tabulate(cells, head, "plain", disable_numparse=True, colglobalalign="right", colalign=("left",))
