"""Competitor: the authors' trainer, llava-torch's model, data set, collator and LLaVATrainer.

    ~/.cache/llava_next/oracle_env/bin/python -m training_step.competitor_authors JOB.json

Runs in the environment that scripts/oracles.sh makes. The package trains on single views: its AnyRes functions serve
inference. Here `process_anyres_image` of the package replaces the image processor that their data set calls, and their
model is given the image sizes that it needs; nothing else is changed. Its tower runs without gradients, as published.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from llava import conversation  # type: ignore[import-not-found]
from llava.mm_utils import process_anyres_image  # type: ignore[import-not-found]
from llava.model.language_model.llava_llama import (  # type: ignore[import-not-found]
    LlavaConfig,
    LlavaLlamaForCausalLM,
)
from llava.train.llava_trainer import LLaVATrainer  # type: ignore[import-not-found]
from llava.train.train import (  # type: ignore[import-not-found]
    DataArguments,
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    ModelArguments,
    TrainingArguments,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from training_step.job import CLIP_NORM, LEARNING_RATE, Job, MemoryMark, Outcome, StepClock, gemm_tflops, use_threads
from transformers import CLIPImageProcessor, CLIPVisionConfig, TrainerCallback

TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
TOWER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("layer_norm_eps", "hidden_act"),
)
NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
    ("vision_tower.", "model.vision_tower.vision_tower."),
)
"""Prefixes of published names, and the prefixes in the authors' code."""


def main(job: Job) -> None:
    """Runs the job and writes its outcome."""
    use_threads(job.threads)
    folder = Path(job.folder)
    tokenizer = _tokenizer(folder)
    outcome = Outcome(gemm_tflops=gemm_tflops(job.device))
    memory = MemoryMark(job.device)
    model = _model(folder)
    if job.trains_tower:
        raise SystemExit("the authors' package runs its tower without gradients: trains_tower must be false")
    processor = _AnyRes(model.get_vision_tower().image_processor, model.config.image_grid_pinpoints)
    data = DataArguments(data_path=str(folder / "raw" / "records.json"), image_folder=str(folder / "raw"))
    data.image_processor, data.is_multimodal, data.mm_use_im_start_end = processor, True, False
    data.image_aspect_ratio = "anyres"
    clock = _Clock(job.device, outcome)
    trainer = _InOrder(
        model=model,
        tokenizer=tokenizer,
        args=_arguments(job),
        train_dataset=_WithSizes(tokenizer=tokenizer, data_path=data.data_path, data_args=data),
        data_collator=_WithSizesCollator(tokenizer=tokenizer),
        callbacks=[clock],
    )
    trainer.train()
    per_step = job.samples_per_step // job.batch
    for first in range(0, len(trainer.micro_losses), per_step):
        losses, counts = trainer.micro_losses[first : first + per_step], trainer.micro_counts[first : first + per_step]
        outcome.num_supervised.append(sum(counts))
        outcome.losses.append(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    outcome.peak_gib = memory.peak_gib()
    outcome.gemm_tflops = max(outcome.gemm_tflops, gemm_tflops(job.device))
    outcome.write(job.result)


class _AnyRes:
    """Replaces the image processor that their data set calls: all AnyRes views of an image instead of one."""

    def __init__(self, processor: Any, pinpoints: Any) -> None:
        self.processor, self.pinpoints = processor, pinpoints
        self.crop_size = processor.crop_size

    def preprocess(self, image: Any, return_tensors: str) -> dict[str, list[torch.Tensor]]:
        return {"pixel_values": [process_anyres_image(image, self.processor, self.pinpoints)]}


class _WithSizes(LazySupervisedDataset):  # type: ignore[misc]
    """Their data set with (width, height) of the image, which their model needs and their data set lacks."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        item: dict[str, Any] = super().__getitem__(i)
        path = os.path.join(self.data_args.image_folder, self.list_data_dict[i]["image"])  # noqa: PTH118 - as theirs
        with Image.open(path) as image:  # the header alone
            item["image_size"] = image.size
        return item


class _WithSizesCollator(DataCollatorForSupervisedDataset):  # type: ignore[misc]
    def __call__(self, instances: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(instances)
        return {**batch, "image_sizes": [instance["image_size"] for instance in instances]}


class _InOrder(LLaVATrainer):  # type: ignore[misc]
    """Their trainer, with samples in the order of the file.

    Transformers 4.36 averages over micro-batches, the other competitors over the tokens of the step. The loss of each
    micro-batch is kept with its number of tokens, from which the mean over tokens is computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_losses: list[float] = []
        self.micro_counts: list[int] = []

    def _get_train_sampler(self) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs)
        self.micro_losses.append(float(loss.detach()))
        self.micro_counts.append(int((inputs["labels"] != -100).sum()))
        return loss


class _Clock(TrainerCallback):
    def __init__(self, device: str, outcome: Outcome) -> None:
        self.clock, self.outcome = StepClock(device), outcome

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.lap(self.outcome)


def _tokenizer(folder: Path) -> Any:
    from tests.oracles.authors.slow_tokenizers import load

    conversation.default_conversation = conversation.conv_templates["vicuna_v1"]
    return load("vicuna")


def _model(folder: Path) -> Any:
    """Their model with the weights of `folder/model`."""
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "model" / "model.safetensors")
    tower = _write_tower(folder / "authors_tower", config["vision_config"], state)
    model_config = LlavaConfig(**{key: config["text_config"][key] for key in TEXT_KEYS}, tie_word_embeddings=False)
    model_config.use_cache = False
    model = LlavaLlamaForCausalLM._from_config(model_config, torch_dtype=torch.float32)
    arguments = ModelArguments(
        vision_tower=str(tower),
        mm_vision_select_layer=config["vision_feature_layer"],
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad",
    )
    model.get_model().initialize_vision_modules(arguments)
    model.config.image_aspect_ratio = "anyres"
    model.config.image_grid_pinpoints = [[width, height] for height, width in config["image_grid_pinpoints"]]
    model.config.tokenizer_padding_side = "right"
    model.config.tokenizer_model_max_length = config["text_config"]["max_position_embeddings"]
    missing, unexpected = model.load_state_dict(
        {_authors_name(name): tensor for name, tensor in state.items()}, strict=False
    )
    missing = [name for name in missing if not name.endswith(("inv_freq", "position_ids"))]
    if missing or unexpected:
        raise SystemExit(f"weights and the authors' model disagree: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model


def _authors_name(name: str) -> str:
    for prefix, authors_prefix in NAMES:
        if name.startswith(prefix):
            return authors_prefix + name[len(prefix) :]
    raise SystemExit(f"the authors' code has no tensor for {name}")


def _write_tower(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """The tower as a CLIP directory, which their code reads."""
    folder.mkdir(exist_ok=True)
    CLIPVisionConfig(**{key: config[key] for key in TOWER_KEYS}).save_pretrained(folder)
    side = config["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    prefix = "vision_tower."
    tower = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _arguments(job: Job) -> Any:
    return TrainingArguments(
        output_dir=str(Path(job.folder) / "authors"),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.samples_per_step // job.batch,
        max_steps=job.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP_NORM,
        use_cpu=job.device == "cpu",
        dataloader_num_workers=job.workers,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
