"""Ids and labels of the released package: `preprocess_multimodal` and `preprocess` of llava.train.train.

    python -m scripts.oracles.prompts [--check]      inside the oracle environment (scripts/oracles.sh)

What came later than the package is later_prompts.py's.
"""

import argparse
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from llava import conversation as conversation_lib  # type: ignore[import-not-found]
from llava.train import train  # type: ignore[import-not-found]

from scripts.oracles.authors_tokenizers import load
from scripts.oracles.digests import prompt_outputs
from scripts.oracles.fixtures import save
from scripts.oracles.inputs import Conversation, captions, conversations

CASES = (
    ("plain", "vicuna"),
    ("vicuna_v1", "vicuna"),
    ("vicuna_v1", "vicuna_legacy"),
    ("mistral_instruct", "mistral"),
    ("chatml_direct", "vicuna_chatml"),
)

Preprocess = Callable[[list[list[dict[str, str]]], Any, bool], dict[str, Any]]
DATA_ARGS = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)


def run(
    records: Sequence[Conversation],
    tokenizers: Mapping[bool, Any],
    multimodal: Callable[..., Any],
    preprocess: Preprocess,
) -> tuple[list[list[int]], list[list[int]]]:
    """Each record as LazySupervisedDataset treats it; returns ids (IMAGE at a picture's place) and labels.

    `tokenizers` holds the one for records without and the one for records with a picture.
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


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    right = True
    for template, tokenizer in CASES:
        records = captions() if template == "plain" else conversations()
        conversation_lib.default_conversation = conversation_lib.conv_templates[template]
        loaded = load(tokenizer)
        ids, labels = run(records, {False: loaded, True: loaded}, train.preprocess_multimodal, train.preprocess)
        outputs = {"template": template, "tokenizer": tokenizer} | prompt_outputs(
            ids, labels, [record.kind for record in records]
        )
        name = f"{template}__{tokenizer}"
        right &= save(name, "llava.train.train.preprocess", records, outputs, check=options.check)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
