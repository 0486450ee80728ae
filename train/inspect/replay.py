"""Runs samples alone, one at a time on one process, with the weights that a run had at a step. Nothing is trained."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from llava_next.formats.load_weights import load_weights
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import SampleRejected
from llava_next.model.build import build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.lora import add_adapters
from llava_next.model.parts import set_trained_parts
from train.distributed.launch import Launch
from train.distributed.world import choose_device, choose_dtype
from train.inspect.sample_set import Subject, encode


@dataclass(frozen=True)
class SampleLoss:
    """The loss of each supervised token of a sample, float64 [L], and whether it was the likeliest token, bool [L]."""

    number: int
    id: str
    source: str
    losses: np.ndarray
    hits: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.losses.mean())

    @property
    def hit_rate(self) -> float:
        return float(self.hits.mean())


@dataclass(frozen=True)
class Replay:
    """The losses of samples, highest first, and a sentence on the weights.

    `step_loss` is the loss that the trainer computes from them where they are a whole step, `logged` the logged one.
    """

    weights: str
    losses: list[SampleLoss]
    weighting: str
    step_loss: float | None = None
    logged: float | None = None

    @cached_property
    def total(self) -> float:
        """The step's loss before it is divided: the sum over all tokens, or over samples if they have equal weight."""
        return sum(self._part(loss) for loss in self.losses)

    def share(self, loss: SampleLoss) -> float:
        """A sample's share of the total."""
        return self._part(loss) / self.total if self.total else 0.0

    def _part(self, loss: SampleLoss) -> float:
        return loss.mean if self.weighting == "sample" else float(loss.losses.sum())

    @property
    def sentences(self) -> list[str]:
        """Which weights were used, and how the step's loss compares with the logged one."""
        if self.step_loss is None:
            return [self.weights]
        logged = "none logged"
        if self.logged is not None:
            logged = f"{self.logged:.6f} logged, difference {self.step_loss - self.logged:+.1e}"
        return [self.weights, f"the step's loss: {self.step_loss:.6f} replayed, {logged}"]

    def format_table(self) -> str:
        """The losses as text, highest first, and the sentences."""
        head = ["loss", "tokens", "hits", "share", "sample"]
        rows = []
        for loss in self.losses:
            numbers = (f"{loss.mean:.4f}", len(loss.losses), f"{loss.hit_rate:.0%}", f"{self.share(loss):.1%}")
            rows.append((*numbers, f"{loss.source}:{loss.id}"))
        table = tabulate(rows, head, "plain", disable_numparse=True, colalign=("right",) * 4)
        return "\n".join([table, *self.sentences])


def replay(subject: Subject, run_dir: Path | None) -> Replay:
    """Runs the chosen samples, each alone; samples that the stage rejects are left out.

    Args:
        subject: the samples.
        run_dir: the run whose weights are used; None uses those that the configuration starts with.

    Raises:
        ModelError, DataError: weights that cannot be loaded, or an image that cannot be read.
    """
    run, geometry = subject.run, subject.processor.config
    model, weights = _load(subject, run_dir)
    device = model.hf.model.image_newline.device
    losses = []
    for number, choice in enumerate(
        tqdm(subject.choices, desc="replay", unit="sample", file=sys.stderr, disable=not sys.stderr.isatty())
    ):
        sample = choice.samples.sample(choice.number)
        example = encode(subject.processor, sample)
        if isinstance(example, SampleRejected):
            continue
        batch = collate([example], tile=geometry.tile, patches_per_tile=geometry.patches_per_side**2)
        scores = model.score(batch.to(device))
        values = scores.losses.double().cpu().numpy()
        losses.append(SampleLoss(number, sample.id, sample.source, values, scores.hits.cpu().numpy()))
    losses.sort(key=lambda loss: (-loss.mean, loss.number))
    result = Replay(weights, losses, subject.config.stage.loss_weighting)
    if run is None or not subject.is_whole_step:
        return result
    return replace(result, step_loss=result.total / run.plan.divisor, logged=run.logged.get("train/loss"))


def _load(subject: Subject, run_dir: Path | None) -> tuple[LlavaNext, str]:
    """The model on the device that there is, and a sentence on its weights."""
    # Only here: it imports the engine, which a page without losses does not need.
    from train.checkpoint.saved_weights import Weights, choose_weights, load_checkpoint, saved_weights

    config, backbone, run = subject.config, subject.backbone, subject.run
    if config.device != "cpu" and not torch.cuda.is_available():  # a run of GPUs is inspected on a machine without one
        config = replace(config, device="cpu", precision="fp32")
    device = choose_device(config, Launch(0, 0, 1))
    dtype = choose_dtype(config, device)
    num_steps, step = (run.num_steps, run.step) if run else (sys.maxsize, sys.maxsize)  # of a store: the newest
    saved = saved_weights(run_dir, num_steps, config.stage.result) if run_dir else [Weights(0)]
    weights = choose_weights(saved, step)
    attention = config.attention if device.type == "cuda" else "auto"
    model = build_model(backbone, dtype=dtype, seed=config.seed, attention=attention)
    checkpoint = weights.folder if weights.folder and weights.folder.parent.name == "checkpoints" else None
    origin = "initial parts, from seed and configuration"
    for start in (config.stage.init_from, None if checkpoint else weights.folder):
        if start is not None:
            origin = load_weights(model, backbone, Path(start))
    if checkpoint:  # it holds the trained parts alone
        add_adapters(model, config.lora, seed=config.seed)
        set_trained_parts(model, config.stage.rates)
        load_checkpoint(model, checkpoint)
        origin = f"checkpoint {checkpoint}"
    distance = weights.step - step
    age = f"NOT of step {step} but {abs(distance)} step(s) {'later' if distance > 0 else 'earlier'}"
    if run is None:
        age = f"of {weights.folder}" if weights.folder else "that the stage starts with"
    elif not distance:
        age = f"exactly as before step {step}"
    return model.to(device).eval(), f"weights {age}: {origin}; {str(dtype).removeprefix('torch.')} on {device.type}"
