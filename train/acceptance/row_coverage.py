"""Computes the kinds of rows that the ranks have in each step, as the trainer does, and selects the seed of the order.

The equality checks only cover blank rows, text-only rows and rows with images if these occur in the same micro-steps.
The seed is selected so that they do, and the report has the counts.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from data_recipes.mixture.mixture import Mixture
from data_recipes.mixture.order import samples_of_step
from llava_next.model.build import read_backbone
from llava_next.model.flops import step_costs
from train.config.schema import RunConfig
from train.data.length_table import open_table
from train.data.loader import Planner, build_processor
from train.data.packing import assign_rows

RowKind = Literal["blank", "text", "image"]
Kinds = list[list[tuple[RowKind, ...]]]
"""Kind of each row, by step, micro-step and rank."""
_MAX_SEEDS = 200


def select_seed(config: RunConfig, num_ranks: int) -> tuple[int, Kinds]:
    """Returns the first seed that covers all kinds of rows, and the kinds.

    In some micro-step, one rank must have a text-only row and another a row with images; in the last step, some ranks
    must have a row and others a blank one. With one rank the seed is 0.

    Raises:
        RuntimeError: no seed meets these conditions.
    """
    planner = _build_planner(config, num_ranks)
    for seed in range(_MAX_SEEDS):
        kinds = compute_row_kinds(planner, seed)
        is_mixed = any({"text", "image"} <= set(row) for step in kinds for row in step)
        last = set(kinds[-1][-1])
        if num_ranks == 1 or (is_mixed and "blank" in last and len(last) > 1):
            return seed, kinds
    raise RuntimeError(f"none of {_MAX_SEEDS} seeds gives {num_ranks} ranks rows of different kinds")


def _build_planner(config: RunConfig, num_ranks: int) -> Planner:
    """Returns the planner of rank 0. The length table is built if there is none."""
    backbone = read_backbone(config.model)
    store_root = Path(config.data.store_root)
    mixture = Mixture.open(config.mixture, store_root)
    processor = build_processor(backbone, config.stage)
    folder = store_root / ".lengths"
    table = open_table(mixture, processor, folder, is_writer=True, num_workers=1, show_progress=False)
    vision = backbone.hf_config.vision_config
    layer = config.model.vision_tower.feature_layer
    costs = step_costs(
        vision,
        backbone.hf_config.text_config,
        projector=config.model.projector,
        num_vision_layers=vision.num_hidden_layers + 1 + layer if layer < 0 else layer,
        trains_tower="vision_tower" in config.stage.rates,
        trains_language_model="language_model" in config.stage.rates,
    )
    num_sources = len(mixture.source_names)
    return Planner(table, config.stage, config.packing, costs, config.seed, 0, num_ranks, num_sources=num_sources)


def compute_row_kinds(planner: Planner, seed: int) -> Kinds:
    """Returns the kinds of all rows in the order of a seed. A planner gives the rows of one rank only, so the samples
    of each step are assigned to rows here."""
    table, stage = planner.table, planner.stage

    def get_kind(row: np.ndarray) -> RowKind:
        if not len(row):
            return "blank"
        return "image" if row.any() else "text"

    steps = []
    for step in range(planner.num_steps):
        rows = table.rows[samples_of_step(step, len(table), stage.batch_size, seed, stage.epochs)]
        tokens, tiles = rows["tokens"].astype(np.int64), rows["tiles"].astype(np.int64)
        costs = planner.costs.flops(tokens, tiles, rows["supervised"])
        assignment = assign_rows(tokens, tiles, costs, num_ranks=planner.num_ranks, budgets=planner.packing)
        steps.append([tuple(get_kind(tiles[list(row)]) for row in micro_step) for micro_step in assignment.rows])
    return steps


def count_kinds(kinds: Kinds) -> dict[str, int]:
    """Returns the number of rows of each kind, in all steps."""
    return dict(Counter(kind for step in kinds for micro_step in step for kind in micro_step))
