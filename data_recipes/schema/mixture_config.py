"""What a user writes about a mixture, as frozen values; standard library only, since a run reads it first.

Owns: `MixtureConfig`, `SourceShare` and the rules on their values.
Leaves: YAML without Hydra and the choosing of samples to `mixture.py`, what a source is to `source.py`.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from data_recipes.schema.sample import DataError


@dataclass(frozen=True)
class SourceShare:
    """How much of a source is used.

    Attributes:
        count: samples to train on, after the held-out ones are taken away; None for all that are left.
        holdout: samples set aside for evaluation.
        share: instead of a count, the part of the mixture's training samples that are this source's, between 0
            and 1. Beside sources with counts it is measured by those; where every source has a share, the shares
            add up to 1 and the mixture is as large as its scarcest source allows.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    count: int | None = None
    holdout: int = 0
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.count is not None:
            raise DataError(f"share: {self.share} stands beside count: {self.count}; a source has one of them.")
        if self.share is not None and not 0 < self.share <= 1:
            raise DataError(f"share: {self.share} must be above 0 and at most 1; it is a part of the mixture.")
        if self.count is not None and self.count < 1:
            raise DataError(f"count: {self.count} is below 1; leave it out (or null) for all, or drop the source.")
        if self.holdout < 0:
            raise DataError(f"holdout: {self.holdout} is negative; 0 holds out nothing.")

    @property
    def exact_share(self) -> Fraction | None:
        """`share` as it is written: 0.1 is a tenth, and ten of them are 1."""
        return None if self.share is None else Fraction(str(self.share))


@dataclass(frozen=True)
class MixtureConfig:
    """Sources by name with their shares; the seed decides which samples a count takes.

    Attributes:
        exclude: prepared sources (benchmarks) none of whose pictures may be trained on; they are not trained
            on themselves.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    seed: int
    sources: dict[str, SourceShare]
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError(f"mixture {self.name}: `sources` is empty; name at least one.")
        self._check_shares()
        both = sorted(set(self.sources) & set(self.exclude))
        if both:
            raise DataError(
                f"mixture {self.name}: {both[0]} stands in `sources` and in `exclude`; nothing of it would be "
                "left. Remove it from one of them."
            )

    def _check_shares(self) -> None:
        shares = {name: share.exact_share for name, share in self.sources.items() if share.exact_share is not None}
        total = sum(shares.values(), Fraction())
        what = f"mixture {self.name}: the shares of {', '.join(shares)} add up to {float(total):g}"
        if len(shares) < len(self.sources) and total >= 1:
            raise DataError(f"{what}, which leaves nothing for the other sources. Lower them, or give counts.")
        if shares and len(shares) == len(self.sources) and total != 1:
            raise DataError(f"{what}, and must add up to 1, since every source has one. Change one, or give a count.")
