"""Decides whether the raw files of a source are complete, by the published number of its samples.

A part of a download, such as one shard of 250, reads without an error. Trained on by mistake, it is another dataset.
"""

import math
from collections.abc import Mapping, Sequence

from data_recipes.schema.mixture_config import SourceShare
from data_recipes.schema.source import SourceInfo
from data_recipes.writing.store_tables import IncompleteError
from data_recipes.writing.writer import describe_incomplete

MIN_SHARE = 0.9
"""Smallest fraction of the published number of samples that is taken for a complete source. Releases differ by less."""


def count_required(source: SourceInfo, share: SourceShare | None, is_partial: bool) -> int:
    """Return how many records, rejected ones included, the raw files of a source must have.

    They are compared with the published number of samples. If a mixture takes a fixed count of the source, that many
    are enough.

    Args:
        source: the source.
        share: what the mixture takes from it; None for a source that is not part of a mixture's samples.
        is_partial: whether a part of the source is accepted (`--partial`).

    Returns:
        The number, at least 1.
    """
    if is_partial or source.expected_count is None:
        return 1
    required = math.ceil(MIN_SHARE * source.expected_count)
    if share is not None and share.count is not None:
        required = min(required, share.count + share.holdout)
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
