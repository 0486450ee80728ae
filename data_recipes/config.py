"""What a user writes about a mixture, as frozen values; standard library only, since a run reads it first.

Owns: `MixtureConfig`, `SourceShare` and the rules on their values.
Leaves: YAML without Hydra and the choosing of samples to `mixture.py`, what a source is to `source.py`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from data_recipes.sample import DataError


@dataclass(frozen=True)
class SourceShare:
    """How much of a source is used.

    Attributes:
        count: samples to train on, after the held-out ones are taken away; None for all that are left.
        holdout: samples set aside for evaluation.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    count: int | None = None
    holdout: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise DataError(f"count: {self.count} is below 1; leave it out (or null) for all, or drop the source.")
        if self.holdout < 0:
            raise DataError(f"holdout: {self.holdout} is negative; 0 holds out nothing.")


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
        both = sorted(set(self.sources) & set(self.exclude))
        if both:
            raise DataError(
                f"mixture {self.name}: {both[0]} stands in `sources` and in `exclude`; nothing of it would be "
                "left. Remove it from one of them."
            )
