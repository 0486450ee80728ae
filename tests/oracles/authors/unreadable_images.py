"""Records whose image cannot be read, in the data set of the authors' repository.

    python -m tests.oracles.authors.unreadable_images --train-py FILE [--check]

Runs in the environment that scripts/oracles.sh makes. Three methods of `LazySupervisedDataset` are taken out of the
file and run; what a prompt becomes is later_prompts.py's.
"""

import argparse
import ast
import contextlib
import copy
import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from tests.oracles.inputs import UNREADABLE_RECORDS
from tests.oracles.save_fixture import save

CLASS, METHODS = "LazySupervisedDataset", ("__getitem__", "_get_item", "process_image")


def data_set(train_py: Path, records: list[dict[str, Any]], image_folder: str) -> Any:
    """Their data set of these records, without its own reading of a JSON file."""
    tree = ast.parse(train_py.read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS)
    node.bases = []
    node.body = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name in METHODS]
    space: dict[str, Any] = {
        "Dict": dict,
        "Image": Image,
        "copy": copy,
        "os": os,
        "preprocess": lambda sources, tokenizer, has_image: {"input_ids": [[1]], "labels": [[1]]},
        "preprocess_multimodal": lambda sources, data_args: sources,
        "time": SimpleNamespace(sleep=lambda seconds: None),
        "torch": torch,
    }
    exec(compile(ast.Module([node], []), str(train_py), "exec"), space)
    data = space[CLASS]()
    data.list_data_dict = records
    data.tokenizer = None
    processor = SimpleNamespace(crop_size={"height": 2, "width": 2})
    data.data_args = SimpleNamespace(
        image_folder=image_folder, image_processor=processor, image_aspect_ratio="square", is_multimodal=True
    )
    return data


def main() -> int:
    """The program; returns 1 if the fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-py", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    records = [
        {"id": name, "conversations": turns} | ({"image": image} if image else {}) for name, image in UNREADABLE_RECORDS
    ]
    outputs = {}
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):  # a line for each try
        data = data_set(options.train_py, records, empty)
        for number, (name, _) in enumerate(UNREADABLE_RECORDS):
            try:
                outputs[name] = {"taken": data[number]["id"]}
            except FileNotFoundError as error:
                outputs[name] = {"error": type(error).__name__}
    code = f"LLaVA-VL/LLaVA-NeXT llava/train/train.py {CLASS}"
    return 0 if save("unreadable", code, UNREADABLE_RECORDS, {"records": outputs}, check=options.check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
