"""AdamW groups by part and by decay, and the learning rate as a function of the step.

The rate of each part stands in `stage.learning_rates`; one schedule scales all of them. The trainer writes the rates
into the live groups before each step, so DeepSpeed gets no scheduler and a resumed run needs no state for it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from llava_next.config import PARTS
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import num_parameters, part_of
from train.config.schema import StageConfig


@dataclass(frozen=True)
class PartRow:
    """One line of the start-up table, read from the live optimizer."""

    part: str
    num_parameters: int
    num_trained: int
    peak_rate: float | None
    weight_decay: float | None


def parameter_groups(model: LlavaNext, stage: StageConfig) -> list[dict[str, Any]]:
    """One group per trained part and decay; biases and vectors (norms, newline) never decay.

    Each group carries `part` and `peak_lr` next to torch's own keys.
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


def schedule_factor(step: int, num_steps: int, stage: StageConfig) -> float:
    """What multiplies every peak rate at this step (from 0): linear warm-up from 0, then cosine to 0 (or constant).

    The form of transformers' `get_cosine_schedule_with_warmup`, which the authors' trainer uses; warm-up steps are
    the rounded-up share of all steps.
    """
    warmup = math.ceil(num_steps * stage.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_rates(groups: Iterable[dict[str, Any]], factor: float) -> dict[str, float]:
    """Writes the step's rates into the live groups; returns the rate of each part."""
    rates = {}
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates


def part_table(model: LlavaNext, optimizer: torch.optim.Optimizer) -> list[PartRow]:
    """What is trained and how fast, as the live optimizer has it."""
    live = {group["part"]: group for group in reversed(optimizer.param_groups)}
    rows = []
    for part in PARTS:
        group = live.get(part)
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
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}{'peak rate':>12}{'decay':>8}"]
    for row in rows:
        rate = "frozen" if row.peak_rate is None else f"{row.peak_rate:.1e}"
        decay = "" if row.weight_decay is None else f"{row.weight_decay:g}"
        lines.append(f"{row.part:<16}{row.num_parameters:>16,}{row.num_trained:>16,}{rate:>12}{decay:>8}")
    return "\n".join(lines)
