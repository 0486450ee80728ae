"""Loss and every gradient of the tiny model by the authors' own classes, for each case of tiny_runs.CASES.

    python -m tests.oracles.authors.gradients [--check]

Runs in the environment that scripts/oracles.sh makes. Their tower runs without gradients, so it has none here; ours is
compared with stock transformers' instead (tests/llava_next/model/test_llava_next.py).
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava import conversation as conversation_lib  # type: ignore[import-not-found]
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM  # type: ignore[import-not-found]
from transformers import AutoTokenizer  # type: ignore[import-not-found]

from tests.oracles import tiny_model, tiny_runs
from tests.oracles.authors.tiny_llava import AnyResCollator, AnyResDataset, write_directories
from tests.oracles.digests import numbers_digest
from tests.oracles.save_fixture import save
from tests.oracles.tiny_runs import CASES, Case

TOLERANCE = 1e-5
"""Another processor may round differently; relative, per tensor."""


def load(folder: Path) -> tuple[Any, Any]:
    """Their model with its tower, fp32, and their tokenizer."""
    tower_folder, model_folder = write_directories(folder)
    model = LlavaLlamaForCausalLM.from_pretrained(model_folder)
    model.get_model().initialize_vision_modules(
        SimpleNamespace(
            vision_tower=str(tower_folder),
            mm_vision_select_layer=tiny_model.FEATURE_LAYER,
            mm_vision_select_feature="patch",
            pretrain_mm_mlp_adapter=None,
            mm_patch_merge_type="spatial_unpad",
            mm_projector_type="mlp2x_gelu",
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_folder, model_max_length=tiny_model.MAX_LENGTH, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token  # as their train() does
    return model.train(), tokenizer


def batch_of(case: Case, raw: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The case as one micro-batch of theirs, by way of a raw folder, which is made."""
    conversation_lib.default_conversation = conversation_lib.conv_templates[case.template]
    model.config.mm_patch_merge_type = "flat" if case.image_mode == "square" else "spatial_unpad"
    tiny_runs.write_raw(raw, case.records)
    dataset = AnyResDataset(
        str(raw / "records.json"),
        tokenizer,
        SimpleNamespace(
            is_multimodal=True,
            mm_use_im_start_end=False,
            image_folder=str(raw),
            image_processor=model.get_vision_tower().image_processor,
            image_aspect_ratio=case.image_mode,
            image_grid_pinpoints=tiny_model.PINPOINTS_WH,
        ),
    )
    return AnyResCollator(tokenizer)([dataset[number] for number in range(len(case.records))])


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    outputs: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load(Path(scratch))
        for case in CASES:
            batch = batch_of(case, Path(scratch, "raw", case.name), model, tokenizer)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            outputs[case.name] = {
                "loss": float(loss),
                "ids": [numbers_digest(row[:n].tolist()) for row, n in zip(batch["input_ids"], lengths, strict=True)],
                "labels": [numbers_digest(row[:n].tolist()) for row, n in zip(batch["labels"], lengths, strict=True)],
            }
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and parameter.grad.any():
                    tensors[f"{case.name}/{tiny_model.published_name(name)}"] = parameter.grad.clone()
    code = "llava.model.language_model.llava_llama.LlavaLlamaForCausalLM"
    right = save("gradients", code, tiny_runs.inputs(CASES), outputs, check=check, tensors=tensors, tolerance=TOLERANCE)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
