"""How long the samples are that a run will meet: its own length table where there is one, else the published mixture.

Owns `Population` and where it comes from. Nothing is counted here: a prepared mixture that no run has counted yet is
taken for the published one, and the plan says so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.published_mixture import CAPTIONS, SOURCES, draw_shapes
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_yaml
from llava_next.inputs.anyres import image_layout
from llava_next.model.architecture import Architecture
from llava_next.model.build import Backbone
from train.config.schema import CONFIG_DIR, ConfigError, RunConfig
from train.data.length_table import LengthTable, data_fingerprint, open_table

NUM_DRAWN = 24_000
Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """Samples by length, int64 [n] each. `num_samples` is the epoch's; these may be a draw of it, as `origin` says."""

    tokens: Array
    supervised: Array
    tiles: Array
    num_samples: int
    origin: str

    @classmethod
    def counted(cls, table: LengthTable, origin: str) -> "Population":
        """All samples of a length table."""
        tokens, supervised, tiles = (table.rows[name].astype(np.int64) for name in ("tokens", "supervised", "tiles"))
        return cls(tokens, supervised, tiles, len(table), origin)


def population_of(
    config: RunConfig, architecture: Architecture, *, num_samples: int | None = None, config_dir: str | None = None
) -> Population:
    """The samples of this stage.

    Args:
        num_samples: of an epoch, where the sources' own numbers are not known or not meant.
        config_dir: a further folder of YAML files, for sources that are not the checkout's.

    Raises:
        ConfigError: nobody knows how many samples a source has.
    """
    measured = _measured(config, architecture) if num_samples is None else None
    if measured is not None:
        return measured
    folders = [CONFIG_DIR, *([Path(config_dir)] if config_dir else [])]
    return published(config, architecture, num_samples or count_samples(config, folders))


def published(config: RunConfig, architecture: Architecture, num_samples: int) -> Population:
    """A draw of the published 779K mixture, or of captions for a stage of captions, with this model's geometry."""
    stage = config.stage
    captions = (stage.template or config.model.language_model.template) == "plain"
    shapes = draw_shapes(NUM_DRAWN, sources=CAPTIONS if captions else SOURCES)
    sizes, which = np.unique(shapes.sizes_hw, axis=0, return_inverse=True)
    counts = np.zeros((len(sizes), 2), dtype=np.int64)
    patches = architecture.patches_per_side
    for number, (height, width) in enumerate(sizes.tolist()):
        if height:
            layout = image_layout(
                (height, width), mode=stage.image_mode, grids=config.model.grids, tile=architecture.tile,
                patches_per_side=patches,
            )  # fmt: skip
            counts[number] = layout.num_tokens, layout.num_tiles
    pictures = counts[which.ravel()]
    text = shapes.supervised + 1 if captions else shapes.text_tokens  # a caption has no system text before it
    tokens = np.minimum(text + pictures[:, 0], stage.max_length)
    supervised = np.maximum(1, np.minimum(shapes.supervised, tokens - pictures[:, 0]))
    what = "captions of LCS-558K" if captions else "the published 779K mixture"
    return Population(tokens, supervised, pictures[:, 1], num_samples, f"lengths as {what} is thought to have them")


def count_samples(config: RunConfig, folders: list[Path]) -> int:
    """Samples of an epoch, from the mixture's counts and the sources' published numbers.

    Raises:
        ConfigError: a source has neither.
    """
    total, shared = 0, 0.0
    for name, share in config.mixture.sources.items():
        if share.share is not None:
            shared += share.share
            continue
        count = share.count
        if count is None:
            count = next((found for folder in folders if (found := _expected(folder, name)) is not None), None)
        if count is None:
            raise ConfigError(
                f"mixture.sources.{name}: nobody has counted it here, and no number of samples is published for it; "
                "prepare it, or give the mixture's number as --samples N"
            )
        total += count
    if not total:
        raise ConfigError(f"mixture {config.mixture.name} names shares alone; give its size as --samples N")
    return round(total / (1 - shared))


def _expected(folder: Path, name: str) -> int | None:
    if not (folder / "source" / f"{name}.yaml").is_file():
        return None
    found = read_yaml(folder, "source", name).get("expected_count")
    return int(found) if found else None


def _measured(config: RunConfig, architecture: Architecture) -> Population | None:
    """The run's own length table; None where there is none yet."""
    store_root = Path(config.data.store_root)
    prepared = all((store_root / source / "manifest.json").is_file() for source in config.mixture.sources)
    if not (isinstance(architecture, Backbone) and prepared):
        return None
    stage = config.stage
    processor = architecture.processor(
        template=stage.template,
        image_mode=stage.image_mode,
        max_length=stage.max_length,
        unmask_special_tokens=stage.unmask_special_tokens,
    )
    try:
        mixture = Mixture.open(config.mixture, store_root)
    except DataError as error:
        raise ConfigError(str(error)) from error
    folder = store_root / ".lengths"
    fingerprint = data_fingerprint(mixture, processor)
    if not (folder / fingerprint[:16] / "table.json").is_file():
        return None
    table = open_table(mixture, processor, folder, is_writer=False, num_workers=1, show_progress=False)
    return Population.counted(table, f"lengths of the prepared mixture {config.mixture.name}, counted")
