"""Samples run alone: the weights that a run had at a step, one sample at a time on one process, without packing.

Owns which weights are taken, and saying so; what a step's loss is made of. Nothing here trains or writes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llava_next.config import ModelError
from llava_next.formats.load import load_weights
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import SampleRejected
from llava_next.model.build import build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_trained_parts
from train.distributed.world import Launch, choose_device, choose_dtype
from train.inspect.sample_set import RunStep, Subject, encoded


@dataclass(frozen=True)
class Weights:
    """Weights that a run has left: those after `step` steps, in `place` (None: those that it started with)."""

    step: int
    place: Path | None = None


@dataclass(frozen=True)
class SampleLoss:
    """What one sample costs: the loss of each supervised token, float64 [L], and whether it was the likeliest."""

    number: int
    id: str
    source: str
    losses: np.ndarray
    hits: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True)
class Replay:
    """The losses of samples, highest first, and the sentences on how they came about.

    `step_loss` is the loss that the trainer makes of them, where they are a whole step; `logged` is what it logged.
    """

    weights: str
    losses: list[SampleLoss]
    weighting: str
    step_loss: float | None = None
    logged: float | None = None

    @property
    def total(self) -> float:
        """What the shares of the samples add up to: the step's loss before it is divided."""
        return sum(self.part(loss) for loss in self.losses)

    def part(self, loss: SampleLoss) -> float:
        """A sample's part of the sum: its tokens' losses, or their mean where samples weigh alike."""
        return loss.mean if self.weighting == "sample" else float(loss.losses.sum())


def replay(subject: Subject, run_dir: Path | None) -> Replay:
    """Runs the chosen samples, each alone.

    Args:
        subject: what is looked at; samples that have no place in the stage are left out.
        run_dir: the run whose weights are taken; None takes those that the configuration starts with.

    Raises:
        ModelError, DataError: weights that cannot be loaded, or a picture that cannot be read.
    """
    run, geometry = subject.run, subject.processor.config
    model, said = _load(subject, run_dir)
    device = model.hf.model.image_newline.device
    losses = []
    for number, choice in enumerate(
        tqdm(subject.choices, desc="replay", unit="sample", file=sys.stderr, disable=not sys.stderr.isatty())
    ):
        sample = choice.read()
        example = encoded(subject.processor, sample)
        if isinstance(example, SampleRejected):
            continue
        batch = collate([example], tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)
        scores = model.score(batch.to(device))
        values = scores.losses.double().cpu().numpy()
        losses.append(SampleLoss(number, sample.id, sample.source, values, scores.hits.cpu().numpy()))
    losses.sort(key=lambda loss: (-loss.mean, loss.number))
    weighting = subject.config.stage.loss_weighting
    found = Replay(said, losses, weighting)
    if run is None or not subject.is_whole_step:
        return found
    return Replay(said, losses, weighting, found.total / run.plan.divisor, run.logged.get("train/loss"))


def weights_of_run(run_dir: Path, num_steps: int, result: str) -> list[Weights]:
    """All weights that a run has left, by step: what it started with, its checkpoints, its result.

    Args:
        num_steps: of the whole stage.
        result: connector or export, as the stage says.
    """
    from train.checkpoint import saver as checkpoint

    found = [Weights(0)]
    found += [
        Weights(checkpoint.read_state(place).step, place) for place in checkpoint.complete(run_dir / "checkpoints")
    ]
    if (run_dir / result).is_dir():
        found.append(Weights(num_steps, run_dir / result))
    return found


def choose_weights(found: Sequence[Weights], step: int) -> Weights:
    """The newest checkpoint at or before the step; else what is nearest of the first weights and the later ones."""
    before = [weights for weights in found if weights.place is not None and weights.step <= step]
    if before:
        return max(before, key=lambda weights: weights.step)
    return min(found, key=lambda weights: (abs(weights.step - step), weights.step))


def _load(subject: Subject, run_dir: Path | None) -> tuple[LlavaNext, str]:
    """The model on the device that there is, and a sentence on its weights."""
    config, backbone = subject.config, subject.backbone
    if config.device != "cpu" and not torch.cuda.is_available():  # a run of GPUs is looked at where there is none
        config = replace(config, device="cpu", precision="fp32")
    device = choose_device(config, Launch(0, 0, 1))
    dtype = choose_dtype(config, device)
    attention = config.attention if device.type == "cuda" else "auto"
    weights = _chosen(subject, run_dir)
    model = build_model(backbone, dtype=dtype, seed=config.seed, attention=attention)
    is_checkpoint = weights.place is not None and weights.place.parent.name == "checkpoints"
    origin = "fresh parts, as seed and configuration make them"
    for start in (config.stage.init_from, None if is_checkpoint else weights.place):
        if start is not None:
            origin = load_weights(model, backbone, Path(start))
    if is_checkpoint and weights.place is not None:  # it holds the trained parts alone
        add_adapters(model, config.lora, seed=config.seed)
        set_trained_parts(model, config.stage.rates)
        origin = _load_checkpoint(model, weights.place)
    name = str(dtype).removeprefix("torch.")
    said = f"weights {_age(weights, subject.run)}: {origin}; {name} on {device.type}"
    return model.to(device).eval(), said


def _chosen(subject: Subject, run_dir: Path | None) -> Weights:
    if run_dir is None:
        return Weights(0)
    run = subject.run
    num_steps = run.num_steps if run is not None else sys.maxsize  # of a store: the newest there are
    found = weights_of_run(run_dir, num_steps, subject.config.stage.result)
    return choose_weights(found, run.step if run is not None else sys.maxsize)


def _age(weights: Weights, run: RunStep | None) -> str:
    if run is None:
        return "that the stage starts with" if weights.place is None else f"of {weights.place}"
    if weights.step == run.step:
        return f"exactly as before step {run.step}"
    distance = weights.step - run.step
    return f"NOT of step {run.step} but {abs(distance)} step(s) {'later' if distance > 0 else 'earlier'}"


def _load_checkpoint(model: LlavaNext, place: Path) -> str:
    from train.checkpoint.trained_weights import trained_weights

    try:
        state = {name: tensor.value() for name, tensor in trained_weights(model, place).items()}
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ModelError(f"the weights in {place} cannot be read by one process: {error}") from error
    model.load_state_dict(state, strict=False)
    return f"checkpoint {place}"


def table(found: Replay) -> str:
    """The losses as text, highest first, and how they compare with what was logged."""
    lines = [f"{'loss':>9}{'tokens':>8}{'hits':>7}{'share':>7}  sample"]
    for loss in found.losses:
        share = found.part(loss) / found.total if found.total else 0.0
        lines.append(
            f"{loss.mean:>9.4f}{len(loss.losses):>8}{loss.hits.mean():>7.0%}{share:>7.1%}  {loss.source}:{loss.id}"
        )
    return "\n".join([*lines, found.weights, *([compared(found)] if found.step_loss is not None else [])])


def compared(found: Replay) -> str:
    """The step's loss, replayed and logged, in a sentence."""
    if found.logged is None:
        return f"the step's loss: {found.step_loss:.6f} replayed, none logged"
    difference = (found.step_loss or 0.0) - found.logged
    return f"the step's loss: {found.step_loss:.6f} replayed, {found.logged:.6f} logged, difference {difference:+.1e}"
