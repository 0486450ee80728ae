"""Configuration of a mixture: its sources and how many samples each contributes.

The dataclasses are frozen and validate their values. Only the standard library is imported, because training validates
this configuration before it imports anything else.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from data_recipes.schema.sample import DataError


@dataclass(frozen=True)
class SourceShare:
    """Number of samples that a mixture takes from one source.

    Attributes:
        count: training samples, not counting held-out ones; None for all that remain.
        holdout: samples reserved for evaluation.
        share: fraction of the mixture's training samples, in (0, 1]; an alternative to `count`. If other sources have
            counts, the fraction is relative to the total that follows from them. If every source has a share, the
            shares must sum to 1 and the smallest source limits the size of the mixture.

    Raises:
        DataError: a value is out of range, or both `count` and `share` are given.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    count: int | None = None
    holdout: int = 0
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.count is not None:
            raise DataError(f"share: {self.share} and count: {self.count} are both given; set one of them.")
        if self.share is not None and not 0 < self.share <= 1:
            raise DataError(f"share: {self.share} must be above 0 and at most 1.")
        if self.count is not None and self.count < 1:
            raise DataError(f"count: {self.count} is below 1; use null for all samples, or remove the source.")
        if self.holdout < 0:
            raise DataError(f"holdout: {self.holdout} is negative; use 0 to hold out no samples.")

    @property
    def exact_share(self) -> Fraction | None:
        """`share` as an exact decimal fraction, so that ten shares of 0.1 sum to 1."""
        return None if self.share is None else Fraction(str(self.share))


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of sources.

    Attributes:
        name: name of the mixture.
        seed: selects which samples of a source are taken if it has a `count` or `share`.
        sources: {source name: number of samples}.
        exclude: prepared sources, such as benchmarks, whose images must not occur in the training samples. Their own
            samples are not trained on either.

    Raises:
        DataError: there are no sources, the shares do not add up, or a source is both used and excluded.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    seed: int
    sources: dict[str, SourceShare]
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError(f"mixture {self.name}: `sources` is empty; add at least one source.")
        self._check_shares()
        both = sorted(set(self.sources) & set(self.exclude))
        if both:
            raise DataError(
                f"mixture {self.name}: {both[0]} is in both `sources` and `exclude`; remove it from one of them."
            )

    def _check_shares(self) -> None:
        shares = {name: share.exact_share for name, share in self.sources.items() if share.exact_share is not None}
        total = sum(shares.values(), Fraction())
        message = f"mixture {self.name}: the shares of {', '.join(shares)} add up to {float(total):g}"
        if len(shares) < len(self.sources) and total >= 1:
            raise DataError(f"{message}, which leaves no samples for the other sources. Lower them, or use counts.")
        if shares and len(shares) == len(self.sources) and total != 1:
            raise DataError(f"{message}, but must add up to 1 if every source has a share. Change one, or use a count.")
