"""Checks the numbers of a step, and builds errors that name the step, its samples and the fix."""

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.store.reader import StoredText
from train.config.schema import RunConfig
from train.data.loader import Planner, StepPlan
from train.distributed.world import World

_MAX_NAMED_SAMPLES = 16


class StepError(RuntimeError):
    """The numbers of a step are wrong; nothing is saved after it."""


class CorruptionError(StepError):
    """Ranks, or two computations of a step, differ where they must agree (`verify.every`); every rank raises it.

    Attributes:
        rank, host: of the first rank whose values are wrong.
    """

    def __init__(self, message: str, *, rank: int, host: str) -> None:
        super().__init__(message)
        self.rank, self.host = rank, host


class LossSpike(StepError):
    """A step's loss is a spike and `on_spike` is stop; the step was applied, and nothing was saved after it."""


class OutOfMemory(RuntimeError):
    """A row did not fit into memory; the message names the row and the settings to change."""


class StepCheck:
    """Checks the steps of a run.

    Args:
        config, world, planner: of the run.
        mixture: gives the names of sources and samples.
        info: logs a message to the terminal.
        num_skipped: earlier steps whose update was skipped.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        planner: Planner,
        mixture: Mixture,
        info: Callable[[str], None],
        num_skipped: int = 0,
    ) -> None:
        self._config, self._world, self._planner, self._mixture = config, world, planner, mixture
        self._info, self._num_skipped = info, num_skipped

    def check_supervised(self, plan: StepPlan) -> None:
        """Raises StepError if the step has no supervised token."""
        if plan.num_supervised < 1:
            raise StepError(f"step {plan.step} has no supervised token. {self._describe_samples(plan)}")

    def check_counts(self, plan: StepPlan, tokens: torch.Tensor) -> None:
        """Compares the supervised tokens that were computed with the length table.

        Args:
            plan: of the step.
            tokens: supervised tokens of each source, [num_sources].

        Raises:
            StepError: a source of the step had none, or their sum differs from the table's.
        """
        for source in np.unique(self._planner.table.rows["source"][plan.samples]).tolist():
            if not tokens[source]:
                raise StepError(
                    f"step {plan.step}: source {self._mixture.source_names[source]} had no supervised token; the step "
                    f"was not applied. {self._describe_samples(plan, [source])}"
                )
        if int(tokens.sum()) != plan.num_supervised:
            raise StepError(
                f"step {plan.step} had {int(tokens.sum())} supervised tokens, but the length table counts "
                f"{plan.num_supervised}: the table does not belong to this data; remove {self._planner.table.folder}"
            )

    def record_skipped(self, plan: StepPlan, non_finite: Sequence[int]) -> None:
        """Appends a step that was not applied to non_finite.jsonl.

        Args:
            plan: of the step.
            non_finite: sources with a non-finite loss; empty if only the gradient is non-finite.

        Raises:
            StepError: more steps were skipped than `skip_non_finite` allows.
        """
        names = ", ".join(self._mixture.source_names[source] for source in non_finite)
        what = f"the loss of {names}" if non_finite else "the gradient"
        self._num_skipped += 1
        if self._world.is_main:
            samples = [f"{text.source}:{text.id}" for text in self._read_texts(plan)]
            with (self._config.run_dir / "non_finite.jsonl").open("a") as file:
                file.write(json.dumps({"step": plan.step, "what": what, "samples": samples}) + "\n")
        allowed = self._config.skip_non_finite
        message = f"step {plan.step}: {what} is not finite; the step was not applied"
        if self._num_skipped > allowed:
            raise StepError(
                f"{message}, and skip_non_finite={allowed} allows no more skipped steps; non_finite.jsonl lists all of "
                f"its samples. {self._describe_samples(plan, non_finite or None)}"
            )
        self._info(f"{message} ({self._num_skipped} of at most {allowed}; its samples are in non_finite.jsonl)")

    def check_spike(self, plan: StepPlan, metrics: Mapping[str, float]) -> None:
        """Logs a step whose loss is a spike.

        Args:
            plan: of the step.
            metrics: of the step; its loss and the score of it (`loss_spikes.py`) are read.

        Raises:
            LossSpike: `on_spike` is stop.
        """
        score, threshold = metrics.get("train/loss_spike_score"), self._config.spike_threshold
        if score is None or score < threshold:
            return
        message = (
            f"step {plan.step}: the loss {metrics['train/loss']:.4f} is a spike, its score {score:.1f} is at least "
            f"spike_threshold={threshold:g}; `python -m train.inspect {self._config.run_dir} --step {plan.step} "
            "--loss` shows the loss of each of its samples"
        )
        if self._config.on_spike == "stop":
            raise LossSpike(
                f"{message}. on_spike=stop ends the run and saves nothing after the spike; the same command repeats "
                "the steps since the newest checkpoint with the same samples, so set on_spike=none to go past it, or "
                f"lower the rates (resume_allow=[stage.learning_rates]). {self._describe_samples(plan)}"
            )
        self._info(message)

    def make_out_of_memory_error(self, plan: StepPlan, micro_step: int, error: Exception) -> OutOfMemory:
        """Returns an error that names the row and the settings to change; none of them changes what is learned."""
        rows = self._planner.table.rows[plan.rows[micro_step]]
        tokens, tiles = rows["tokens"], rows["tiles"]
        packing = self._config.packing
        longest = f", the longest of {tokens.max():,} tokens" if len(rows) else ""
        return OutOfMemory(
            f"step {plan.step}, micro-step {micro_step}: a row of {tokens.sum():,} tokens and {tiles.sum():,} tiles "
            f"({len(rows)} samples{longest}) did not fit into memory. Lower packing.max_tokens ({packing.max_tokens}; "
            f"at least stage.max_length, {self._config.stage.max_length}) or packing.max_tiles ({packing.max_tiles}), "
            "set recompute=[language_model], or use engine=zero3 or offloading; none of these changes what is learned. "
            f"Original error: {str(error).splitlines()[0]}"
        )

    def _describe_samples(self, plan: StepPlan, sources: Sequence[int] | None = None) -> str:
        """Returns a sentence with the ids of the step's samples, of all sources or of some."""
        texts = self._read_texts(plan, sources)
        more = f" and {len(texts) - _MAX_NAMED_SAMPLES} more" if len(texts) > _MAX_NAMED_SAMPLES else ""
        return "Its samples: " + ", ".join(f"{text.source} {text.id!r}" for text in texts[:_MAX_NAMED_SAMPLES]) + more

    def _read_texts(self, plan: StepPlan, sources: Sequence[int] | None = None) -> list[StoredText]:
        rows = self._planner.table.rows[plan.samples]
        numbers = rows["sample"] if sources is None else rows["sample"][np.isin(rows["source"], sources)]
        return [self._mixture.text(int(number)) for number in numbers]
