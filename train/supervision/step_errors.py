"""What can be wrong with a step, and how it is told: the step, its samples, the way out."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.store.reader import StoredText
from train.config.schema import RunConfig
from train.data.loader import Planner, StepPlan
from train.distributed.world import World

_MOST_NAMED = 16


class StepError(RuntimeError):
    """A step whose numbers cannot be right; it was not applied."""


class OutOfMemory(RuntimeError):
    """A row did not fit into memory; the message says which, and what to change."""


class StepCheck:
    """Looks at the steps of a run.

    Args:
        config, world, planner: of the run.
        mixture: names sources and samples.
        say: tells the person in front of the terminal.
        num_left_out: steps that were left out before this start.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        planner: Planner,
        mixture: Mixture,
        say: Callable[[str], None],
        num_left_out: int = 0,
    ) -> None:
        self._config, self._world, self._planner, self._mixture = config, world, planner, mixture
        self._say, self._num_left_out = say, num_left_out

    def before(self, plan: StepPlan) -> None:
        """Raises StepError if nothing of the step is supervised."""
        if plan.num_supervised < 1:
            raise StepError(f"step {plan.step}: none of its tokens is supervised. {self._named(plan)}")

    def counts(self, plan: StepPlan, tokens: torch.Tensor) -> None:
        """Compares what was seen with what was planned.

        Args:
            plan: of the step.
            tokens: supervised tokens of each source, [sources].

        Raises:
            StepError: a source of the step had none, or the sum is another than the length table's.
        """
        for source in np.unique(self._planner.table.rows["source"][plan.samples]).tolist():
            if not tokens[source]:
                raise StepError(
                    f"step {plan.step}: no token of source {self._mixture.source_names[source]} was supervised; the "
                    f"step was not applied. {self._named(plan, [source])}"
                )
        if int(tokens.sum()) != plan.num_supervised:
            raise StepError(
                f"step {plan.step}: {int(tokens.sum())} supervised tokens were seen, the length table counts "
                f"{plan.num_supervised}; the table is not this data's"
            )

    def leave_out(self, plan: StepPlan, bad: Sequence[int]) -> None:
        """Writes down a step that was not applied.

        Args:
            plan: of the step.
            bad: sources whose loss is not finite; none where it is the gradient.

        Raises:
            StepError: it is one more than `skip_non_finite` allows.
        """
        names = ", ".join(self._mixture.source_names[source] for source in bad)
        what = f"the loss of {names}" if bad else "the gradient"
        self._num_left_out += 1
        if self._world.is_main:
            samples = [f"{text.source}:{text.id}" for text in self._texts(plan)]
            with (self._config.run_dir / "non_finite.jsonl").open("a") as file:
                file.write(json.dumps({"step": plan.step, "what": what, "samples": samples}) + "\n")
        allowed = self._config.skip_non_finite
        told = f"step {plan.step}: {what} is not finite; the step was not applied"
        if self._num_left_out > allowed:
            raise StepError(
                f"{told}, and {allowed} such steps may be left out (skip_non_finite); non_finite.jsonl has all of its "
                f"samples. {self._named(plan, bad or None)}"
            )
        self._say(f"{told} ({self._num_left_out} of at most {allowed}; its samples are in non_finite.jsonl)")

    def out_of_memory(self, plan: StepPlan, number: int, error: Exception) -> OutOfMemory:
        """Which row did not fit, and what to change; none of it changes what is learned."""
        rows = self._planner.table.rows[plan.rows[number]]
        tokens, tiles = rows["tokens"], rows["tiles"]
        packing = self._config.packing
        longest = f", the longest of {tokens.max():,} tokens" if len(rows) else ""
        return OutOfMemory(
            f"step {plan.step}, micro-step {number}: a row of {tokens.sum():,} tokens and {tiles.sum():,} tiles "
            f"({len(rows)} samples{longest}) did not fit into memory. Lower packing.max_tokens ({packing.max_tokens}; "
            f"at least stage.max_length, {self._config.stage.max_length}) or packing.max_tiles ({packing.max_tiles}), "
            "set recompute=[language_model], or shard more (engine=zero3, or offload in the engine's dictionary): "
            f"nothing that is learned depends on them. It said: {str(error).splitlines()[0]}"
        )

    def _named(self, plan: StepPlan, sources: Sequence[int] | None = None) -> str:
        """The step's samples, of all or some sources, by their ids."""
        texts = self._texts(plan, sources)
        more = f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
        return "Its samples: " + ", ".join(f"{text.source} {text.id!r}" for text in texts[:_MOST_NAMED]) + more

    def _texts(self, plan: StepPlan, sources: Sequence[int] | None = None) -> list[StoredText]:
        rows = self._planner.table.rows[plan.samples]
        numbers = rows["sample"] if sources is None else rows["sample"][np.isin(rows["source"], sources)]
        return [self._mixture.text(int(number)) for number in numbers]
