"""Decides whether the raw files of a source are complete, by the published number of its samples.

A part of a download, such as one shard of 250, reads without an error. Trained on by mistake, it is another dataset.
"""

import math
from collections.abc import Mapping, Sequence

from data_recipes.schema.mixture_config import MixtureConfig
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.store_tables import IncompleteError
from data_recipes.writing.writer import describe_incomplete

MIN_SHARE = 0.9
"""Smallest fraction of the published number of samples that is taken for a complete source. Releases differ by less."""


def count_required(source: SourceInfo, mixtures: Sequence[MixtureConfig], is_partial: bool) -> int:
    """Return how many records, rejected ones included, the raw files of a source must have.

    They are compared with the published number of samples. If every mixture takes a fixed count of the source, the
    largest is enough.

    Args:
        source: the source.
        mixtures: those for which it is prepared, if any.
        is_partial: whether a part of the source is accepted (`--partial`).

    Returns:
        The number, at least 1.
    """
    if is_partial or source.expected_count is None:
        return 1
    required = math.ceil(MIN_SHARE * source.expected_count)
    uses = [each for each in mixtures if source.name in (*each.sources, *each.exclude)]
    shares = [each.sources.get(source.name) for each in uses]
    fixed = [share.count + share.holdout for share in shares if share is not None and share.count is not None]
    if fixed and len(fixed) == len(uses):
        required = min(required, max(fixed))
    return max(1, required)


def check_complete(sources: Sequence[SourceInfo], num_records: Mapping[str, int], required: Mapping[str, int]) -> None:
    """Check the number of records of each source, as far as it is known.

    Args:
        sources: the sources.
        num_records: {source: number of its records}.
        required: {source: fewest records of a complete one}.

    Raises:
        IncompleteError: sources have too few records. All of them are reported together.
    """
    problems = [
        describe_incomplete(source, num_records[source.name], required[source.name])
        for source in sources
        if num_records.get(source.name, required[source.name]) < required[source.name]
    ]
    if problems:
        raise IncompleteError("\n".join(problems))
