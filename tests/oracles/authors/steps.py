"""Twenty optimizer steps of the tiny model by the authors' program, for each run of tiny_runs.RUNS.

    python -m tests.oracles.authors.steps [--check]

Runs in the environment that scripts/oracles.sh makes. What runs is `llava.train.train.train()` itself, from its command
line to the end of training, on Hugging Face's Trainer; fp32 on a CPU, one sample a micro-batch, their accumulation,
schedule, clipping and AdamW. Three things are changed from outside: the order of the data is the given one, losses are
recorded before they are rounded, and the tower is converted back from fp16, which their program uses without `--bf16`,
to fp32 (the tiny weights are exact in both). For AnyRes it is given the data set of tiny_llava.py, since the released
one has none.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llava.train import train  # type: ignore[import-not-found]
from torch.utils.data import SequentialSampler

from tests.oracles import tiny_model, tiny_runs
from tests.oracles.authors.tiny_llava import AnyResCollator, AnyResDataset, write_directories
from tests.oracles.save_fixture import save
from tests.oracles.tiny_runs import BATCH_SIZE, NUM_STEPS, RUNS, Run

TOLERANCE = 1e-5
"""Another processor may round differently; relative, per loss and per tensor."""
PARTS = {"mm_projector": "projector", "image_newline": "image_newline"}


@dataclass
class Seen:
    """The record of a run: per step the loss (mean over its micro-batches), gradient norm and rates by part."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    undecayed: list[str] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def part_of(name: str) -> str:
    """The part of a trained tensor, by the authors' name."""
    return next((part for key, part in PARTS.items() if key in name), "language_model")


def watched_trainer(seen: Seen) -> type:
    """Their trainer with recording; its computation is unchanged."""

    class Watched(train.LLaVATrainer):  # type: ignore[misc]
        def __init__(self, model: Any, **kwargs: Any) -> None:
            model.get_vision_tower().to(torch.float32)
            self.micro_losses: list[torch.Tensor] = []
            super().__init__(model=model, **kwargs)
            clip = self.accelerator.clip_grad_norm_

            def clipped(*args: Any, **kwargs: Any) -> Any:
                norm = clip(*args, **kwargs)
                self.keep(norm)
                return norm

            self.accelerator.clip_grad_norm_ = clipped

        def _get_train_sampler(self) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any) -> torch.Tensor:
            loss = super().training_step(model, inputs)
            self.micro_losses.append(loss.double())
            return loss  # type: ignore[no-any-return]

        def keep(self, norm: torch.Tensor) -> None:
            """Just before an optimizer step: its loss, norm, rates and groups."""
            assert len(self.micro_losses) == BATCH_SIZE
            seen.losses.append(float(sum(self.micro_losses)))
            seen.grad_norms.append(float(norm))
            self.micro_losses.clear()
            seen.undecayed.clear()
            rates: dict[str, set[float]] = {}
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for number, group in enumerate(self.optimizer.param_groups):
                for parameter in group["params"]:
                    rates.setdefault(part_of(names[id(parameter)]), set()).add(group["lr"])
                    if number % 2:  # theirs come in pairs, of which the second has no weight decay
                        seen.undecayed.append(tiny_model.published_name(names[id(parameter)]))
            for part, (rate,) in rates.items():
                seen.rates.setdefault(part, []).append(rate)

        def save_state(self) -> None:
            named = self.model.named_parameters()
            seen.weights = {
                tiny_model.published_name(name): parameter.detach().clone()
                for name, parameter in named
                if parameter.requires_grad
            }
            super().save_state()

    return Watched


def anyres_data(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """Replaces their make_supervised_data_module."""
    data_args.image_grid_pinpoints = tiny_model.PINPOINTS_WH
    dataset = AnyResDataset(data_args.data_path, tokenizer, data_args)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": AnyResCollator(tokenizer)}


def command_line(run: Run, directories: tuple[Path, Path], raw: Path, output: Path) -> list[str]:
    """The arguments of their program, in the words of their pretrain.sh and finetune.sh."""
    tower, model = directories
    is_anyres = run.image_mode == "anyres"
    arguments = {
        "model_name_or_path": model,
        "version": run.template,
        "data_path": raw / "records.json",
        "image_folder": raw,
        "vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": tiny_model.FEATURE_LAYER,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "spatial_unpad" if is_anyres else "flat",
        "image_aspect_ratio": "anyres" if is_anyres else "square",
        "tune_mm_mlp_adapter": run.is_align,
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": BATCH_SIZE,
        "learning_rate": run.rates.get("language_model", run.rates["projector"]),
        "weight_decay": 0.0,
        "warmup_ratio": tiny_runs.WARMUP_RATIO,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": tiny_runs.CLIP_NORM,
        "model_max_length": tiny_model.MAX_LENGTH,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if not run.is_align:
        arguments["mm_projector_lr"] = run.rates["projector"]
    return [word for key, value in arguments.items() for word in (f"--{key}", str(value))]


def run_authors(run: Run, scratch: Path) -> Seen:
    """One run in a scratch folder."""
    raw, output = scratch / "raw" / run.name, scratch / "output" / run.name
    records = tiny_runs.visited(run)
    tiny_runs.write_raw(raw, records)
    seen = Seen()
    replaced: dict[str, Callable[..., Any]] = {
        "LLaVATrainer": watched_trainer(seen),
        "safe_save_model_for_hf_trainer": lambda **_: None,  # wants deepspeed, and the weights are kept already
    }
    if run.image_mode == "anyres":
        replaced["make_supervised_data_module"] = anyres_data
    saved = {name: getattr(train, name) for name in replaced}
    arguments = sys.argv
    sys.argv = ["train.py", *command_line(run, write_directories(scratch / run.name), raw, output)]
    printed = io.StringIO()
    try:
        for name, value in replaced.items():
            setattr(train, name, value)
        with contextlib.redirect_stdout(printed):
            train.train()
    finally:
        sys.argv = arguments
        for name, value in saved.items():
            setattr(train, name, value)
    assert "mismatch" not in printed.getvalue(), printed.getvalue()
    assert len(seen.losses) == NUM_STEPS
    return seen


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    outputs: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in RUNS:
            seen = run_authors(run, Path(scratch))
            outputs[run.name] = {
                "losses": seen.losses,
                "grad_norms": seen.grad_norms,
                "rates": seen.rates,
                "undecayed": sorted(seen.undecayed),
            }
            tensors |= {f"{run.name}/{name}": value for name, value in seen.weights.items()}
    code = "llava.train.train.train, llava.train.llava_trainer.LLaVATrainer"
    right = save("steps", code, tiny_runs.inputs(RUNS), outputs, check=check, tensors=tensors, tolerance=TOLERANCE)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
