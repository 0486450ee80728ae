"""Which kinds of row the ranks get in each step, computed as the trainer computes it, before anything runs.

The equality checks prove something about blank rows, text-only rows and rows with images only if these occur side by
side, so the seed of the order is chosen for that, and the counts go into the report.
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
from train.data.loader import Planner, stage_processor
from train.data.packing import assign_rows

RowKind = Literal["blank", "text", "image"]
Kinds = list[list[tuple[RowKind, ...]]]
"""By step, micro-step and rank."""
_MOST_SEEDS = 200


def choose_seed(config: RunConfig, num_ranks: int) -> tuple[int, Kinds]:
    """The first seed with which unlike rows meet: in some micro-step a rank's row is text only and another's has
    images, and in the last step some ranks have a row and the others a blank one.

    With one rank nothing can meet: seed 0.

    Raises:
        RuntimeError: no seed has them. Other errors are those of reading the model and the stores.
    """
    planner = _planner(config, num_ranks)
    for seed in range(_MOST_SEEDS):
        kinds = row_kinds(planner, seed)
        meets = any({"text", "image"} <= set(row) for step in kinds for row in step)
        last = set(kinds[-1][-1])
        if num_ranks == 1 or (meets and "blank" in last and len(last) > 1):
            return seed, kinds
    raise RuntimeError(f"none of {_MOST_SEEDS} seeds deals unlike rows to {num_ranks} ranks")


def _planner(config: RunConfig, num_ranks: int) -> Planner:
    """The planner of a run's first rank. The length table is made if there is none."""
    backbone = read_backbone(config.model)
    store_root = Path(config.data.store_root)
    mixture = Mixture.open(config.mixture, store_root)
    processor = stage_processor(backbone, config.stage)
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


def row_kinds(planner: Planner, seed: int) -> Kinds:
    """By step and micro-step the kind of each rank's row, with the order of this seed.

    A planner gives one rank's rows; here the deal of a step is made once for all of them.
    """
    table, stage = planner.table, planner.stage

    def kind(row: np.ndarray) -> RowKind:
        if not len(row):
            return "blank"
        return "image" if row.any() else "text"

    steps = []
    for step in range(planner.num_steps):
        rows = table.rows[samples_of_step(step, len(table), stage.batch_size, seed, stage.epochs)]
        tokens, tiles = rows["tokens"].astype(np.int64), rows["tiles"].astype(np.int64)
        costs = planner.costs.of(tokens, tiles, rows["supervised"])
        dealt = assign_rows(tokens, tiles, costs, num_ranks=planner.num_ranks, budgets=planner.packing)
        steps.append([tuple(kind(tiles[list(row)]) for row in micro_step) for micro_step in dealt.rows])
    return steps


def count_kinds(kinds: Kinds) -> dict[str, int]:
    """Rows of each kind, of all steps."""
    return dict(Counter(kind for step in kinds for micro_step in step for kind in micro_step))
