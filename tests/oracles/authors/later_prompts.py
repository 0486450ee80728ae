"""Ids and labels of the templates that came after the package: functions of one file of the authors' repository.

    python -m tests.oracles.authors.later_prompts --train-py FILE --templates qwen_1_5 llava_llama_3 [--check]

Runs in the environment that scripts/oracles.sh makes. That file has many imports; only the functions named here are
extracted from it and run.
"""

import argparse
import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
import transformers  # type: ignore[import-not-found]
from llava import conversation as conversation_lib  # type: ignore[import-not-found]
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX  # type: ignore[import-not-found]
from llava.mm_utils import tokenizer_image_token  # type: ignore[import-not-found]

from tests.oracles.authors.prompts import run
from tests.oracles.authors.slow_tokenizers import load
from tests.oracles.digests import prompt_outputs
from tests.oracles.inputs import conversations
from tests.oracles.save_fixture import save

FUNCTIONS = {
    "chatml_direct": ("vicuna_chatml", "preprocess_mpt"),
    "qwen_1_5": ("qwen", "preprocess_qwen"),
    "llava_llama_3": ("llama3", "preprocess_llama3"),
}
MULTIMODAL = "preprocess_multimodal"


def functions(train_py: Path) -> dict[str, Any]:
    """The functions above out of the authors' file, with the names that they use."""
    names = {MULTIMODAL, *(function for _, function in FUNCTIONS.values())}
    tree = ast.parse(train_py.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {
        # They copy the tokenizer for every record, which takes minutes; main() hands over copies instead.
        "copy": SimpleNamespace(deepcopy=lambda tokenizer: tokenizer),
        "re": re,
        "torch": torch,
        "transformers": transformers,
        "conversation_lib": conversation_lib,
        "tokenizer_image_token": tokenizer_image_token,
        "IGNORE_INDEX": IGNORE_INDEX,
        "IMAGE_TOKEN_INDEX": IMAGE_TOKEN_INDEX,
        "DEFAULT_IMAGE_TOKEN": DEFAULT_IMAGE_TOKEN,
        "DataArguments": object,  # in an annotation only
        "IS_TOKENIZER_GREATER_THAN_0_14": tuple(map(int, tokenizers.__version__.split(".")[:2])) >= (0, 14),
    }
    exec("from typing import Dict, List, Sequence", space)
    exec(compile(tree, str(train_py), "exec"), space)
    return {name: space[name] for name in names}


def main() -> int:
    """The program; returns 1 if a fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-py", type=Path, required=True)
    parser.add_argument("--templates", nargs="+", choices=sorted(FUNCTIONS), required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    authors = functions(options.train_py)
    records, right = conversations(), True
    for template in options.templates:
        tokenizer, function = FUNCTIONS[template]
        # The two later functions bring their own wording; this is for their "mmtag" question, and for ChatML.
        conversation_lib.default_conversation = conversation_lib.conv_templates["chatml_direct"]
        # One for text, and one that they add the image token to.
        copies = {has_image: load(tokenizer) for has_image in (False, True)}
        ids, labels = run(records, copies, authors[MULTIMODAL], authors[function])
        outputs = {"template": template, "tokenizer": tokenizer} | prompt_outputs(
            ids, labels, [record.kind for record in records]
        )
        name = f"{template}__{tokenizer}__later"
        code = f"LLaVA-VL/LLaVA-NeXT llava/train/train.py {function}"
        right &= save(name, code, records, outputs, check=options.check)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
