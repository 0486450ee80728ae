"""Loads the sample lengths of a run: from its length table if there is one, else from the published mixture.

Samples are not counted here. Without a length table, the plan assumes the lengths of the published mixture and says so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_recipes.mixture.mixture import Mixture
from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.published_mixture import CAPTIONS, SOURCES, draw_shapes
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_yaml
from llava_next.inputs.anyres import image_layout
from llava_next.model.architecture import Architecture
from llava_next.model.build import Backbone
from train.config.schema import ConfigError, RunConfig
from train.data.length_table import LengthTable, find_table, open_table, table_folders

NUM_DRAWN = 24_000
"""Number of samples that are drawn from the published mixture."""
Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """The lengths of samples.

    Attributes:
        tokens, supervised, tiles: of each sample, int64 [n]. The n samples may be drawn from an epoch.
        num_samples: number of samples in an epoch.
        origin: description of where the lengths come from.
    """

    tokens: Array
    supervised: Array
    tiles: Array
    num_samples: int
    origin: str

    @classmethod
    def from_table(cls, table: LengthTable, origin: str) -> "Population":
        """Returns all samples of a length table."""
        tokens, supervised, tiles = (table.rows[name].astype(np.int64) for name in ("tokens", "supervised", "tiles"))
        return cls(tokens, supervised, tiles, len(table), origin)


def load_population(
    config: RunConfig, architecture: Architecture, *, num_samples: int | None = None, config_dir: str | None = None
) -> Population:
    """Returns the sample lengths of a stage.

    Args:
        num_samples: number of samples in an epoch; None uses that of the prepared mixture, else the counts of the
            mixture and its sources.
        config_dir: a folder with further YAML files of sources, which take precedence.

    Raises:
        ConfigError: the number of samples of a source is unknown.
    """
    if num_samples is None:
        mixture = _open_prepared(config)
        if mixture is None:
            folders = [*([Path(config_dir)] if config_dir else []), CONFIG_DIR]
            num_samples = count_samples(config, folders)
        else:
            population = _load_length_table(config, architecture, mixture)
            if population is not None:
                return population
            num_samples = mixture.num_samples
    return draw_published(config, architecture, num_samples)


def draw_published(config: RunConfig, architecture: Architecture, num_samples: int) -> Population:
    """Draws lengths from the published 779K mixture (captions for a caption template), with the model's grids."""
    stage = config.stage
    captions = (stage.template or config.model.language_model.template) == "plain"
    shapes = draw_shapes(NUM_DRAWN, sources=CAPTIONS if captions else SOURCES)
    sizes, which = np.unique(shapes.sizes_hw, axis=0, return_inverse=True)
    counts = np.zeros((len(sizes), 2), dtype=np.int64)
    patches, rule = architecture.patches_per_side, stage.views.rules[0]
    for number, (height, width) in enumerate(sizes.tolist()):
        if height:
            layout = image_layout(
                (height, width), mode=rule.mode, grids=config.model.grids, tile=architecture.tile,
                patches_per_side=patches, max_views=rule.max_views, closing_newline=rule.closing_newline,
            )  # fmt: skip
            counts[number] = layout.num_tokens, layout.num_tiles
    image_counts = counts[which.ravel()]
    text = shapes.supervised + 1 if captions else shapes.text_tokens  # a caption has no system prompt
    tokens = np.minimum(text + image_counts[:, 0], stage.max_length)
    supervised = np.maximum(1, np.minimum(shapes.supervised, tokens - image_counts[:, 0]))
    source = "captions of LCS-558K" if captions else "the published 779K mixture"
    return Population(tokens, supervised, image_counts[:, 1], num_samples, f"lengths estimated for {source}")


def count_samples(config: RunConfig, folders: list[Path]) -> int:
    """Returns the number of samples in an epoch, from the mixture's counts and the sources' published numbers.

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
            counts = (_read_expected_count(folder, name) for folder in folders)
            count = next((count for count in counts if count is not None), None)
        if count is None:
            raise ConfigError(
                f"mixture.sources.{name}: its number of samples is unknown; prepare the source, or give the number of "
                "samples of the mixture as --samples N"
            )
        total += count
    if not total:
        raise ConfigError(f"mixture {config.mixture.name} has shares only; give its number of samples as --samples N")
    return round(total / (1 - shared))


def _read_expected_count(folder: Path, name: str) -> int | None:
    if not (folder / "source" / f"{name}.yaml").is_file():
        return None
    count = read_yaml(folder, "source", name).get("expected_count")
    return int(count) if count else None


def _open_prepared(config: RunConfig) -> Mixture | None:
    """Returns the mixture of a run; None if a source is not prepared."""
    store_root = Path(config.data.store_root)
    if not all((store_root / source / "manifest.json").is_file() for source in config.mixture.sources):
        return None
    try:
        return Mixture.open(config.mixture, store_root)
    except DataError as error:
        raise ConfigError(str(error)) from error


def _load_length_table(config: RunConfig, architecture: Architecture, mixture: Mixture) -> Population | None:
    """Returns the lengths of the run's length table; None if there is no table."""
    if not isinstance(architecture, Backbone):
        return None
    stage = config.stage
    processor = architecture.processor(
        template=stage.template,
        views=stage.views,
        max_length=stage.max_length,
        unmask_special_tokens=stage.unmask_special_tokens,
    )
    folder = find_table(mixture, processor, table_folders(config))
    if folder is None:
        return None
    table = open_table(mixture, processor, folder, is_writer=False, num_workers=1, show_progress=False)
    return Population.from_table(table, f"lengths counted in the prepared mixture {config.mixture.name}")
