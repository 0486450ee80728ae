"""Competitor: stock transformers, its model, its processor and its Trainer, on padded batches.

    python -m training_step.competitor_stock JOB.json

The class is that of the exported model. LLaVA-OneVision's processor needs torchvision for videos; the one here is the
same without them. Written as a careful user of these three would: prompts by the chat template, labels at the answers,
padding to the longest sample of a micro-batch, fused AdamW; SDPA and eager blocks unless the job says otherwise.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from training_step.job import (
    CLIP_NORM,
    END,
    HEADER,
    LEARNING_RATE,
    Job,
    MemoryMark,
    Outcome,
    StepClock,
    gemm_tflops,
    use_threads,
)
from transformers import (
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llava_next.formats.onevision import load_processor

Record = dict[str, Any]


def main(job: Job) -> None:
    """Runs the job and writes its outcome."""
    use_threads(job.threads)
    folder = Path(job.folder)
    processor = load_processor(folder / "model")
    processor.tokenizer.padding_side = "right"
    records = json.loads((folder / "raw" / "records.json").read_text(encoding="utf-8"))
    outcome = Outcome(gemm_tflops=gemm_tflops(job.device))
    memory = MemoryMark(job.device)
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "model",
        dtype=torch.bfloat16 if job.half_weights else torch.float32,
        attn_implementation="sdpa" if job.attention == "auto" else job.attention,
    )
    model.config.use_cache = False
    if not job.trains_tower:
        model.model.vision_tower.requires_grad_(False)
    collator = Collator(processor, folder / "raw")
    clock = Clock(job.device, outcome)
    trainer = Trainer(
        model=model, args=_arguments(job), train_dataset=records, data_collator=collator, callbacks=[clock]
    )
    trainer.train()
    outcome.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    per_step = job.samples_per_step // job.batch
    if not job.workers:  # else the collators that counted were the workers'
        counts = collator.num_supervised
        outcome.num_supervised = [sum(counts[i : i + per_step]) for i in range(0, len(counts), per_step)]
    outcome.peak_gib = memory.peak_gib()
    outcome.gemm_tflops = max(outcome.gemm_tflops, gemm_tflops(job.device))
    outcome.write(job.result)


class Collator:
    """Records to a padded batch: prompts and images through the processor, labels at the answers only."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor, self.folder = processor, folder
        self.num_supervised: list[int] = []
        tokenizer = processor.tokenizer
        self.header = torch.tensor(tokenizer(HEADER, add_special_tokens=False)["input_ids"])
        self.end = tokenizer.convert_tokens_to_ids(END)

    def __call__(self, records: list[Record]) -> dict[str, torch.Tensor]:
        # A list per sample: LLaVA-OneVision's processor pads the images of a list with several, and cuts a single one.
        names = [each["image"] if isinstance(each["image"], list) else [each["image"]] for each in records]
        images = [[Image.open(self.folder / name).convert("RGB") for name in of_sample] for of_sample in names]
        texts = [self._text(record) for record in records]
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        batch = self.processor(images=images, text=texts, **options)
        batch["labels"] = torch.stack([self._labels(ids) for ids in batch["input_ids"]])
        self.num_supervised.append(int((batch["labels"] != -100).sum()))
        return dict(batch)

    def _text(self, record: Record) -> str:
        """The prompt by the exported chat template: the same tokens as in the other trainers."""
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        text: str = self.processor.apply_chat_template(messages, tokenize=False)
        return text

    def _labels(self, ids: torch.Tensor) -> torch.Tensor:
        """From the end of each header to the next end token, which is supervised too."""
        labels = torch.full_like(ids, -100)
        size = len(self.header)
        for start in (ids.unfold(0, size, 1) == self.header).all(1).nonzero()[:, 0].tolist():
            first = start + size
            last = first + int((ids[first:] == self.end).nonzero()[0])
            labels[first : last + 1] = ids[first : last + 1]
        return labels


class Clock(TrainerCallback):
    """Laps at the end of every optimizer step."""

    def __init__(self, device: str, outcome: Outcome) -> None:
        self.clock, self.outcome = StepClock(device), outcome

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the first step."""
        self.clock.restart()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends a step."""
        self.clock.lap(self.outcome)


def _arguments(job: Job) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(job.folder) / "stock"),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.samples_per_step // job.batch,
        max_steps=job.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP_NORM,
        gradient_checkpointing=job.recompute,
        torch_compile=job.compile,
        use_liger_kernel=job.liger,
        train_sampling_strategy="sequential",
        use_cpu=job.device == "cpu",
        bf16=job.device == "cuda",
        dataloader_num_workers=job.workers,
        dataloader_pin_memory=job.device == "cuda",
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
