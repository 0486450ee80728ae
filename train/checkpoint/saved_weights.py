"""The weights that a run has saved, by step: what it started with, its checkpoints, its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_next.config import ModelError
from llava_next.file_access import permission_problem
from llava_next.model.llava_next import LlavaNext
from train.checkpoint import saver as checkpoint
from train.checkpoint.trained_weights import trained_weights


@dataclass(frozen=True)
class Weights:
    """Weights that a run has saved after `step` steps, in `folder`; None: those that it started with."""

    step: int
    folder: Path | None = None


def saved_weights(run_dir: Path, num_steps: int, result: str) -> list[Weights]:
    """All weights of a run of `num_steps`: what it started with, its checkpoints, its `result` (connector, export)."""
    folders = checkpoint.list_complete(run_dir / "checkpoints")
    weights = [Weights(0), *(Weights(checkpoint.read_state(folder).step, folder) for folder in folders)]
    return [*weights, Weights(num_steps, run_dir / result)] if (run_dir / result).is_dir() else weights


def choose_weights(weights: Sequence[Weights], step: int) -> Weights:
    """The newest checkpoint at or before the step; else the nearest of the first weights and the later ones."""
    before = [each for each in weights if each.folder is not None and each.step <= step]
    if before:
        return max(before, key=lambda each: each.step)
    return min(weights, key=lambda each: (abs(each.step - step), each.step))


def load_checkpoint(model: LlavaNext, folder: Path) -> None:
    """Sets the trained parameters of a model, on one process, to those of a checkpoint.

    Raises:
        ModelError: the checkpoint is damaged, or of another model.
    """
    try:
        state = {name: tensor.value() for name, tensor in trained_weights(model, folder).items()}
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ModelError(
            permission_problem(folder, depth=2) or f"the weights in {folder} cannot be read by one process: {error}"
        ) from error
    model.load_state_dict(state, strict=False)
