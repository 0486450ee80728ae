"""Ids and labels of the released package: `preprocess_multimodal`, `preprocess` and the collator of llava.train.train.

    python -m tests.oracles.authors.prompts [--check]

Runs in the environment that scripts/oracles.sh makes. What came later than the package is later_prompts.py's.
"""

import argparse
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from llava import conversation as conversation_lib  # type: ignore[import-not-found]
from llava.train import train  # type: ignore[import-not-found]

from tests.oracles.authors.slow_tokenizers import load
from tests.oracles.digests import prompt_outputs, supervised_runs
from tests.oracles.inputs import Conversation, captions, conversations, odd_records
from tests.oracles.save_fixture import save

CASES = (
    ("plain", "vicuna"),
    ("vicuna_v1", "vicuna"),
    ("vicuna_v1", "vicuna_legacy"),
    ("mistral_instruct", "mistral"),
    ("chatml_direct", "vicuna_chatml"),
)

CUT_AT = 64
"""The maximum length of one more fixture, in tokens, an image counted as one: many conversations are longer."""

Preprocess = Callable[[list[list[dict[str, str]]], Any, bool], dict[str, Any]]
DATA_ARGS = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)


def run(
    records: Sequence[Conversation],
    tokenizers: Mapping[bool, Any],
    multimodal: Callable[..., Any],
    preprocess: Preprocess,
) -> tuple[list[list[int]], list[list[int]]]:
    """Each record as LazySupervisedDataset treats it; returns ids (IMAGE at a picture's place) and labels.

    `tokenizers` holds the one for records without and the one for records with an image.
    """
    all_ids, all_labels = [], []
    for record in records:
        source = [[{"from": turn.speaker, "value": turn.value} for turn in record.turns]]
        if record.has_image:
            source = multimodal(source, DATA_ARGS)
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each "tokenization mismatch"
            encoded = preprocess(source, tokenizers[record.has_image], record.has_image)
        all_ids.append([int(number) for number in encoded["input_ids"][0]])
        all_labels.append([int(number) for number in encoded["labels"][0]])
    return all_ids, all_labels


def collated(
    all_ids: list[list[int]], all_labels: list[list[int]], tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels after the collator, which cuts them at the tokenizer's maximum length; each record alone."""
    collator = train.DataCollatorForSupervisedDataset(tokenizer)
    batches = [
        collator([{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}])
        for ids, labels in zip(all_ids, all_labels, strict=True)
    ]
    return [batch["input_ids"][0].tolist() for batch in batches], [batch["labels"][0].tolist() for batch in batches]


def odd_outputs() -> dict[str, Any]:
    """By kind of `odd_records`: ids and supervised ranges, or the exception that a record raises."""
    conversation_lib.default_conversation = conversation_lib.conv_templates["vicuna_v1"]
    tokenizer = load("vicuna")
    outputs: dict[str, dict[str, Any]] = {}
    for record in odd_records():
        try:
            copies = {False: tokenizer, True: tokenizer}
            ids, labels = run([record], copies, train.preprocess_multimodal, train.preprocess)
        except (AssertionError, KeyError) as error:
            outputs[record.kind] = {"error": type(error).__name__}
        else:
            outputs[record.kind] = {"ids": ids[0], "supervised": supervised_runs(labels[0])}
    return {"template": "vicuna_v1", "tokenizer": "vicuna", "records": outputs}


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    right = True
    for template, tokenizer, max_length in [*((*case, None) for case in CASES), ("vicuna_v1", "vicuna", CUT_AT)]:
        records = captions() if template == "plain" else conversations()
        conversation_lib.default_conversation = conversation_lib.conv_templates[template]
        loaded = load(tokenizer)
        about: dict[str, Any] = {"template": template, "tokenizer": tokenizer}
        if max_length is not None:
            loaded.model_max_length = max_length
            about["max_length"] = max_length
        ids, labels = run(records, {False: loaded, True: loaded}, train.preprocess_multimodal, train.preprocess)
        if max_length is not None:
            ids, labels = collated(ids, labels, loaded)
        outputs = about | prompt_outputs(ids, labels, [record.kind for record in records])
        name = f"{template}__{tokenizer}" + ("__cut" if max_length is not None else "")
        right &= save(name, "llava.train.train.preprocess", records, outputs, check=options.check)
    right &= save("records", "llava.train.train.preprocess", odd_records(), odd_outputs(), check=options.check)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
